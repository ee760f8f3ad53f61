"""Entering the cells of a capture into its graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from zograph.fixed_points.nodes import fixed_point, options_of
from zograph.fixed_points.tracing import TracedCell
from zograph.ir import KEY, Kind, NodeMeta, meta, value


def enter_cells(gm: fx.GraphModule, cells: Sequence[TracedCell]) -> None:
    """Give every captured call of :func:`zograph.fixed_point` its cell as a subgraph.

    Before::

        %fixed_point: (f32[s0, 8], ...) = zograph.fixed_point([%z0], [%w, %x], 0)

    After::

        %cell = cell0
        %fixed_point: (f32[s0, 8], ...) = fixed_point(%cell, (%z0,), (%w, %x), solver='auto', ...)
    """
    calls = [n for n in gm.graph.nodes if n.target is torch.ops.zograph.fixed_point.default]
    for i, node in enumerate(calls):
        state, closed, number = node.args
        traced = cells[number]
        name, graph = f"cell_{i}", annotated(traced.graph, state, closed)
        first = next(n for n in gm.graph.nodes if n.op != "placeholder")
        with gm.graph.inserting_before(first):
            cell = cell_node(gm, gm.graph, name, graph, source=meta(node).source)
        node.target = fixed_point
        node.args = (cell, tuple(state), tuple(closed))
        node.kwargs = options_of(traced)
        node.meta["val"] = tuple(node.meta["val"])


def cell_node(
    root: nn.Module, graph: fx.Graph, name: str, cell: fx.GraphModule, *, source: str
) -> fx.Node:
    """Insert the node that stands for a cell, which becomes a submodule of `root`."""
    root.add_module(name, cell)
    node = graph.get_attr(name)
    node.meta = {"val": cell, KEY: NodeMeta(Kind.CELL, source=source)}
    return node


def annotated(
    cell: fx.GraphModule, state: Sequence[fx.Node], closed: Sequence[fx.Node]
) -> fx.GraphModule:
    """Give the nodes of a cell the metadata of a zograph graph; its inputs look like what it gets.

    The names of the inputs say nothing of the model: equal cells of equal blocks are shared.
    """
    names = [f"z{i}" for i in range(len(state))] + [f"c{i}" for i in range(len(closed))]
    given = iter(zip(names, [*state, *closed], strict=True))
    for node in cell.graph.nodes:
        val, name = node.meta.get("val"), None
        if node.op == "placeholder":
            name, operand = next(given)
            val = operand.meta["val"]
        node.meta = {"val": val, KEY: NodeMeta(name=name, source=f"capture<{node.name}")}
    out = cell.graph.output_node()
    out.meta = {"val": value(out.args[0]), KEY: NodeMeta(Kind.OUTPUT, source="capture")}
    return cell
