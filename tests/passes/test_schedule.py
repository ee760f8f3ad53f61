from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import fx

from tests.passes.graphs import two_blocks
from tests.passes.test_offload import (
    RESIDENT,
    bound,
    calls,
    context,
    hand_made,
    offloaded,
    outlined,
)
from zograph import printer
from zograph.errors import PipelineError
from zograph.ir import Kind, info, meta, placeholders
from zograph.passes import Offload, PassContext, Schedule
from zograph.pipeline import Pipeline
from zograph.schedule import CapacityError, Stream, races
from zograph.testing import Golden, assert_idempotent, assert_node_delta, run_graph
from zograph.transfers import FETCH, RELEASE
from zograph.verifier import Verifier

PAGES = 4096


def scheduled(
    *resident: str, slots: int, tier: str = "host", kind: str = "cpu"
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return the graph before and after the pass."""
    gm = outlined()
    layout = hand_made(gm, *resident, slots=slots)
    spec = replace(layout.spec, kind=kind)  # type: ignore[arg-type]
    ctx = PassContext(layout=replace(layout, tier=tier, spec=spec))  # type: ignore[arg-type]
    gm = offloaded(gm, *resident)
    before = copy.deepcopy(gm)
    Schedule().apply(gm, ctx)
    info(gm).facts |= Schedule.contract.provides
    return before, gm


def test_golden_and_node_delta(golden: Golden) -> None:
    before, gm = scheduled(*RESIDENT, slots=2 * PAGES)
    golden.check(gm, "schedule_after")
    assert_node_delta(before, gm, added=0, removed=0)
    Verifier().check(gm, after="schedule")
    assert not races(info(gm).schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [2, 3, 4, 8])
@pytest.mark.parametrize("resident", [(), RESIDENT])
def test_semantics(resident: tuple[str, ...], slots: int) -> None:
    before, gm = scheduled(*resident, slots=slots * PAGES)
    terms = {"seeds": [3], "coefs": [0.1], "scales": [0.9]}
    values = bound(gm, **terms)  # type: ignore[arg-type]
    assert [meta(n).name for n in placeholders(before)] == list(values)
    expected, found = (run_graph(g, list(values.values())) for g in (before, gm))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    values["layers.1.w"] = values["layers.1.w"] * 1.001
    assert not torch.equal(run_graph(gm, list(values.values()))[0], expected[0])


def test_fetches_move_up_to_where_their_slot_is_free() -> None:
    def ahead(slots: int) -> int:
        """Count the fetches that stand ahead of the body before theirs."""
        _, gm = scheduled(slots=slots * PAGES)
        place = {n: i for i, n in enumerate(gm.graph.nodes)}
        body = {meta(n).stage: n for n in gm.graph.nodes if meta(n).kind == Kind.STAGE}
        fetches = {meta(n).stage: n for n in calls(gm, FETCH)}
        return sum(place[fetches[s]] < place[body[s - 1]] for s in (2, 3, 4))

    assert ahead(2) == 0
    assert ahead(8) == 3


def test_a_fetch_uses_the_releases_whose_slots_it_fills() -> None:
    _, gm = scheduled(slots=2 * PAGES)  # one block's weights at a time
    found = info(gm).schedule
    assert found is not None
    releases = {meta(n).stage: n for n in calls(gm, RELEASE)}
    seen = []
    for fetch in calls(gm, FETCH):
        stage = meta(fetch).stage
        first, last = found.offsets[str(stage)], found.units[str(stage)].bytes
        last += first
        tokens = fetch.args[1]
        for token in tokens:
            other = str(meta(token).stage)
            assert token is releases[meta(token).stage]
            assert found.offsets[other] < last
            assert first < found.offsets[other] + found.units[other].bytes
        seen.append(len(tokens))
    assert seen[0] == 0
    assert sum(seen) >= 3
    _, gm = scheduled(slots=8 * PAGES)
    assert not any(n.args[1] for n in calls(gm, FETCH))


@pytest.mark.parametrize("slots", [2, 3, 4, 6, 8])
def test_slots_stay_within_the_layout(slots: int) -> None:
    _, gm = scheduled(slots=slots * PAGES)
    found = info(gm).schedule
    assert found is not None
    assert found.capacity == {"device": slots * PAGES}
    assert found.peak["device"] <= slots * PAGES
    assert {len(u.name) for u in found.units.values()} == {1}
    assert {n: u.bytes for n, u in found.units.items()} == {
        "1": PAGES, "2": 2 * PAGES, "3": 2 * PAGES, "4": PAGES,
    }  # fmt: skip


def test_too_few_slots_for_a_stage_are_refused() -> None:
    with pytest.raises(CapacityError, match="needs at least 8192"):
        scheduled(slots=PAGES)


@pytest.mark.parametrize(
    ("tier", "kind", "streams"),
    [
        ("host", "cpu", {Stream.TO_DEVICE, Stream.TO_HOST}),
        ("disk", "cpu", {Stream.READ, Stream.WRITE}),
        ("host", "cuda", {Stream.TO_DEVICE, Stream.TO_HOST}),
        ("disk", "cuda", set(Stream) - {Stream.COMPUTE}),
    ],
)
def test_streams(tier: str, kind: str, streams: set[Stream]) -> None:
    _, gm = scheduled(slots=4 * PAGES, tier=tier, kind=kind)
    found = info(gm).schedule
    assert found is not None
    assert {s for s, names in found.order.items() if names} == streams | {Stream.COMPUTE}
    staged = streams > {Stream.READ, Stream.TO_DEVICE}
    assert ("staging" in found.capacity) == staged
    assert not races(found)
    Verifier().check(gm, after="schedule")


def test_two_runs_give_one_schedule() -> None:
    first, second = (scheduled(*RESIDENT, slots=3 * PAGES)[1] for _ in "ab")
    assert printer.text(first) == printer.text(second)
    a, b = info(first).schedule, info(second).schedule
    assert a is not None
    assert b is not None
    assert (a.order, a.events, a.offsets, a.ahead) == (b.order, b.events, b.offsets, b.ahead)


def test_idempotent() -> None:
    gm = outlined()
    ctx = context(gm, *RESIDENT)
    Offload().apply(gm, ctx)
    assert_idempotent(Schedule(), gm, ctx)
    Schedule().apply(gm, ctx)
    result = Schedule().apply(gm, ctx)
    assert (result.modified, result.notes) == (False, ("already scheduled",))


def test_notes() -> None:
    gm = outlined()
    ctx = context(gm, slots=2 * PAGES)
    Offload().apply(gm, ctx)
    (note,) = Schedule().apply(gm, ctx).notes
    assert note == "15 tasks, 3 slots filled anew"  # 4 fetches, 3 folds, 3 write-backs, 5 bodies


def test_nothing_to_order_where_all_stays() -> None:
    gm = outlined()
    Offload().apply(gm, PassContext())
    text = printer.text(gm)
    result = Schedule().apply(gm, PassContext())
    assert (result.modified, result.notes) == (
        False, ("all weights stay on the device: nothing to order",),
    )  # fmt: skip
    assert printer.text(gm) == text
    assert info(gm).schedule is None


def test_it_needs_an_offloaded_graph() -> None:
    with pytest.raises(PipelineError, match="schedule requires a offloaded graph"):
        Pipeline((Schedule(),)).validate()


def test_all_resident_under_a_layout_is_a_schedule_of_compute() -> None:
    _, gm = scheduled(*info(two_blocks()).params, slots=0)
    found = info(gm).schedule
    assert found is not None
    assert [s for s, names in found.order.items() if names] == [Stream.COMPUTE]
    assert found.peak == {"device": 0}
    Verifier().check(gm, after="schedule")
