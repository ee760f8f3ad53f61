"""The checks for passes are checked: each must be able to fail."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx

from zograph import ir, printer
from zograph.errors import PassError
from zograph.passes import Pass, PassContext, PassResult
from zograph.testing import (
    GraphBuilder,
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
    assert_rejects,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Nudge(Pass):
    """Replace relu by another operator, or add one each time."""

    target: object = aten.relu.default
    add: bool = False
    name: ClassVar[str] = "nudge"

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        found = [n for n in gm.graph.nodes if n.target is aten.relu.default]
        if not found:
            raise PassError("nudge: there is no relu in the graph")
        for node in found:
            if self.add:
                with gm.graph.inserting_after(node):
                    new = ir.call(gm.graph, aten.neg.default, (node,), source="nudge")
                node.replace_all_uses_with(new, delete_user_cb=lambda u, new=new: u is not new)
            else:
                node.target = self.target  # type: ignore[assignment]
        gm.recompile()
        return PassResult(gm, True)


def small(*, dead_input: bool = False) -> fx.GraphModule:
    b = GraphBuilder()
    x = b.input("x", (4, 3))
    y = b.call(aten.relu.default, x)
    if dead_input:
        y = b.call(aten.zeros_like.default, y)
    return b.build(b.call(aten.sum.default, y))


def rewritten(pass_: Pass, gm: fx.GraphModule) -> fx.GraphModule:
    return pass_.apply(copy.deepcopy(gm), PassContext()).gm


def test_equal_graphs() -> None:
    gm = small()
    assert_equivalent(gm, rewritten(Nudge(), gm))
    assert_equivalent(gm, copy.deepcopy(gm), bitwise=False, rtol=0.0)


def test_different_graphs_are_shown() -> None:
    gm = small()
    with pytest.raises(AssertionError, match=r"(?s)differ.*aten\.relu.*against.*aten\.abs"):
        assert_equivalent(gm, rewritten(Nudge(aten.abs.default), gm))


def test_tolerance_is_relative() -> None:
    def scaled(factor: float) -> fx.GraphModule:
        b = GraphBuilder()
        return b.build(b.call(aten.mul.Scalar, b.input("x", (8,)), factor))

    before, near, far = scaled(1.0), scaled(1 + 1e-6), scaled(1 + 1e-4)
    assert_equivalent(before, near, bitwise=False, rtol=1e-5)
    for after, bitwise in ((near, True), (far, False)):
        with pytest.raises(AssertionError, match="the graphs differ"):
            assert_equivalent(before, after, bitwise=bitwise, rtol=1e-5)


def test_nan_agrees_with_nothing() -> None:
    gm = small()
    nan = [torch.full((4, 3), float("nan"))]
    with pytest.raises(AssertionError):
        assert_equivalent(gm, copy.deepcopy(gm), nan)
    with pytest.raises(AssertionError):
        assert_equivalent(gm, copy.deepcopy(gm), nan, bitwise=False)


def test_a_check_that_cannot_fail_is_refused() -> None:
    gm = small(dead_input=True)
    with pytest.raises(AssertionError, match="the check cannot fail"):
        assert_equivalent(gm, copy.deepcopy(gm))
    live = small()
    with pytest.raises(AssertionError, match="the check cannot fail"):
        assert_equivalent(live, copy.deepcopy(live), control=dict)


def test_another_shape_or_count_differs() -> None:
    b = GraphBuilder()
    x = b.input("x", (4, 3))
    y = b.call(aten.relu.default, x)
    total = b.call(aten.sum.default, y)
    with pytest.raises(AssertionError, match="differ"):
        assert_equivalent(small(), b.build(total, y))


def test_idempotent_leaves_the_graph_alone() -> None:
    gm = small()
    before = printer.text(gm)
    assert_idempotent(Nudge(), gm)
    assert printer.text(gm) == before
    with pytest.raises(AssertionError, match="nudge changes its own result"):
        assert_idempotent(Nudge(add=True), gm)


def test_rejects() -> None:
    b = GraphBuilder()
    empty = b.build(b.call(aten.sum.default, b.input("x", (2,))))
    assert_rejects(Nudge(), empty, PassError, "no relu")
    with pytest.raises(pytest.fail.Exception):
        assert_rejects(Nudge(), small(), PassError, "no relu")


def test_node_delta() -> None:
    gm = small()
    assert_node_delta(gm, rewritten(Nudge(add=True), gm), added=1, removed=0)
    assert_node_delta(gm, rewritten(Nudge(aten.abs.default), gm), added=1, removed=1)
    with pytest.raises(AssertionError, match=r"\+1 -0 calls"):
        assert_node_delta(gm, rewritten(Nudge(add=True), gm), added=0, removed=0)
