"""hoist: what no trainable weight reaches is computed once and shared by both branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from zograph.ir import Kind, annotate, depends_on, info, meta, placeholders
from zograph.passes.base import Contract, Pass, PassContext, PassResult

PROLOGUE = 0
"""The stage of everything that depends on no parameter at all."""


@dataclass(frozen=True)
class Hoist(Pass):
    """Mark what depends on no trainable parameter; gather the weight-free part in stage 0.

    Before::

        %embedding: f32[s0, s1, 8] = aten.embedding(%wte, %ids)   # stage=1
        %arange: i64[s1] = aten.arange(%n)                        # stage=1

    After::

        %arange: i64[s1] = aten.arange(%n)                        # stage=0 hoisted
        %embedding: f32[s0, s1, 8] = aten.embedding(%wte, %ids)   # stage=1

    Requires: ``partitioned``. Ensures: fact ``hoisted``; hoisted nodes use hoisted nodes
    only; masks, positions and rotary tables stand in stage 0, ahead of every weight; what
    needs frozen weights stays in the stage that holds them. Numerics: bitwise.
    Cost: O(nodes). Raises: nothing.
    """

    name: ClassVar[str] = "hoist"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"partitioned"}), provides=frozenset({"hoisted"})
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        params = info(gm).params
        weights = placeholders(gm, Kind.PARAMETER)
        trainable = depends_on(n for n in weights if params[str(meta(n).name)].trainable)
        weighted = depends_on(weights)
        anchor = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
        marked = moved = 0
        for node in list(gm.graph.nodes):
            if node.op in ("placeholder", "output", "get_attr") or node in trainable:
                continue
            free = node not in weighted
            stage = PROLOGUE if free and meta(node).stage is not None else meta(node).stage
            if free:  # stable: ahead of the first node that stays, in the old order
                if node is anchor:
                    anchor = anchor.next
                else:
                    anchor.prepend(node)
            if not meta(node).hoisted or meta(node).stage != stage:
                marked += 1
                moved += free
                annotate(node, hoisted=True, stage=stage)
        if any(meta(n).stage == PROLOGUE for n in gm.graph.nodes):
            info(gm).stages.setdefault(PROLOGUE, "inputs")
        gm.recompile()
        notes = (f"{marked} nodes hoisted, {moved} of them into stage 0",) if marked else ()
        return PassResult(gm, bool(marked), notes)
