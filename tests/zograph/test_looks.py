"""Calls that look alike share a value while a step is planned, and only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from zograph.ir import call
from zograph.looks import shared_results

aten = torch.ops.aten


@pytest.fixture
def graph() -> fx.Graph:
    return fx.Graph()


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


def given(graph: fx.Graph, mode: FakeTensorMode, *shape: int, **options: Any) -> fx.Node:
    node = graph.placeholder("x")
    with mode:
        node.meta["val"] = torch.empty(shape, **options)
    return node


def value(node: fx.Node, target: Any, *args: Any) -> Any:
    return call(node.graph, target, (node, *args), source="test").meta["val"]


def test_equal_looks_share_a_value(graph: fx.Graph, mode: FakeTensorMode) -> None:
    x, y = given(graph, mode, 2, 3), given(graph, mode, 2, 3)
    with shared_results():
        first = value(x, aten.sum.dim_IntList, [0])
        assert value(y, aten.sum.dim_IntList, [0]) is first
        assert tuple(first.shape) == (3,)
        assert tuple(value(y, aten.sum.dim_IntList, [1]).shape) == (2,)
    assert value(x, aten.sum.dim_IntList, [0]) is not first


@pytest.mark.parametrize(
    "change",
    ["shape", "dtype", "strides", "offset", "kind of number"],
)
def test_what_a_call_can_see_tells_it_apart(
    change: str, graph: fx.Graph, mode: FakeTensorMode
) -> None:
    x, argument = given(graph, mode, 4, 4), 1
    y = given(graph, mode, 4, 5 if change == "shape" else 4)
    with mode:
        whole = torch.empty(5, 4)
        if change == "dtype":
            y.meta["val"] = torch.empty(4, 4, dtype=torch.int64)
        elif change == "strides":
            y.meta["val"] = torch.empty(4, 4).t()
        elif change == "offset":
            y.meta["val"] = whole[1:]
    other: Any = 1.0 if change == "kind of number" else argument
    with shared_results():
        first = value(x, aten.add.Tensor, argument)
        assert value(y, aten.add.Tensor, other) is not first
        assert value(x, aten.add.Tensor, argument) is first


def test_sizes_known_at_run_time_only_are_not_shared(graph: fx.Graph, mode: FakeTensorMode) -> None:
    x, y = given(graph, mode, 4), given(graph, mode, 4)
    with shared_results():
        rows = [value(n, aten.nonzero.default).shape[0].node.expr for n in (x, y)]
    assert rows[0] != rows[1]


def test_nothing_is_shared_behind_an_error(graph: fx.Graph, mode: FakeTensorMode) -> None:
    x = given(graph, mode, 2)
    with pytest.raises(RuntimeError, match="in the middle"), shared_results():
        raise RuntimeError("in the middle")
    assert value(x, aten.neg.default) is not value(x, aten.neg.default)
