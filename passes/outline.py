"""outline: every stage becomes a call of a body, and equal stages share one body."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from zograph.ir import (
    KEY,
    Kind,
    NodeMeta,
    annotate,
    call,
    getitem,
    info,
    meta,
    module,
    output,
    placeholders,
    symbols,
)
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.passes.normalize import expression
from zograph.passes.partition import structure

SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Outline(Pass):
    """Move each stage into a submodule; identical stages call the same one.

    Before::

        %linear: f32[8, 8] = aten.linear(%x, %layers.0.w)       # stage=1
        %linear_1: f32[8, 8] = aten.linear(%linear, %layers.1.w) # stage=2

    After::

        %body_0: (f32[8, 8]) = body_0(%x, %layers.0.w)           # stage=1
        %getitem: f32[8, 8] = getitem(%body_0, 0)                # stage=1
        %body_0_1: (f32[8, 8]) = body_0(%getitem, %layers.1.w)   # stage=2

    Requires: ``partitioned``. Ensures: fact ``outlined``; the top graph holds stage calls,
    their results and size arithmetic; a body is a graph over its arguments alone, every
    symbolic size in it is the size of an argument or an argument. Numerics: bitwise.
    Cost: O(nodes); the number of distinct bodies does not grow with depth. Raises: nothing.
    """

    name: ClassVar[str] = "outline"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"partitioned"}), provides=frozenset({"outlined"})
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        stages: dict[int, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            record = meta(node)
            if record.stage is not None and record.kind == Kind.OP and record.source != "outline":
                stages.setdefault(record.stage, []).append(node)
        bodies: dict[Any, str] = {}
        for stage, nodes in stages.items():
            outline_stage(gm, stage, nodes, bodies)
        info(gm).stages = {s: n for s, n in info(gm).stages.items() if s in stages or not stages}
        gm.recompile()
        note = f"{len(stages)} stages, {len(bodies)} distinct bodies"
        return PassResult(gm, bool(stages), (note,) if stages else ())


def outline_stage(
    gm: fx.GraphModule, stage: int, nodes: list[fx.Node], bodies: dict[Any, str]
) -> None:
    """Replace the nodes of one stage by a call of its body."""
    inside = set(nodes)
    external = dict.fromkeys(
        s for n in nodes for s in n.all_input_nodes if s not in inside and s.op != "get_attr"
    )
    inputs = [*external, *missing_sizes(gm, external, nodes)]
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    index = {n: i for i, n in enumerate(nodes)}
    form = (structure(nodes), tuple(index[n] for n in outputs), len(inputs))
    if form not in bodies:
        bodies[form] = f"body_{len(bodies)}"
        gm.add_submodule(bodies[form], make_body(gm, nodes, inputs, outputs))
    with gm.graph.inserting_before(nodes[0]):
        run = gm.graph.call_module(bodies[form], tuple(inputs))
    run.meta["val"] = tuple(n.meta["val"] for n in outputs)
    run.meta[KEY] = NodeMeta(kind=Kind.STAGE, stage=stage, source="outline")
    if all(meta(n).hoisted for n in nodes):
        annotate(run, hoisted=True)
    with gm.graph.inserting_after(run):
        for i, node in reversed(list(enumerate(outputs))):
            item = getitem(gm.graph, run, i)
            item.meta["val"], item.meta[KEY] = node.meta["val"], meta(node)
            annotate(item, source="outline")
            node.replace_all_uses_with(item, delete_user_cb=lambda u: u not in inside)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def missing_sizes(
    gm: fx.GraphModule, inputs: Iterable[fx.Node], nodes: list[fx.Node]
) -> list[fx.Node]:
    """Return the size readers that a body needs beside its inputs to know every symbol."""
    bound: set[Any] = set()
    for node in inputs:
        val = node.meta["val"]
        sizes = val.shape if isinstance(val, torch.Tensor) else (val,)
        exprs = [s.node.expr for s in sizes if isinstance(s, torch.SymInt)]
        bound |= {e for e in exprs if e.is_symbol}
    wanted: set[Any] = set()
    for node in (*inputs, *nodes):
        wanted |= symbols(node.meta["val"])
    return [n for e in sorted(wanted - bound, key=str) if (n := reader(gm, e)) is not None]


def reader(gm: fx.GraphModule, symbol: Any) -> fx.Node | None:
    """Return the node that reads a symbol off an input, made where there is none yet."""
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    known = [n for n in gm.graph.nodes if n.target is SIZE]
    found = next((n for n in known if expression(n.meta["val"]) == symbol), None)
    for source in placeholders(gm, Kind.INPUT):
        val = source.meta["val"]
        for dim, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            if found is None and expression(size) == symbol:
                with gm.graph.inserting_before(first):
                    found = call(gm.graph, SIZE, (source, dim), source="outline")
    return found


def make_body(
    gm: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.GraphModule:
    """Copy nodes into a graph of their own, with a placeholder per input."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {"val": node.meta["val"], KEY: meta(node)}
    attributes = {s for n in nodes for s in n.all_input_nodes if s.op == "get_attr"}
    root = torch.nn.Module()
    for node in attributes:
        setattr(root, str(node.target), getattr(gm, str(node.target)))
        env[node] = graph.node_copy(node)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    out = graph.output(tuple(env[n] for n in outputs))
    out.meta = {"val": tuple(n.meta["val"] for n in outputs), KEY: meta(output(gm))}
    body = module(root, graph)
    body.meta[KEY] = info(gm)
    return body
