"""Colours, labels and sizes of the pictures."""

from __future__ import annotations

import math
from html import escape

from zograph.ir import ParamInfo
from zograph.viz.scene import Item, Move, Scene, Stage

# Okabe and Ito's palette, which colour-blind readers can tell apart; fills are its light tints.
LINE = {"+": "#D55E00", "-": "#0072B2", "hoisted": "#009E73", "": "#555555"}
FILL = {"+": "#FBD9BD", "-": "#BFE0F5", "hoisted": "#BFE8DB", "": "#EEEEEE"}
BAR, WEIGHT, NOISE = "#E6B800", "#FFF9DB", "#CC79A7"
MOVE = {
    "fetch": "#DDD6F3", "write back": "#F3D3E3", "fold": "#FBEBA6",
    "decode": "#FBEBA6", "encode": "#FBEBA6",
}  # fmt: skip
"""Fills of what happens to weights; waiting and releasing have none."""
SLOT = "#7A5FB5"
"""Colour of the arrows from a released slot to its next fetch."""

GRAPH = {
    "rankdir": "TB", "ranksep": "0.28", "nodesep": "0.18", "fontname": "Helvetica",
    "fontsize": "14", "bgcolor": "white", "newrank": "true",
}  # fmt: skip
NODE = {
    "fontname": "Helvetica", "fontsize": "11", "shape": "box", "style": "rounded,filled",
    "margin": "0.09,0.04", "height": "0.28", "width": "0.3", "fillcolor": FILL[""],
    "color": LINE[""],
}  # fmt: skip
EDGE = {"fontname": "Helvetica", "fontsize": "10", "arrowsize": "0.6", "color": LINE[""]}
CLUSTER = {
    "style": "rounded,filled", "fillcolor": "#FAFAFA", "color": "#999999", "labeljust": "l",
    "margin": "10",
}  # fmt: skip
FULL_BAR = 10
"""Characters of the longest bar."""
EIGHTHS = ("", "\u258f", "\u258e", "\u258d", "\u258c", "\u258b", "\u258a", "\u2589")


def noise_order(line: str) -> int:
    """Sort the noise inputs of a stage: what all stages share, then its own."""
    starts = ("seed", "eps", "pending", "keys")
    return next((i for i, s in enumerate(starts) if line.startswith(s)), len(starts))


def minus(text: str) -> str:
    """Write a proper minus sign for the branch."""
    return text.replace("-", "\N{MINUS SIGN}")


