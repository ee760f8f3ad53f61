"""Budgets become layouts: exact minimum, more memory never moves more, by bytes alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import transformers
from torch import fx, nn

import zograph
from tests.conftest import SPEC
from tests.zograph.test_offload import compiled, data, usual
from zograph import planner
from zograph.errors import PlanError
from zograph.ir import clone, info
from zograph.layout import Layout
from zograph.meter import Sizes
from zograph.passes import PassContext
from zograph.pipeline import default_passes
from zograph.planner import Budget, Request, Ways, choose, in_order_of_worth
from zograph.stores.base import padded

PAGE = 4096


def deep(layers: int = 6) -> nn.Module:
    """Build an OPT whose weights outweigh its activations."""
    config = transformers.OPTConfig(
        vocab_size=99, hidden_size=64, ffn_dim=256, word_embed_proj_dim=64,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


Outlined = Callable[[int | None], fx.GraphModule]


@cache
def known(name: str) -> tuple[Outlined, Sizes]:
    """Return what the planner asks of a model, and the sizes of a batch."""
    step = zograph.compile(deep(), backend="eager") if name == "deep" else compiled(name)
    one = data("opt" if name == "deep" else name, 2, 8)
    captured = step._graphs.training(one)

    @cache
    def outlined(cut: int | None) -> fx.GraphModule:
        gm = clone(captured.capture.gm)
        for pass_ in default_passes().split("offload")[0]:
            gm = pass_.apply(gm, PassContext(cut=cut)).gm
            info(gm).facts |= pass_.contract.provides
        return gm

    return outlined, captured.frame(one)


def outlined(name: str) -> Outlined:
    return known(name)[0]


def request(
    name: str, budget: Budget, frames: int = 1, keep: frozenset[str] = frozenset()
) -> Request:
    return Request(budget, (known(name)[1],) * frames, "host", SPEC, keep)


@cache
def ways(name: str) -> Ways:
    return Ways(outlined(name), (known(name)[1],))


@cache
def chosen(name: str, budget: Budget) -> Layout:
    return planner.chosen(ways(name), request(name, budget))


def moved(name: str, layout: Layout) -> int:
    """Return the bytes that a step fetches and writes back."""
    params = info(outlined(name)(layout.cut)).params
    fetched = [n for u in layout.uses for n in u.weights if n not in layout.resident]
    written = {n for n in fetched if params[n].trainable}
    return sum(params[n].bytes for n in fetched) + sum(params[n].bytes for n in written)


def bounds(name: str) -> tuple[int, int]:
    return chosen(name, "minimum").device_bytes, chosen(name, None).device_bytes


@pytest.mark.parametrize("name", ["deep", "toy", pytest.param("t5", marks=pytest.mark.slow)])
def test_the_minimum_is_exact(name: str) -> None:
    least, whole = bounds(name)
    assert least < whole
    assert chosen(name, least).device_bytes <= least
    for budget in (least - 1, least // 2, 1):
        with pytest.raises(PlanError) as caught:
            chosen(name, budget)
        assert caught.value.minimum == least
        assert f"memory={budget:,} bytes is too small" in str(caught.value)
        assert f"needs {least:,} bytes at least" in str(caught.value)


def test_the_message_adds_up() -> None:
    least, _ = bounds("deep")
    with pytest.raises(PlanError) as caught:
        chosen("deep", least - 1)
    numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d", str(caught.value))]
    assert numbers[:2] == [least - 1, least]
    assert sum(numbers[-4:]) == least


def some_budgets(name: str) -> list[int]:
    least, whole = bounds(name)
    return [least + (whole - least) * i // 40 for i in range(41)]


@pytest.mark.parametrize("name", ["deep", "toy"])
def test_budgets_are_kept(name: str) -> None:
    for budget in some_budgets(name):
        layout = chosen(name, budget)
        assert layout.device_bytes <= budget
        assert layout.budget == budget
    assert moved(name, chosen(name, bounds(name)[1])) == 0
    assert moved(name, chosen(name, "minimum")) > 0


def test_no_limit_keeps_everything_and_cuts_nothing() -> None:
    for budget in (None, 1 << 40, bounds("deep")[1]):
        layout = chosen("deep", budget)
        assert (layout.cut, layout.pair, layout.slots) == (None, None, 0)
        assert layout.resident == set(info(outlined("deep")(None)).params)
        assert layout.held == sum(
            padded(p.bytes) for p in info(outlined("deep")(None)).params.values()
        )


def test_slots_hold_at_least_the_largest_stage() -> None:
    least, whole = bounds("deep")
    params = info(outlined("deep")(None)).params
    for i in range(11):
        layout = chosen("deep", least + (whole - least) * i // 10)
        streamed = [
            sum(padded(params[n].bytes) for n in u.weights if n not in layout.resident)
            for u in layout.uses
        ]
        assert layout.slots >= max(streamed)
        assert layout.slots % PAGE == 0 or layout.slots > max(streamed)


def test_what_stays_is_spread_over_the_stages() -> None:
    least, whole = bounds("deep")
    layout = next(
        found
        for i in range(40)
        if (found := chosen("deep", least + (whole - least) * i // 40)).cut is None
        and len(found.resident) > 24
    )
    params = info(outlined("deep")(None)).params
    repeated = [u.body for u in layout.uses]
    blocks = [u for u in layout.uses if repeated.count(u.body) > 1]
    shares = [
        sum(params[n].bytes for n in u.weights if n in layout.resident)
        / sum(params[n].bytes for n in u.weights)
        for u in blocks
    ]
    assert len(shares) == 6
    largest = max(padded(params[n].bytes) for u in blocks for n in u.weights)
    whole_block = sum(params[n].bytes for n in blocks[0].weights)
    assert max(shares) - min(shares) <= 1.5 * largest / whole_block
    assert 0 < sum(shares) / 6 < 1


def test_weights_of_several_visits_stay_first() -> None:
    whole = ways("toy").at(None)[0]
    request = Request(None, (), "host", SPEC)
    assert in_order_of_worth(whole, request)[0] == "table.weight"
    kept = replace(request, keep=frozenset({"spare"}))
    assert in_order_of_worth(whole, kept)[:2] == ["spare", "table.weight"]


def test_what_is_on_the_device_stays_where_it_can() -> None:
    least, whole = bounds("deep")
    budget = (least + whole) // 2
    usual_choice = chosen("deep", budget).resident
    params = info(outlined("deep")(None)).params
    other = min((n for n in params if n not in usual_choice), key=lambda n: params[n].bytes)
    layout = planner.chosen(ways("deep"), request("deep", budget, keep=frozenset({other})))
    assert other in layout.resident
    assert layout.device_bytes <= budget
    tight = planner.chosen(ways("deep"), request("deep", "minimum", keep=frozenset({other})))
    assert not tight.resident


def test_the_cut_depends_on_bytes_alone() -> None:
    least, whole = bounds("deep")
    slow = replace(SPEC, to_device=1.0, to_host=1.0, link_both=1.0, read=1.0, write=1.0)
    fast = replace(SPEC, gemm={"float32": 1.0}, bandwidth=1.0, noise=1.0)
    for i in range(0, 41, 8):
        budget = least + (whole - least) * i // 40
        expected = chosen("deep", budget)
        for spec in (slow, fast):
            for tier in ("host", "disk"):
                asked = replace(request("deep", budget), spec=spec, tier=tier)  # type: ignore[arg-type]
                found = planner.chosen(ways("deep"), asked)
                assert replace(found, spec=SPEC, tier="host") == expected


def test_finer_cuts_and_single_copies_come_with_less_memory() -> None:
    least, whole = bounds("deep")
    layouts = [chosen("deep", least + (whole - least) * i // 40) for i in range(41)]
    sizes = [1 << 60 if x.cut is None else x.cut for x in layouts]
    assert len(set(sizes)) >= 3
    assert sizes[0] == min(sizes)
    assert sizes[-1] == max(sizes)


def test_the_pair_limit_halves_the_largest_copy() -> None:
    layout = chosen("deep", "minimum")
    largest = max(n for u in layout.uses for n in u.cost.copies)
    scratch = max(u.cost.scratch_bytes for u in layout.uses)
    assert layout.pair is not None
    assert layout.pair < largest
    assert scratch < 2 * largest
    whole = chosen("deep", None)
    assert max(u.cost.scratch_bytes for u in whole.uses) >= 2 * largest


def test_copies_keep_their_memory_where_there_is_room() -> None:
    least, whole = bounds("deep")
    layouts = {b: chosen("deep", b) for b in range(least, whole + 1, (whole - least) // 40)}
    kept = {b: found for b, found in layouts.items() if found.copies}
    assert least not in kept
    assert len(kept) > 10
    for budget, found in kept.items():
        assert found.copies == max(u.cost.scratch_bytes for u in found.uses)
        assert found.peak == found.copies + max(u.rest for u in found.uses)
        assert found.slots < found.device_bytes <= budget
        gpu = replace(request("deep", budget), spec=replace(SPEC, kind="cuda"))
        assert planner.chosen(ways("deep"), gpu).copies == 0
        assert planner.chosen(ways("deep"), gpu).cut == found.cut
    all_stay = chosen("deep", whole)  # with room for each stage's own copies alone
    assert all_stay.copies == all_stay.slots == 0
    assert all_stay.held == chosen("deep", None).held


def test_more_forwards_need_more() -> None:
    one = choose(outlined("deep"), request("deep", "minimum")).device_bytes
    four = choose(outlined("deep"), request("deep", "minimum", frames=4)).device_bytes
    assert one < four < 4 * one


def test_steps_of_directions_and_batches_are_planned_together() -> None:
    def least(**options: int) -> int:
        step = compiled("toy", memory="minimum", **options)
        step.prepare(**usual("toy")(0)[0])
        return step.plan.device_bytes

    assert least() < least(directions=3)


def test_a_plan_agrees_with_its_layout_and_its_model() -> None:
    step = compiled("toy", memory="minimum")
    step.prepare(**usual("toy")(0)[0])
    layout, plan = info(step.graph).layout, step.plan
    assert layout is not None
    assert plan.device_bytes == layout.device_bytes == sum(plan.items.values())
    sizes = {n: p.numel() * 4 for n, p in step.model.named_parameters()}
    frozen = {n for n, p in step.model.named_parameters() if not p.requires_grad}
    tied = sizes["table.weight"]
    assert plan.bytes_moved["to_device"] == sum(sizes.values()) + tied
    assert plan.bytes_moved["to_host"] == sum(n for k, n in sizes.items() if k not in frozen)
    assert plan.parameters == len(sizes)
    assert plan.resident == 0
    assert 0 <= plan.overlap <= 1
    assert plan.step_seconds >= plan.bound_seconds > 0
