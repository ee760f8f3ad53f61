"""lower: hand each distinct body to Inductor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from zograph.ir import symbols
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.passes.normalize import expression
from zograph.passes.partition import body_form
from zograph.printer import cell_of
from zograph.silence import silenced

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
    here and nowhere earlier; the materialize operators stay opaque calls. The body of a fixed
    point stays a graph, whose cell is compiled. With
    ``backend="eager"`` the bodies stay graphs, and so does one whose inputs' sizes Inductor cannot
    name. Numerics: reassociates. Cost: seconds per
    distinct body, none in a second process (Inductor's cache) or for a graph that was planned
    anew and cut alike. Raises: what Inductor raises.
    """

    bodies: bool = True
    """Whether bodies are compiled, or the cells in them alone."""

    name: ClassVar[str] = "lower"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"outlined"}),
        provides=frozenset({"lowered"}),
        numerics="reassociates",
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if ctx.backend == "eager":
            return PassResult(gm, False, ("backend is eager: bodies run as graphs",))
        graphs = Counter[str]()
        for owner, name in places(gm):
            if owner is gm and not self.bodies:
                continue
            graph = owner.get_submodule(name)
            if not isinstance(graph, fx.GraphModule):
                continue  # compiled already
            if not names_its_sizes(graph):
                graphs["kept"] += 1
                continue
            key = body_form(graph)
            if key not in ctx.lowered:
                ctx.lowered[key] = compile_body(graph)
                graphs["compiled"] += 1
            owner.set_submodule(name, CompiledBody(graph, ctx.lowered[key]))
            graphs["lowered"] += 1
        notes = [f"{graphs['compiled']} bodies compiled"] if graphs["lowered"] else []
        if kept := graphs["kept"]:
            notes.append(f"{kept} bodies run as graphs: a size of their inputs has no name")
        return PassResult(gm, bool(graphs["lowered"]), tuple(notes))


def places(gm: fx.GraphModule) -> list[tuple[fx.GraphModule, str]]:
    """List what is compiled, as graphs by owner and name: bodies, or where they have any, cells."""
    found: list[tuple[fx.GraphModule, str]] = []
    for name in sorted({str(n.target) for n in gm.graph.nodes if n.op == "call_module"}):
        body = gm.get_submodule(name)
        if isinstance(body, fx.GraphModule):
            cells = [n for n in body.graph.nodes if cell_of(body, n) is not None]
            found += [(body, str(n.target)) for n in cells] or [(gm, name)]
    return found


def names_its_sizes(body: fx.GraphModule) -> bool:
    """Whether every symbol in the inputs' sizes is the size of an input, as Inductor demands.

    A stage that is cut behind a flattened batch may take ``f32[s0*s1, 8]`` alone.
    """
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    tensors = [n.meta["val"] for n in inputs if isinstance(n.meta["val"], torch.Tensor)]
    sizes = [expression(s) for t in tensors for s in t.shape]
    named = {e for e in sizes if e is not None and e.is_symbol}
    return not set().union(*map(symbols, tensors)) - named


def compile_body(body: fx.GraphModule) -> Any:
    """Compile one body for the fake inputs that its placeholders carry."""
    from torch._inductor import config, standalone_compile  # slow to import

    copy = fx.GraphModule(body, fx.Graph())
    copy.graph = body.graph
    for node in copy.graph.nodes:  # where standalone_compile looks for the shape environment
        node.meta["example_value"] = node.meta.get("val")
    inputs = [n.meta["val"] for n in copy.graph.nodes if n.op == "placeholder"]
    # a body without kernels of its own cannot be saved, nor is it meant to be
    no_use = silenced("torch._inductor.standalone_compile", "artifact generation failed")
    with torch.no_grad(), config.patch(KEEP_ORDER), no_use:
        return standalone_compile(copy, inputs, dynamic_shapes="from_graph")
