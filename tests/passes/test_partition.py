from __future__ import annotations

import copy

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from tests.passes.graphs import DEEP, block, deep, two_blocks
from tests.zoo import batch, build, loss_fn
from zograph import printer
from zograph.ir import Kind, info, meta
from zograph.passes import Normalize, Partition, PassContext
from zograph.passes.partition import weight_only, weights_of
from zograph.pipeline import default_passes
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


def stage_bytes(gm: fx.GraphModule) -> dict[int, tuple[int, int]]:
    """Return, by stage, the bytes of its weights and of its hungriest operator's."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    alone = weight_only(nodes)
    held: dict[int, dict[fx.Node, int]] = {}
    most: dict[int, int] = {}
    for node in nodes:
        stage = meta(node).stage
        if stage is not None and node not in alone:
            found = weights_of(node, alone)
            held.setdefault(stage, {}).update(found)
            most[stage] = max(most.get(stage, 0), sum(found.values()))
    return {s: (sum(h.values()), most[s]) for s, h in held.items()}


def test_cut_golden_and_semantics(golden: Golden) -> None:
    gm = three_in_a_block()
    before = copy.deepcopy(gm)
    Partition().apply(gm, PassContext(cut=2 * 64))
    golden.check(gm, "partition_cut_after")
    assert list(info(gm).stages.values()) == [
        "layers.0, part 1 of 2", "layers.0, part 2 of 2",
        "layers.1, part 1 of 2", "layers.1, part 2 of 2", "head",
    ]  # fmt: skip
    assert_node_delta(before, gm, added=0, removed=0)
    assert_equivalent(before, gm)
    Verifier().check(gm, after="partition")
    assert_idempotent(Partition(), before, PassContext(cut=2 * 64))


def three_in_a_block() -> fx.GraphModule:
    """Build two blocks of three 64-byte weights, the last one used through its transpose."""
    b = GraphBuilder()
    x = b.input("x", (2, 4))
    for i in "01":
        stack = block(f"layers.{i}")
        for j in "ab":
            x = b.call(aten.linear.default, x, b.param(f"layers.{i}.{j}", (4, 4)), module=stack)
            x = b.call(aten.relu.default, x, module=stack)
        turned = b.call(aten.t.default, b.param(f"layers.{i}.c", (4, 4)), module=stack)
        x = b.call(aten.mm.default, x, turned, module=stack)
    return b.build(b.call(aten.mean.default, x), facts=("normalized",))


@pytest.mark.parametrize(
    ("cut", "stages"), [(0, 7), (1, 7), (64, 7), (127, 7), (128, 5), (191, 5), (192, 3), (999, 3)]
)
def test_cuts(cut: int, stages: int) -> None:
    gm = three_in_a_block()
    Partition().apply(gm, PassContext(cut=cut))
    assert len(info(gm).stages) == stages
    for held, most in stage_bytes(gm).values():
        assert held <= max(cut, most)
    turns = [n for n in gm.graph.nodes if n.target is aten.t.default]
    for node in turns:  # stands with the operator that uses it
        (user,) = node.users
        assert meta(node).stage == meta(user).stage


@pytest.mark.parametrize("cut", [4096, 9000])
@pytest.mark.parametrize("name", DEEP)
def test_equal_blocks_are_cut_equally(name: str, cut: int) -> None:
    def bodies(layers: int) -> tuple[int, int]:
        gm = deep(name, layers)
        for pass_ in default_passes().split("offload")[0]:
            gm = pass_.apply(gm, PassContext(cut=cut)).gm
            info(gm).facts |= pass_.contract.provides
        assert max(map(sum_of_weights, calls_of_stages(gm))) <= max(cut, 99 * 32 * 4)
        Verifier().check(gm, after="outline")
        return len(printer.bodies(gm)), len(calls_of_stages(gm))

    few, more = bodies(2), bodies(4)
    assert more[0] == few[0]
    assert more[1] > few[1]


def calls_of_stages(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if meta(n).kind == Kind.STAGE]


def sum_of_weights(node: fx.Node) -> int:
    values = [n.meta["val"] for n in node.all_input_nodes if meta(n).kind == Kind.PARAMETER]
    return sum(v.numel() * v.dtype.itemsize for v in values)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs_with_a_cut(data: st.DataObject) -> None:
    b = GraphBuilder()
    values = [b.input("x", (2, 2))]
    weights = [b.param(f"w{i}", (2, 2)) for i in range(6)]
    turned: dict[fx.Node, fx.Node] = {}
    for _ in range(data.draw(st.integers(2, 14))):
        left, right = (values[data.draw(st.integers(0, len(values) - 1))] for _ in "ab")
        place = data.draw(st.integers(0, 3))
        stack = block(f"layers.{place}") if place else ()
        w = weights[data.draw(st.integers(0, 5))]  # some are shared
        if data.draw(st.booleans()):
            if w not in turned:
                turned[w] = b.call(aten.t.default, w, module=stack)
            w = turned[w]
        values.append(b.call(aten.addmm.default, left, right, w, module=stack))
    total = values[-1]
    for v in values[1:-1]:
        total = b.call(aten.add.Tensor, total, v)
    gm = b.build(total)
    before = copy.deepcopy(gm)
    cut = data.draw(st.sampled_from([0, 16, 17, 32, 48, 1000]))
    Partition().apply(gm, PassContext(cut=cut))
    Verifier().check(gm, after="partition")
    for held, most in stage_bytes(gm).values():
        assert held <= max(cut, most)
    if cut == 1000:
        whole = copy.deepcopy(before)
        Partition().apply(whole, PassContext())
        assert len(info(whole).stages) == len(info(gm).stages)
    assert_equivalent(before, gm)
