"""Makes a scene smaller: equal stages once, weights of one module and chains of ops together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from zograph.ir import Branch
from zograph.viz.scene import Edge, Item, Move, Scene, Stage

LONGEST = 24
"""Stages of the longest cycle that is looked for."""


@dataclass(frozen=True)
class Place:
    """Where a stage stands in a run of equal cycles of stages."""

    run: int
    cycle: int
    first: int
    """The number of the stage that stands for it."""


def folded(scene: Scene) -> Scene:
    """Draw every run of equal stages, or of equal cycles of stages, as its first cycle."""
    runs = list(cycles(list(scene.stages.values())))
    places: dict[int | None, Place] = {}
    for number, run in enumerate(runs):
        for cycle, stages_of in enumerate(run):
            for stage, one in zip(stages_of, run[0], strict=True):
                places[stage.number] = Place(number, cycle, one.number)

    def moved(name: str) -> str:
        place = places.get(scene.items[name].stage)
        return name if place is None else f"s{place.first}_{name.partition('_')[2]}"

    kept = {n: replace(i) for n, i in scene.items.items() if moved(n) == n}
    stages: dict[int, Stage] = {}
    for run in runs:
        for alike in zip(*run, strict=True):
            stage = stages[alike[0].number] = merged(alike, step=len(run[0]))
            if strip := merged_moves([scene.items.get(f"s{s.number}_moves") for s in alike]):
                name = f"s{stage.number}_moves"
                kept[name] = replace(strip, id=name, stage=stage.number)
    for item in kept.values():
        stage_of = stages.get(-1 if item.stage is None else item.stage)
        if stage_of is not None and stage_of.repeats > 1:
            key, span = rf"^keys\.{item.stage}\b", f"keys.{stage_of.numbers()}"
            item.lines = [re.sub(key, span, t) for t in item.lines]
    edges: dict[Edge, None] = {}
    for edge in scene.edges:
        here = places.get(scene.items[edge.source].stage)
        there = places.get(scene.items[edge.target].stage)
        new = replace(edge, source=moved(edge.source), target=moved(edge.target))
        if here is not None and there is not None and between_cycles(here, there):
            stages[here.first].chained |= edge.port != "release"
            stages[here.first].refills |= edge.port == "release"
        elif {new.source, new.target} <= kept.keys():
            edges[new] = None
    return Scene(kept, edges, stages, scene.params)


def between_cycles(one: Place, other: Place) -> bool:
    """Return whether two stages belong to different cycles of one run."""
    return one.run == other.run and one.cycle != other.cycle


def cycles(stages: list[Stage]) -> Iterator[list[list[Stage]]]:
    """Split stages into runs of equal cycles; what does not repeat is a run of one cycle.

    Of several ways, the one that covers most stages, then the one with the shortest cycle.
    """
    forms = [s.form for s in stages]
    at = 0
    while at < len(stages):
        best = (1, 1)
        for length in range(1, min(LONGEST, (len(stages) - at) // 2) + 1):
            one, count = forms[at : at + length], 1
            while forms[at + count * length : at + (count + 1) * length] == one:
                count += 1
            if count > 1 and length * count > best[0] * best[1]:
                best = (length, count)
        length, count = best
        yield [stages[at + i * length : at + (i + 1) * length] for i in range(count)]
        at += length * count


def merged(run: Sequence[Stage], step: int) -> Stage:
    """Return one stage that stands for others, each `step` stages behind the one before."""
    params = {n: p for s in run for n, p in s.params.items()}
    path = common_path([s.path for s in run])
    return replace(run[0], path=path, params=params, repeats=len(run), step=step)


def merged_moves(strips: list[Item | None]) -> Item | None:
    """Return one box for what happens to the weights of a run of stages, None if nothing does."""
    known = [s for s in strips if s is not None]
    if not known:
        return None
    order = ("fetch", "wait", "decode", "fold", "encode", "write back", "release")
    moves: dict[str, Move] = {}
    for what in order:
        found = [s.moves.get(what) if s is not None else None for s in strips]
        if some := [m for m in found if m is not None]:
            low = min(m.low for m in some) if len(some) == len(found) else 0
            moves[what] = replace(some[0], low=low, high=max(m.high for m in some))
    return replace(known[0], moves=moves)


def common_path(paths: list[str]) -> str:
    """Write N for the number in which paths differ: ``layers.0``, ``layers.1`` -> ``layers.N``.

    Examples
    --------
    >>> common_path(["h.0.mlp", "h.1.mlp"])
    'h.N.mlp'
    >>> common_path(["stem", "head"])
    'stem .. head'
    """
    atoms = [re.split(r"(\d+)", p) for p in paths]
    if len({len(a) for a in atoms}) > 1:
        return paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"
    differ = [len(set(column)) > 1 for column in zip(*atoms, strict=True)]
    if any(d and i % 2 == 0 for i, d in enumerate(differ)):
        return f"{paths[0]} .. {paths[-1]}"
    return "".join("N" if d else a for a, d in zip(atoms[0], differ, strict=True))


def compact(scene: Scene) -> Scene:
    """Merge the boxes that are read as one, and what enters a stage more than once."""
    return entered(chained(grouped(scene)))


def grouped(scene: Scene) -> Scene:
    """Put weights of one module that the same ops use into one box."""
    users: dict[str, frozenset[str]] = {}
    for edge in scene.edges:
        users[edge.source] = users.get(edge.source, frozenset()) | {edge.target}
    boxes: dict[object, Item] = {}
    into: dict[str, str] = {}
    for item in scene.items.values():
        if item.kind != "weights" or item.rows:
            continue
        module = item.params[0].name.rpartition(".")[0]
        key = (item.stage, module, tuple(item.ports), users.get(item.id))
        box = boxes.setdefault(key, item)
        if box is not item:
            boxes[key] = into_box = replace(box, params=[*box.params, *item.params])
            into[item.id] = into_box.id
    items = {n: i for n, i in scene.items.items() if n not in into}
    items.update((box.id, box) for box in boxes.values())
    return renamed(scene, items, lambda name: into.get(name, name))


def chained(scene: Scene) -> Scene:
    """Put ops that only pass one value on into one box, a line each."""
    sources: dict[str, set[str]] = {}
    targets: dict[str, set[str]] = {}
    for edge in scene.edges:
        sources.setdefault(edge.target, set()).add(edge.source)
        targets.setdefault(edge.source, set()).add(edge.target)
    items = dict(scene.items)
    head: dict[str, str] = {}
    for item in scene.items.values():
        before = sources.get(item.id, set())
        if item.kind != "op" or len(before) != 1:
            continue
        (one,) = before
        previous = scene.items[one]
        alike = (previous.stage, previous.branch, previous.hoisted, previous.kind) == (
            item.stage, item.branch, item.hoisted, item.kind,
        )  # fmt: skip
        if alike and targets[one] == {item.id}:
            name = head[item.id] = head.get(one, one)
            items[name] = replace(items[name], lines=[*items[name].lines, *item.lines])
            del items[item.id]
    return renamed(scene, items, lambda name: head.get(name, name))


def entered(scene: Scene) -> Scene:
    """Let each value enter a stage once, by a small box that shows its type."""
    items, edges = dict(scene.items), dict[Edge, None]()
    for edge in scene.edges:
        source, stage = items[edge.source], items[edge.target].stage
        if source.kind not in ("op", "weights") or stage in (None, source.stage):
            edges[edge] = None
            continue
        name = f"e{stage}_{edge.source}{edge.port}_{'_'.join(edge.views)}"
        if name not in items:
            branch: Branch | None = "+" if edge.port == "+" else "-" if edge.port else source.branch
            items[name] = Item(name, "entry", stage, branch, source.hoisted, [edge.type])
        edges[replace(edge, target=name)] = None
        edges[Edge(name, edge.target)] = None
    return replace(scene, items=items, edges=edges)


def renamed(scene: Scene, items: dict[str, Item], name: Callable[[str], str]) -> Scene:
    """Return the scene with other boxes, its arrows between the new names."""
    edges: dict[Edge, None] = {}
    for edge in scene.edges:
        new = replace(edge, source=name(edge.source), target=name(edge.target))
        source = items[new.source]
        if source.kind == "weights" and source.stage == items[new.target].stage:
            new = replace(new, type="", views=())
        if new.source != new.target:
            edges[new] = None
    return replace(scene, items=items, edges=edges)
