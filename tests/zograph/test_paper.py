"""Plans on paper: one capture for many budgets, and the same numbers as a real step's plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zograph
from tests.zoo import batch, build
from zograph.device import DeviceSpec
from zograph.errors import CaptureError, PlanError
from zograph.paper import Paper
from zograph.plans import Plan

CARD = DeviceSpec.preset("a100-40gb")


def config(layers: int = 2) -> transformers.OPTConfig:
    return transformers.OPTConfig(
        vocab_size=512, hidden_size=256, ffn_dim=1024, word_embed_proj_dim=256,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=64,
        dtype=torch.float16,
    )  # fmt: skip


def tokens(rows: int = 2, length: int = 64) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "labels": ids}


@cache
def paper(directions: int = 1) -> Paper:
    return Paper(config(), batch=tokens(), directions=directions)


def test_one_capture_serves_many_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[Any] = Counter()
    one = Paper(config(), batch=tokens())
    ways = one.ways(by_rows=False)
    outlined = ways.outlined
    ways.outlined = lambda cut: (calls.update([cut]), outlined(cut))[1]
    plans = {m: one.plan(m, CARD) for m in ("minimum", 2_600_000, None)}
    assert max(calls.values()) == 1
    assert plans["minimum"].device_bytes < plans[2_600_000].device_bytes <= 2_600_000
    assert plans[None].bytes_moved == {}
    again = {m: one.plan(m, CARD) for m in reversed(plans)}
    assert again == plans
    assert max(calls.values()) == 1


def test_sizes_that_weights_decide_have_no_plan() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.w
            return y[y > 0].square().mean()

    with pytest.raises(CaptureError, match="no budget can be planned"):
        Paper(Chosen(), batch={"x": torch.randn(4, 8)})


@pytest.mark.parametrize(
    "memory", [2_600_000, *(pytest.param(m, marks=pytest.mark.slow) for m in ("minimum", None))]
)
def test_plan_is_one_use_of_it(memory: Any) -> None:
    expected = zograph.plan(config(), batch=tokens(), memory=memory, device=CARD)
    assert paper().plan(memory, CARD) == expected


@pytest.mark.parametrize("memory", [200_000, pytest.param("minimum", marks=pytest.mark.slow)])
def test_a_real_step_has_the_same_plan(memory: Any) -> None:
    model, data = build("opt"), batch("opt", 4, 16)
    step = zograph.compile(model, memory=memory, device="cpu", backend="eager")
    step.prepare(**data)
    assert Paper(model, batch=data).plan(memory, step._graphs.spec) == step.plan


def test_frozen_tables_are_read_by_rows_where_a_step_does() -> None:
    model, data = build("opt"), batch("opt", 4, 16)
    model.model.decoder.embed_positions.weight.requires_grad_(False)
    one = Paper(model, batch=data)
    host = replace(CARD, kind="cpu")
    on_card, on_cpu = one.plan("minimum", CARD), one.plan("minimum", host)
    assert on_cpu.bytes_moved["to_device"] < on_card.bytes_moved["to_device"]


def test_links_change_times_and_nothing_else() -> None:
    slow, fast = (paper().plan("minimum", CARD.with_link(rate)) for rate in (1e9, 4e9))
    assert slow.transfer_seconds == pytest.approx(4 * fast.transfer_seconds)
    assert slow.step_seconds > fast.step_seconds
    same = [replace(p, step_seconds=0.0, overlap=0.0, busy={}, limiting="") for p in (slow, fast)]
    assert same[0] == same[1]


def test_budgets_are_kept_and_more_memory_is_no_slower() -> None:
    least = paper().plan("minimum", CARD)
    with pytest.raises(PlanError) as error:
        paper().plan(least.device_bytes - 1, CARD)
    assert error.value.minimum == least.device_bytes
    plans = [paper().plan(least.device_bytes + extra, CARD) for extra in (0, 10**6, 10**7)]
    for found, extra in zip(plans, (0, 10**6, 10**7), strict=True):
        assert found.device_bytes <= least.device_bytes + extra
        assert found.device_bytes == sum(found.items.values())
    assert plans[0].step_seconds >= plans[1].step_seconds >= plans[2].step_seconds


@pytest.mark.slow
def test_three_stages_in_a_row_hide_both_ways() -> None:
    one = Paper(config(16), batch=tokens())
    link = CARD.with_link(2e9)
    least = one.plan("minimum", link)
    block = max(n for n in least.items.values())
    found = one.plan(least.device_bytes + 5 * block, link)
    assert found.step_seconds < 1.1 * found.bound_seconds < 0.8 * least.step_seconds


def test_directions_share_the_transfers() -> None:
    one, two = (paper(n).plan("minimum", CARD) for n in (1, 2))
    assert one.bytes_moved == two.bytes_moved
    assert two.busy["compute"] == pytest.approx(2 * one.busy["compute"], rel=0.01)


def test_balance_makes_compute_as_long_as_transfer() -> None:
    spec = CARD.with_link(1e9)
    found = paper().plan("minimum", spec)
    compute = found.busy["compute"]
    assert found.balance == pytest.approx(found.transfer_seconds / compute)
    rest = compute - found.forward_seconds
    assert rest + found.batch_balance * found.forward_seconds == pytest.approx(
        found.transfer_seconds
    )
    assert Plan.to_json(found)["batch_balance"] == found.batch_balance


def test_items_by_hand() -> None:
    """A linear model whose every byte can be counted."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64, bias=False)
            self.b = nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)).sum()

    x = torch.zeros(8, 64)
    found = zograph.plan(Model(), batch={"x": x}, memory=None, device=CARD)
    weight, value = 64 * 64 * 4, 8 * 64 * 4
    assert found.items["resident weights"] == 2 * weight
    assert found.items["perturbed copies"] == 2 * weight
    assert found.items["slots"] == 0
    # both branches' first result and one second result
    assert found.items["activations"] in (2 * value, 3 * value, 3 * value + 4, 4 * value)
    least = zograph.plan(Model(), batch={"x": x}, memory="minimum", device=CARD)
    assert least.items["perturbed copies"] == weight
    assert least.items["slots"] == weight
    assert least.bytes_moved == {"to_device": 2 * weight, "to_host": 2 * weight}
    assert least.host_bytes == 2 * weight


def test_staging_of_the_disk_tier_counts_as_host_memory() -> None:
    found = paper().plan("minimum", CARD, "disk")
    unit = found.items["slots"]
    assert found.host_bytes == 4 * unit
    assert found.bytes_moved["write"] < found.disk_bytes / 2 < 1.05 * found.bytes_moved["write"]
