from __future__ import annotations

import copy

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.graphs import block, two_blocks
from tests.zoo import batch, build, loss_fn
from zograph.ir import info, meta
from zograph.passes import Normalize, Partition, PassContext
from zograph.testing import (
    Golden,
    GraphBuilder,
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
    capture_function,
)
from zograph.verifier import Verifier

aten = torch.ops.aten


def test_golden_and_semantics(golden: Golden) -> None:
    gm = two_blocks()
    before = copy.deepcopy(gm)
    Partition().apply(gm, PassContext())
    golden.check(gm, "partition_after")
    assert info(gm).stages == {1: "stem", 2: "layers.0", 3: "layers.1", 4: "head"}
    assert_node_delta(before, gm, added=0, removed=0)
    assert_equivalent(before, gm)
    Verifier().check(gm, after="partition")


def test_idempotent() -> None:
    assert_idempotent(Partition(), two_blocks())


def test_a_model_without_blocks_is_one_stage() -> None:
    b = GraphBuilder()
    x = b.call(aten.linear.default, b.input("x", (2, 3)), b.param("w", (3, 3)))
    gm = b.build(b.call(aten.mean.default, x))
    Partition().apply(gm, PassContext())
    assert info(gm).stages == {1: "model"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opt", ["stem", "model.decoder.layers.0", "model.decoder.layers.1", "head"]),
        ("gpt2", ["stem", "transformer.h.0", "transformer.h.1", "head"]),
        ("cnn", ["model"]),
        (
            "bart",
            ["stem", *(f"model.{s}coder.layers.{i}" for s in ("en", "de") for i in "01"), "head"],
        ),
    ],
)
def test_blocks_of_real_models(name: str, expected: list[str]) -> None:
    gm = capture_function(build(name), loss_fn(name), **batch(name, 4, 16))
    Normalize().apply(gm, PassContext())
    Partition().apply(gm, PassContext())
    assert list(info(gm).stages.values()) == expected


def test_blocks_called_in_a_cycle_are_merged() -> None:
    b = GraphBuilder()
    x = b.input("x", (2, 4))
    for i in (0, 1, 0, 1):  # one call path per block, visited twice
        w = b.param(f"w{i}{x.name}", (4, 4))
        x = b.call(aten.linear.default, x, w, module=block(f"layers.{i}"))
    gm = b.build(b.call(aten.mean.default, x))
    Partition().apply(gm, PassContext())
    assert list(info(gm).stages.values()) == ["layers.0, layers.1", "head"]
    Verifier().check(gm, after="partition")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stages_of_random_graphs_grow_along_every_edge(data: st.DataObject) -> None:
    b = GraphBuilder()
    values = [b.input("x", (2, 2))]
    for i in range(data.draw(st.integers(2, 14))):
        left, right = (values[data.draw(st.integers(0, len(values) - 1))] for _ in "ab")
        place = data.draw(st.integers(0, 3))
        stack = block(f"layers.{place}") if place else ()
        w = b.param(f"w{i}", (2, 2))
        values.append(b.call(aten.addmm.default, left, right, w, module=stack))
    total = values[-1]
    for v in values[1:-1]:
        total = b.call(aten.add.Tensor, total, v)
    gm = b.build(total)
    before = copy.deepcopy(gm)
    Partition().apply(gm, PassContext())
    Verifier().check(gm, after="partition")
    edges = nx.DiGraph(
        (meta(s).stage, meta(n).stage)
        for n in gm.graph.nodes
        for s in n.all_input_nodes
        if meta(s).stage is not None and meta(n).stage not in (None, meta(s).stage)
    )
    assert nx.is_directed_acyclic_graph(edges)
    assert_equivalent(before, gm)
