"""A schedule as a picture: streams as rows, tasks as boxes, time to the right, in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape

from zograph.schedule.result import Schedule, Span
from zograph.schedule.tasks import Stream, Task

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    "fetch": "#0072B2",
    "pass on": "#56B4E9",
    "fold": "#E69F00",
    "compute": "#009E73",
    "save": "#CC79A7",
    "write back": "#D55E00",
}
"""The kinds of tasks, see :func:`kind`."""
DARK, GREY, LIGHT = "#222222", "#555555", "#DDDDDD"
ON = {"fetch": "white", "compute": "white", "write back": "white"}
"""Colour of a name in a box, where it is not dark."""

WIDTH, LEFT, RIGHT = 1200, 150, 30
TOP, BAR, ROW, GAP, FOOT = 44, 18, 20, 10, 76
LETTER = 5.6
"""Pixels that a letter takes in a box, at most on average."""
SMALLEST = 0.3
"""Boxes narrower than this, in pixels, become one with their neighbours."""
TICKS = 10
NAMES = 12
"""How many names a box of several tasks shows when pointed at."""


@dataclass(frozen=True)
class Box:
    """Tasks that are drawn as one; mostly one task."""

    start: float
    end: float
    kind: str
    names: tuple[str, ...]
    longest: float = 0.0
    """Seconds of the task that gives the kind."""


@dataclass(frozen=True)
class Row:
    """A line of boxes."""

    label: str
    note: str
    boxes: list[Box]
    y: int


def kind(task: Task) -> str:
    """Return what a task does, a key of :data:`COLORS`.

    Examples
    --------
    >>> kind(Task("read 0", Stream.READ, 1.0, fills="u", loads=("w",)))
    'fetch'
    """
    if task.stream is Stream.COMPUTE:
        return "fold" if task.writes else "compute"
    if task.stream in (Stream.READ, Stream.TO_DEVICE):
        return "pass on" if task.reads else "fetch"
    return "save" if task.fills is not None else "write back"


def chart(schedule: Schedule, measured: Mapping[str, Span] | None = None) -> str:
    """Return the picture of one step as SVG text; equal input gives equal text.

    Parameters
    ----------
    schedule
        Its predicted timeline is drawn; zero is where the previous step's compute ended.
    measured
        Start and end of tasks in seconds on the same axis, drawn beneath the predicted ones.
        Tasks may be missing.

    Returns
    -------
    str
        A whole SVG document.
    """
    spans = {name: (schedule.start[name], schedule.end[name]) for name in schedule.dag}
    rows = []
    y = TOP
    for stream, names in schedule.order.items():
        both = [("predicted" if measured is not None else "", spans)]
        both += [("measured", dict(measured))] if measured is not None else []
        for i, (note, times) in enumerate(both):
            boxes = [
                Box(*times[name], kind(schedule.tasks[name]), (name,))
                for name in names
                if name in times
            ]
            rows.append(Row("" if i else stream.value.replace("_", " "), note, boxes, y))
            y += ROW
        y += GAP
    ends = [t for row in rows for box in row.boxes for t in (box.start, box.end)]
    low, high = min([0.0, *ends]), max([schedule.seconds, *ends])
    scale = (WIDTH - LEFT - RIGHT) / ((high - low) or 1.0)
    height = y + FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        text(12, 24, heading(schedule), 15),
        *axis(low, high, scale, y),
    ]
    for mark in dict.fromkeys((0.0, schedule.seconds)):
        x = LEFT + (mark - low) * scale
        lines.append(
            f'<line x1="{x:.2f}" y1="{TOP - 6}" x2="{x:.2f}" y2="{y}" stroke="{GREY}" '
            'stroke-dasharray="4 3"/>'
        )
    for row in rows:
        lines.append(text(12, row.y + 13, row.label, 12))
        lines.append(text(LEFT - 8, row.y + 13, row.note, 10, anchor="end", color=GREY))
        boxes = list(merged(row.boxes, SMALLEST / scale))
        for box, behind in zip(boxes, [*boxes[1:], None], strict=True):
            room = box.end if behind is None else min(box.end, behind.start)
            lines += drawn(box, LEFT + (box.start - low) * scale, row.y, scale, room)
    used = {kind(task) for task in schedule.tasks.values()}
    lines += [*legend(used, y + FOOT - 22), "</svg>"]
    return "\n".join(line for line in lines if line) + "\n"


def heading(schedule: Schedule) -> str:
    """Write the first line: how long, how much of it in parallel, and what limits it."""
    limiting = schedule.limiting
    return (
        f"step {duration(schedule.seconds)}, first step {duration(schedule.cold_seconds)}; "
        f"{schedule.overlap:.0%} of the transfer time under compute; limited by "
        f"{limiting.value.replace('_', ' ')} ({duration(schedule.busy.get(limiting, 0.0))} busy)"
    )


def duration(seconds: float) -> str:
    """Write a time with three digits.

    Examples
    --------
    >>> duration(93.4), duration(0.0021), duration(0)
    ('93.4 s', '2.1 ms', '0 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return "0 s" if seconds == 0 else f"{seconds:.1g} s"


def merged(boxes: list[Box], smallest: float) -> Iterator[Box]:
    """Yield the boxes in order of time, those too small to see as one with their neighbours.

    Examples
    --------
    >>> small = [Box(i, i + 1, "fold", (str(i),)) for i in range(4)]
    >>> [(box.start, box.end) for box in merged(small, smallest=1.5)]
    [(0, 2), (2, 4)]
    """
    run: Box | None = None
    for box in sorted(boxes, key=lambda b: (b.start, b.end)):
        seconds = box.end - box.start
        tiny = run is not None and max(seconds, run.end - run.start) < smallest
        if run is not None and tiny and box.start - run.end < smallest:
            run = replace(
                run,
                end=max(run.end, box.end),
                kind=box.kind if seconds > run.longest else run.kind,
                names=run.names + box.names,
                longest=max(seconds, run.longest),
            )
            continue
        if run is not None:
            yield run
        run = replace(box, longest=seconds)
    if run is not None:
        yield run


def drawn(box: Box, x: float, y: int, scale: float, room: float) -> Iterator[str]:
    """Yield the lines of a box, with its name if that fits before the time `room`."""
    width = max((box.end - box.start) * scale, SMALLEST)
    names = ", ".join(box.names[:NAMES])
    if len(box.names) > NAMES:
        names += f" and {len(box.names) - NAMES} more"
    times = f"{box.start:.6g} s to {box.end:.6g} s"
    edge = ' stroke="white" stroke-width="0.6"' if width >= 3 else ""
    yield (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{BAR}" fill="{COLORS[box.kind]}"'
        f"{edge}><title>{escape(names)}: {times}</title></rect>"
    )
    shown = (room - box.start) * scale
    if len(box.names) == 1 and shown >= LETTER * len(names) + 8:
        color = ON.get(box.kind, DARK)
        yield text(x + shown / 2, y + 13, names, 10, anchor="middle", color=color)


def axis(low: float, high: float, scale: float, y: int) -> Iterator[str]:
    """Yield the lines of the axis: a round number of seconds between the ticks."""
    rough = ((high - low) or 1.0) / TICKS
    power = math.floor(math.log10(rough))
    step = next(f for f in (1, 2, 5, 10) if f * 10**power >= rough * (1 - 1e-9)) * 10.0**power
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        x = LEFT + (i * step - low) * scale
        yield (f'<line x1="{x:.2f}" y1="{TOP}" x2="{x:.2f}" y2="{y + 4}" stroke="{LIGHT}"/>')
        yield text(x, y + 18, f"{i * step:.{digits}f}", 11, anchor="middle", color=GREY)
    yield text(12, y + 18, "seconds", 11, color=GREY)


def legend(used: set[str], y: int) -> Iterator[str]:
    """Yield the lines that explain the colours."""
    x = LEFT
    for name in COLORS:
        if name in used:
            yield f'<rect x="{x}" y="{y - 10}" width="14" height="12" fill="{COLORS[name]}"/>'
            yield text(x + 20, y, name, 11)
            x += 110
    yield (
        f'<line x1="{x + 7}" y1="{y - 11}" x2="{x + 7}" y2="{y + 3}" stroke="{GREY}" '
        'stroke-dasharray="4 3"/>'
    )
    yield text(x + 20, y, "compute of the step before ends, compute of this step ends", 11)


def text(
    x: float, y: float, words: str, size: int, *, anchor: str = "start", color: str = DARK
) -> str:
    """Return a text element, or nothing without words."""
    if not words:
        return ""
    place = f'x="{x:.2f}" y="{y:.2f}" font-size="{size}" text-anchor="{anchor}" fill="{color}"'
    return f"<text {place}>{escape(words)}</text>"
