"""trial: a graph that measures what the solvers of its fixed points would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from zograph.fixed_points.nodes import trial_solve
from zograph.ir import annotate, call, getitem, info, output
from zograph.passes.anderson import open_points
from zograph.passes.base import Contract, Pass, PassContext, PassResult


@dataclass(frozen=True)
class Trial(Pass):
    """Solve every fixed point whose solver is open in both ways, and return what that took.

    Before::

        %fixed_point: (f32[s0, 8], ...) = fixed_point(%cell, (%z0,), (%w,), solver='auto', ...)
        ...
        return (%loss, ...)

    After::

        %trial_solve: (f32[s0, 8], ..., f64[2, 3]) = trial_solve(%cell, (%z0,), (%w,), ...)
        %getitem: f64[2, 3] = getitem(%trial_solve, 4)
        return (%getitem,)

    It is no pass of a step: :meth:`zograph.pipeline.Pipeline.for_trial` puts it into the pipeline
    of a graph that runs once, ahead of the first step (docs/decisions/015-auto-measures.md). Open
    is what says ``solver="auto"`` and is not among the context's `solvers`. What comes behind the
    last of them is dropped. A result's metadata has the name of its fixed point.

    Requires: ``normalized``. Forbids: ``partitioned``. Numerics: changes, as the graph computes
    something else. Cost: O(nodes).
    """

    name: ClassVar[str] = "trial"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"normalized"}),
        forbids=frozenset({"partitioned"}),
        numerics="changes",
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        points = open_points(gm, ctx.solvers)
        if not points:
            return PassResult(gm, False)
        findings = [measured(gm, node, name) for node, name in points.items()]
        output(gm).args = (tuple(findings),)
        info(gm).has_loss = False
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return PassResult(gm, True, (f"{len(findings)} fixed points are measured",))


def measured(gm: fx.GraphModule, node: fx.Node, name: str) -> fx.Node:
    """Replace an open fixed point by a trial of both solvers; return the node of its findings."""
    options = {k: v for k, v in node.kwargs.items() if k != "solver"}
    with gm.graph.inserting_before(node):
        solve = call(
            gm.graph, trial_solve, node.args, options, source=f"trial<{node.name}", like=node
        )
        findings = getitem(gm.graph, solve, len(node.meta["val"]))
    annotate(findings, name=name)
    node.replace_all_uses_with(solve)
    gm.graph.erase_node(node)
    return findings
