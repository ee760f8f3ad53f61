"""What the meter says on fake tensors is what a real run takes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn
from torch.utils import _pytree as pytree

import zograph
import zograph.pool as pool_module
from tests.zograph.test_offload import budgets, compiled, new_model, usual
from zograph.graphs import key_tables
from zograph.ir import Kind, clone, info, meta, placeholders
from zograph.meter import Cost, Meter, measure, number, value_bytes
from zograph.passes import PassContext
from zograph.pipeline import default_passes
from zograph.pool import pool
from zograph.runtime import Runner
from zograph.testing import GraphBuilder

aten, zo = torch.ops.aten, torch.ops.zograph


def medium() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def prepared(name: str) -> tuple[zograph.ZOStep, dict[str, torch.Tensor]]:
    if name != "medium":
        return zograph.compile(new_model(name), backend="eager"), usual(name)(0)[0]
    ids = torch.arange(4 * 64).remainder(997).view(4, 64)
    step = zograph.compile(medium(), backend="eager")
    return step, {"input_ids": ids, "labels": ids}


@pytest.fixture(autouse=True)
def _exact_pool() -> Iterator[None]:
    """Under a limit the pool hands out what was asked for, as it does under a budget."""
    pool.clear()
    pool.bound(1 << 30)
    yield
    pool.bound(None)


class Metered(fx.Interpreter):
    """Runs an outlined graph on real tensors, a meter around every stage."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[str, list[Meter]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensors = tuple(x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor))
        with torch.no_grad(), Meter(tensors) as meter:
            out = super().call_module(target, args, kwargs)
        self.found.setdefault(str(target), []).append(meter)
        return out


