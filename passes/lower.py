"""lower: hand each distinct body to Inductor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch._inductor import standalone_compile

from zograph.ir import symbols
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.passes.normalize import expression
from zograph.passes.partition import form, structure

# Inductor would gather all materialize calls ahead of the matmuls that use them; the graph's
# own order lets perturbed copies die young.
KEEP_ORDER = {"reorder_for_locality": False, "reorder_for_peak_memory": False}


class CompiledBody(nn.Module):
    """A stage body and the code that Inductor made of it."""

    def __init__(self, body: fx.GraphModule, code: Any) -> None:
        super().__init__()
        self.body = body
        self.code = code

    def forward(self, *args: Any) -> Any:
        return self.code(*args)


@dataclass(frozen=True)
class Lower(Pass):
    """Compile every distinct body once, for all sizes that its symbols stand for.

    Before::

        %body_0: (f32[s0, 8], f32[s0, 8]) = body_0(%x, %w, ...)     # a graph of ATen calls

    After::

        %body_0: (f32[s0, 8], f32[s0, 8]) = body_0(%x, %w, ...)     # compiled code

    Requires: ``outlined``. Ensures: fact ``lowered``. Composite operators are decomposed
    here and nowhere earlier; the materialize operators stay opaque calls. With
    ``backend="eager"`` the bodies stay graphs, and so does one whose inputs' sizes Inductor cannot
    name. Numerics: reassociates. Cost: seconds per
    distinct body, none in a second process (Inductor's cache) or for a graph that was planned
    anew and cut alike. Raises: what Inductor raises.
    """

    name: ClassVar[str] = "lower"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"outlined"}),
        provides=frozenset({"lowered"}),
        numerics="reassociates",
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if ctx.backend == "eager":
            return PassResult(gm, False, ("backend is eager: bodies run as graphs",))
        bodies = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
        compiled = lowered = kept = 0
        for name in sorted(bodies):
            body = gm.get_submodule(name)
            if isinstance(body, fx.GraphModule) and not names_its_sizes(body):
                kept += 1
            elif isinstance(body, fx.GraphModule):
                key = body_form(body)
                if key not in ctx.lowered:
                    ctx.lowered[key] = compile_body(body)
                    compiled += 1
                gm.set_submodule(name, CompiledBody(body, ctx.lowered[key]))
                lowered += 1
        notes = [f"{compiled} bodies compiled"] if lowered else []
        if kept:
            notes.append(f"{kept} bodies run as graphs: a size of their inputs has no name")
        return PassResult(gm, bool(lowered), tuple(notes))


def names_its_sizes(body: fx.GraphModule) -> bool:
    """Whether every symbol in the inputs' sizes is the size of an input, as Inductor demands.

    A stage that is cut behind a flattened batch may take ``f32[s0*s1, 8]`` alone.
    """
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    tensors = [n.meta["val"] for n in inputs if isinstance(n.meta["val"], torch.Tensor)]
    sizes = [expression(s) for t in tensors for s in t.shape]
    named = {e for e in sizes if e is not None and e.is_symbol}
    return not set().union(*map(symbols, tensors)) - named


def body_form(body: fx.GraphModule) -> tuple[Any, ...]:
    """Describe a body up to the names of its nodes: equal forms compile to equal code."""
    nodes = list(body.graph.nodes)
    inputs = tuple(form(n.meta["val"]) for n in nodes if n.op == "placeholder")
    attributes = tuple(id(getattr(body, str(n.target))) for n in nodes if n.op == "get_attr")
    inside = [n for n in nodes if n.op not in ("placeholder", "get_attr", "output")]
    index = {n: i for i, n in enumerate(nodes)}
    uses = tuple(tuple(index[s] for s in n.all_input_nodes) for n in nodes)
    return inputs, attributes, structure(inside), uses


def compile_body(body: fx.GraphModule) -> Any:
    """Compile one body for the fake inputs that its placeholders carry."""
    copy = fx.GraphModule(body, fx.Graph())
    copy.graph = body.graph
    for node in copy.graph.nodes:  # where standalone_compile looks for the shape environment
        node.meta["example_value"] = node.meta["val"]
    inputs = [n.meta["val"] for n in copy.graph.nodes if n.op == "placeholder"]
    with torch.no_grad(), inductor_config.patch(KEEP_ORDER):
        return standalone_compile(copy, inputs, dynamic_shapes="from_graph")
