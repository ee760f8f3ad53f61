"""Makes a scene smaller: equal stages once, weights of one module and chains of ops together."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

from zograph.ir import Branch
from zograph.viz.scene import Edge, Item, Scene, Stage


def folded(scene: Scene) -> Scene:
    """Draw every run of consecutive stages of equal form as its first stage."""
    runs = [list(g) for _, g in groupby(scene.stages.values(), key=lambda s: s.form)]
    first: dict[int | None, int] = {s.number: run[0].number for run in runs for s in run}
    last = {run[0].number: run[-1].number for run in runs}

    def moved(name: str) -> str:
        item = scene.items[name]
        if item.stage not in first:
            return name
        return f"s{first[item.stage]}_{name.partition('_')[2]}"

    kept = {n: replace(i) for n, i in scene.items.items() if moved(n) == n}
    for item in kept.values():
        if item.stage in last and last[item.stage] != item.stage:
            span = f"{item.stage}-{last[item.stage]}"
            item.lines = [re.sub(rf"^keys\.{item.stage}\b", f"keys.{span}", t) for t in item.lines]
    stages = {run[0].number: merged(run) for run in runs}
    edges: dict[Edge, None] = {}
    for edge in scene.edges:
        one, other = scene.items[edge.source].stage, scene.items[edge.target].stage
        new = replace(edge, source=moved(edge.source), target=moved(edge.target))
        if one is not None and one in first and one != other and first[one] == first.get(other):
            stages[first[one]].chained = True
        elif {new.source, new.target} <= kept.keys():
            edges[new] = None
    return Scene(kept, edges, stages, scene.params)


def merged(run: list[Stage]) -> Stage:
    """Return one stage that stands for a run of them."""
    params = {n: p for s in run for n, p in s.params.items()}
    path = common_path([s.path for s in run])
    return replace(run[0], path=path, params=params, repeats=len(run))


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