@pytest.mark.parametrize(
    "name",
    ["opt", "toy", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "bert", "t5")),
     pytest.param("medium", marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.parametrize("cut", [None, 8192])
def test_the_peak_of_every_body_is_that_of_a_real_run(name: str, cut: int | None) -> None:
    step, batch = prepared(name)
    captured = step._graphs.training(batch)
    gm = clone(captured.capture.gm)
    for pass_ in default_passes().split("offload")[0]:
        gm = pass_.apply(gm, PassContext(cut=cut)).gm
        info(gm).facts |= pass_.contract.provides
    known = dict(step.model.named_parameters()) | dict(step.model.named_buffers())
    none = {"seeds": torch.int64, "coefs": torch.float32, "scales": torch.float32}
    noise: dict[str, torch.Tensor] = {n: torch.empty(0, dtype=d) for n, d in none.items()}
    noise |= {"seed": torch.tensor(3), "eps": torch.tensor(1e-3)} | key_tables(gm)
    leaves = step._graphs.leaves(captured, batch)
    sources = {Kind.INPUT: leaves, Kind.NOISE: noise, Kind.CONSTANT: captured.capture.constants}
    inputs = [sources.get(meta(n).kind, known)[str(meta(n).name)] for n in placeholders(gm)]
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    run = Metered(gm)
    run.run(*inputs)
    sizes = captured.frame(batch)
    compared = 0
    for target, meters in run.found.items():
        body = gm.get_submodule(target)
        assert isinstance(body, fx.GraphModule)
        cost = measure(body, sizes)
        for meter in meters:
            assert cost.peak_bytes == pytest.approx(meter.peak, rel=0.05), target
            assert cost.scratch_bytes == meter.scratch_peak
            assert cost.rest_bytes == pytest.approx(meter.rest_peak, rel=0.05)
            assert cost.noise == round(meter.noise)
            assert cost.copies == meter.copies
            compared += meter.peak > 0
    assert compared >= 3


@pytest.mark.parametrize(
    ("name", "memory", "storage"),
    [
        ("toy", "minimum", "host"),
        ("toy", "half", "disk"),
        pytest.param("opt", "half", "disk", marks=pytest.mark.slow),
        pytest.param("opt", "minimum", "host", marks=pytest.mark.slow),
        pytest.param("bert", "minimum", "disk", marks=pytest.mark.slow),
        pytest.param("t5", "minimum", "host", marks=pytest.mark.slow),
        pytest.param("llama", "whole", "disk", marks=pytest.mark.slow),
        pytest.param("medium", "minimum", "disk", marks=pytest.mark.slow),
    ],
)
def test_arena_and_live_activations_of_a_step_are_the_plans(
    name: str, memory: str, storage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    amount = memory if memory == "minimum" else budgets(name)[memory]
    if name == "medium":
        _, batch = prepared(name)
        step = zograph.compile(medium(), backend="eager", memory=amount, storage=storage)
    else:
        step, batch = compiled(name, memory=amount, storage=storage), usual(name)(0)[0]
    meters: list[Meter] = []
    body = Runner._run_body

    def metered(self: Runner, task: str) -> None:
        with meters[-1] if meters else nullcontext():
            body(self, task)

    monkeypatch.setattr(Runner, "_run_body", metered)
    step(**batch)
    runner = step._graphs.last.runner  # type: ignore[union-attr]
    runner.drain()
    slots, layout = runner.slots, info(step.graph).layout
    assert slots is not None
    assert layout is not None
    given = [*step.model.parameters(), *step.model.buffers(), *step._weights.held.values()]
    given += [*step._weights.constants.values(), *batch.values()]
    given += [slots.arena.weight(s, n) for s, n in slots.versions]
    meter = Meter(tuple(t.detach() for t in given if not t.is_meta))
    meters.append(meter)
    step(**batch)
    found = slots.arena.bytes + layout.held + layout.fixed + meter.most(layout.copies)
    assert meter.peak > 0
    assert found == pytest.approx(step.plan.device_bytes, rel=0.05)
    assert isinstance(amount, str) or step.plan.device_bytes <= amount


def test_kept_copies_ask_the_system_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, batch = prepared("medium")
    step = zograph.compile(medium(), backend="eager", memory=16_000_000)
    step(**batch)
    layout, asked = info(step.graph).layout, []
    assert layout is not None
    assert layout.slots > 0
    assert 0 < pool.bytes <= layout.copies
    original = pool_module.fresh
    monkeypatch.setattr(pool_module, "fresh", lambda n: asked.append(n) or original(n))
    step(**batch)
    assert asked == []
    tight = zograph.compile(medium(), backend="eager", memory="minimum")
    tight(**batch)
    assert len(asked) > 0
    step(**batch)  # each has what its own plan says
    asked.clear()
    step(**batch)
    assert asked == []
    tight.close()
    step.close()


def run(meter: Meter, function: Any) -> Any:
    with torch.no_grad(), meter:
        return function()


def test_live_bytes_come_and_go() -> None:
    x = torch.ones(1000)
    meter = Meter((x,))

    def body() -> torch.Tensor:
        a = x + 1  # 4000
        b = a + 1  # 8000
        del a
        c = b.view(10, 100)  # no memory of its own
        del b
        d = c * 2  # 8000
        del c
        return d.sum()  # 4004 with d

    out = run(meter, body)
    assert meter.peak == 8000
    assert meter.live == 4
    del out
    assert meter.live == 0
    assert [w[0] for w in meter.work] == ["float32"] * 4


def test_what_is_given_and_its_views_are_free() -> None:
    x = torch.ones(8, 8)
    meter = Meter((x,))
    run(meter, lambda: x.t().t().view(64))
    assert (meter.peak, meter.work) == (0, [])


def test_work_counts_products_and_traffic() -> None:
    x, w = torch.ones(4, 8), torch.ones(16, 8)
    meter = Meter((x, w))
    run(meter, lambda: aten.mm.default(x, w.t()))
    assert meter.work == [("float32", 2 * 4 * 8 * 16, 4 * (4 * 8 + 16 * 8 + 4 * 16))]


def test_copies_are_scratch_and_noise() -> None:
    b = GraphBuilder()
    w = b.param("w", (32, 32))
    empty = [b.input(n, (0,), d) for n, d in
             (("a", torch.int64), ("b", torch.float32), ("c", torch.float32))]  # fmt: skip
    rest = (b.input("k", (1, 2), torch.int64), 0, b.input("s", (), torch.int64), b.input("e", ()))
    pair = b.call(zo.materialize.default, w, *empty, *rest, torch.float32, "normal", True)
    one = b.call(zo.materialize_one.default, w, *empty, *rest, torch.bfloat16, "normal", True, 1)
    plus = b.call(aten.add.Tensor, b.call(operator.getitem, pair, 0), one)
    gm = b.build(b.call(aten.sum.default, plus))
    cost = measure(gm, {})
    full = 32 * 32 * 4
    assert cost.scratch_bytes == 2 * full + full // 2
    assert cost.copies == {full, full // 2}
    assert cost.noise == round(1.7 * 32 * 32)
    assert cost.result_bytes == 4
    assert cost.peak_bytes == 2 * full + full // 2  # the second copy dies unused


def test_sizes_are_the_batchs_own() -> None:
    b = GraphBuilder()
    x = b.input("x", ("batch", 8))
    gm = b.build(b.call(aten.sum.default, b.call(aten.exp.default, x)))
    (node, *_) = placeholders(gm)
    size = node.meta["val"].shape[0]
    for rows in (1, 3, 1000):
        sizes = {size.node.expr: rows}
        assert number(size * 2 + 1, sizes) == 2 * rows + 1
        assert value_bytes([node.meta["val"], 3], sizes) == rows * 32
        assert measure(gm, sizes).peak_bytes == rows * 32 + 4
    assert number(size, {}) == 5  # its hint
    assert Cost().peak_bytes == 0


def test_a_meter_touches_no_data() -> None:
    b = GraphBuilder()
    x = b.input("x", (1 << 20, 1 << 20))  # 4 TiB
    gm = b.build(b.call(aten.sum.default, b.call(aten.exp.default, x)))
    assert measure(gm, {}).peak_bytes == (1 << 42) + 4
