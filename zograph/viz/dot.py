"""Writes a scene in the dot language."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import graphviz

from zograph.viz import look
from zograph.viz.scene import Edge, Item, Scene


def digraph(scene: Scene) -> graphviz.Digraph:
    """Return the picture of a scene."""
    dot = graphviz.Digraph(
        "zograph", graph_attr=look.GRAPH, node_attr=look.NODE, edge_attr=look.EDGE
    )
    dot.node("legend", look.legend(scene), shape="plain")
    inside: dict[int | None, list[Item]] = {}
    for item in scene.items.values():
        inside.setdefault(item.stage if item.stage in scene.stages else None, []).append(item)
    loose = inside.pop(None, [])
    for item in loose:
        box(dot, scene, item)
    side_by_side(dot, loose)
    for number, stage in scene.stages.items():
        with dot.subgraph(name=f"cluster_{number}") as cluster:
            cluster.attr(label=look.title(stage), **look.CLUSTER)
            for item in inside.get(number, []):
                box(cluster, scene, item)
            side_by_side(cluster, inside.get(number, []))
            on_top(cluster, inside.get(number, []))
    if unused := scene.unused():
        with dot.subgraph(name="cluster_unused") as cluster:
            cluster.attr(label="no stage uses", **look.CLUSTER)
            box(cluster, scene, Item("unused", "weights", params=unused))
    for edge in scene.edges:
        arrow(dot, scene, edge)
    below_each_other(dot, scene)
    return dot


def side_by_side(dot: Any, items: list[Item]) -> None:
    """Place the two copies of an op in one row, + first where the layout allows it."""
    for one, other in pairwise(items):
        same = (one.kind, len(one.lines)) == (other.kind, len(other.lines))
        if same and (one.branch, other.branch) == ("+", "-"):
            with dot.subgraph() as rank:
                rank.attr(rank="same")
                rank.edge(one.id, other.id, style="invis")


def on_top(dot: Any, items: list[Item]) -> None:
    """Place what happens to a stage's weights above them."""
    for strip in items:
        for item in items:
            if strip.kind == "transfers" and item.kind == "weights":
                dot.edge(strip.id, item.id, style="invis")


def below_each_other(dot: Any, scene: Scene) -> None:
    """Keep the stages in their order, from top to bottom."""
    inner = [e for e in scene.edges if scene.items[e.source].stage == scene.items[e.target].stage]
    entered, left = {e.target for e in inner}, {e.source for e in inner}
    boxes = [i for i in scene.items.values() if i.kind != "transfers"]
    for above, below in pairwise(scene.stages):
        ends = [i.id for i in boxes if i.stage == above and i.id not in left]
        starts = [i.id for i in boxes if i.stage == below and i.id not in entered]
        for end, start in product(ends, starts):
            dot.edge(end, start, style="invis", weight="0")


def color_key(item: Item) -> str:
    """Return the key of a box's colours."""
    return item.branch or ("hoisted" if item.hoisted else "")


def box(dot: Any, scene: Scene, item: Item) -> None:
    """Write one node."""
    if item.kind == "weights":
        dot.node(item.id, look.weights(scene, item), shape="plain")
        return
    if item.kind == "transfers":
        dot.node(item.id, look.transfers(item), shape="plain")
        return
    key = color_key(item)
    lines = sorted(item.lines, key=look.noise_order) if item.kind == "noise" else list(item.lines)
    style = {"fillcolor": look.FILL[key], "color": look.LINE[key]}
    if item.kind == "op":
        sign = f" {look.minus(item.branch)}" if item.branch else ""
        lines = [look.chain(lines) + sign]
    elif item.kind == "noise":
        style = {"shape": "note", "style": "", "fontsize": "8", "color": look.NOISE}
    elif item.kind in ("input", "stored"):
        style |= {"shape": "ellipse" if item.kind == "input" else "folder"}
    elif item.kind == "entry":
        style = {"shape": "plaintext", "style": "", "fontcolor": look.LINE[key], "height": "0.15"}
    elif item.kind == "result":
        lines[0] = look.minus(lines[0])
        style |= {"shape": "box", "peripheries": "2", "fontsize": "13"}
    dot.node(item.id, graphviz.escape("\n".join(lines)), **style)


def arrow(dot: Any, scene: Scene, edge: Edge) -> None:
    """Write one edge."""
    source, target = scene.items[edge.source], scene.items[edge.target]
    if edge.port == "release":
        style = {"color": look.SLOT, "style": "dashed", "constraint": "false"}
        dot.edge(f"{edge.source}:release", f"{edge.target}:fetch", **style)
        return
    if source.kind == "noise":
        dot.edge(edge.source, edge.target, color=look.NOISE, style="dotted", arrowsize="0.4")
        return
    tail = {"+": ":p:s", "-": ":m:s"}.get(edge.port, "") if source.kind == "weights" else ""
    key = edge.port or color_key(source)
    style = {"color": look.LINE[key]}
    if edge.views:
        style |= {"style": "dashed", "tooltip": ", ".join(edge.views)}
    if source.stage != target.stage and source.kind in ("op", "weights"):
        style["penwidth"] = "2"
    elif {source.kind, target.kind} <= {"op", "entry"} and source.branch:
        style["weight"] = "4"
    dot.edge(f"{edge.source}{tail}", edge.target, **style)