def amount(number: float) -> str:
    """Write a number with a metric prefix.

    Examples
    --------
    >>> amount(7_087_872), amount(999), amount(0)
    ('7.1 M', '999 ', '0 ')
    """
    prefixes = ["", "k", "M", "G", "T"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    digits = 1 if number < 100 and len(prefixes) < 5 else 0
    return f"{number:.{digits}f} {prefixes[0]}"


def title(stage: Stage) -> str:
    """Write the heading of a stage."""
    count, size = (total // stage.repeats for total in stage.size())
    each = " each" if stage.repeats > 1 else ""
    weights = f" ({amount(count).strip()} parameters, {amount(size)}B{each})" if count else ""
    if stage.repeats == 1:
        return f"stage {stage.number}: {stage.path}{weights}"
    chain = "\\leach one's results go into the next" if stage.chained else ""
    chain += "\\lslots that one releases are filled anew by a later one" if stage.refills else ""
    return f"stages {stage.numbers()}: {stage.repeats} x {stage.path}{weights}{chain}\\l"


def heading(scene: Scene) -> str:
    """Write the first line of the legend."""
    params = scene.params.values()
    count = amount(sum(p.bytes // p.dtype.itemsize for p in params)).strip()
    size = amount(sum(p.bytes for p in params))
    stages = sum(s.repeats for s in scene.stages.values())
    return f"{stages} stage{'s' * (stages != 1)}, {count} parameters, {size}B"


def bar(length: float, color: str = BAR) -> str:
    """Return a bar of block characters, to an eighth of one."""
    eighths = max(1, round(8 * length))
    blocks = "\N{FULL BLOCK}" * (eighths // 8) + EIGHTHS[eighths % 8]
    return f'<font color="{color}" point-size="8">{blocks}</font>'


def chain(names: list[str]) -> str:
    """Write ops that follow each other, a few on a line."""
    lines = [names[0]]
    for name in names[1:]:
        if len(lines[-1]) + len(name) > 20:
            lines.append(name)
        else:
            lines[-1] += f" \N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} {name}"
    return "\n".join(lines)


def bar_length(param: ParamInfo, largest: int) -> float:
    """Return the length of a parameter's bar: as the square root of its bytes."""
    return FULL_BAR * math.sqrt(param.bytes / max(1, largest))


def weights(scene: Scene, item: Item) -> str:
    """Return the table of a box of weights: a line each, the perturbed copies below."""
    largest = max((p.bytes for p in scene.params.values()), default=1)
    stage = scene.stages.get(-1 if item.stage is None else item.stage)
    path = stage.first_path.partition(", part ")[0] if stage is not None else ""
    prefix = f"{path}." if path else ""
    modules = {p.name.rpartition(".")[0] for p in item.params}
    module = modules.pop() if len(modules) == 1 else ""
    lines = []
    for param in item.params:
        name = param.name.removeprefix(f"{module}.") if module else param.name
        shape = "x".join(map(str, param.shape)) or "scalar"
        words = f"{escape(name)}  {shape}  {amount(param.bytes)}B"
        words += "" if param.trainable else "  frozen"
        tied = scene.tied(param.name, item.stage)
        words += "" if tied is None else f"  (tied: stage {tied})"
        color = BAR if param.trainable else "#AAAAAA"
        words += f"  {bar(bar_length(param, largest), color)}"
        lines.append(f'<tr><td colspan="2" align="left">{words}</td></tr>')
    if module and module != prefix[:-1]:
        bold = f"<b>{escape(module.removeprefix(prefix))}</b>"
        lines.insert(0, f'<tr><td colspan="2">{bold}</td></tr>')
    text = "".join(lines)
    what = "gathered rows" if item.rows else "w"
    ports = "".join(
        f'<td port="{"p" if sign == "+" else "m"}" bgcolor="{FILL[sign]}">'
        f"{what} {minus(sign)} &#949;z</td>"
        for sign in item.ports
    )
    text += f"<tr>{ports}</tr>" if ports else ""
    frame = f'border="1" cellborder="0" cellspacing="0" cellpadding="2" color="{LINE[""]}"'
    return f'<<table {frame} bgcolor="{WEIGHT}">{text}</table>>'


def span(move: Move) -> str:
    """Write how many bytes a transfer moves, over equal stages.

    Examples
    --------
    >>> span(Move("fetch", 0, 201_000_000)), span(Move("fetch", 128, 128))
    ('0 to 201 MB', '128 B')
    """
    most = f"{amount(move.high)}B"
    if move.low == move.high:
        return most
    number, _, prefix = amount(move.low).partition(" ")
    same = amount(move.high).endswith(f" {prefix}") or move.low == 0
    return f"{number} to {most}" if same else f"{number} {prefix}B to {most}"


def transfers(item: Item) -> str:
    """Return the table of what happens to a stage's weights, from left to right."""
    cells = []
    for what, move in item.moves.items():
        words = what
        if what == "fold":
            words = f"fold {move.high} term{'s' * (move.high != 1)}"
        elif move.high:
            words = f"{what} {span(move)}"
        if move.streams:
            streams = ", ".join(s.replace("_", " ") for s in move.streams)
            words += f'<br/><font point-size="8">{streams}</font>'
        port = what.replace(" ", "_")
        fill = f' bgcolor="{MOVE[what]}"' if what in MOVE else ""
        cells.append(f'<td port="{port}" border="1"{fill}>{words}</td>')
    frame = f'border="0" cellborder="0" cellspacing="3" cellpadding="3" color="{LINE[""]}"'
    gap = "<td>&#8250;</td>"
    return f"<<table {frame}><tr>{gap.join(cells)}</tr></table>>"


def legend(scene: Scene) -> str:
    """Return the table that explains the picture."""
    colours = (
        ("+", "forward at w + &#949;z"),
        ("-", "forward at w &#8722; &#949;z"),
        ("hoisted", "hoisted: both forwards share it"),
        ("", "inputs, buffers and the rest"),
    )
    rows = [f'<tr><td colspan="2"><b>{escape(heading(scene))}</b></td></tr>']
    for key, words in colours:
        rows.append(
            f'<tr><td border="1" color="{LINE[key]}" bgcolor="{FILL[key]}" width="36"> </td>'
            f'<td align="left">{words}</td></tr>'
        )
    texts = (
        (f"<td>{bar(4)}</td>", "weight; length: square root of its bytes"),
        (f'<td><font color="{NOISE}">&#183;&#183;&#183;&#183;&gt;</font></td>', "noise inputs"),
        ("<td>&#8211; &#8211; &gt;</td>", "reshaped on the way"),
        ("<td><b>&#8212;&#8212;&gt;</b></td>", "from stage to stage"),
    )
    rows += [f'<tr>{cell}<td align="left">{words}</td></tr>' for cell, words in texts]
    seen = {what for i in scene.items.values() for what in i.moves}
    moves = (
        ("fetch", "weights arrive in slots of the device; below: the stream"),
        ("decode", "weights are read from their stored format, updated"),
        ("fold", "the last step's update is applied to the weights"),
        ("encode", "the new weights are put into their stored format"),
        ("write back", "the new weights leave; below: the stream"),
    )
    for what, words in moves:
        if what in seen:
            rows.append(
                f'<tr><td border="1" bgcolor="{MOVE[what]}">{what}</td>'
                f'<td align="left">{words}</td></tr>'
            )
    if any(e.port == "release" for e in scene.edges):
        mark = f'<font color="{SLOT}">&#8211; &#8211; &gt;</font>'
        rows.append(f'<tr><td>{mark}</td><td align="left">a released slot is filled anew</td></tr>')
    frame = 'border="1" cellborder="0" cellspacing="2" cellpadding="2" color="#999999"'
    return f"<<table {frame}>{''.join(rows)}</table>>"
