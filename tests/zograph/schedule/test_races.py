"""The race verifier passes what is sound, and catches every mutant of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from tests.zograph.schedule.dags import (
    BUILDERS,
    PAGE,
    Case,
    Cost,
    anything,
    cpu_disk,
    cuda_disk,
    mixed,
    tied,
)
from tests.zograph.schedule.mutants import mutants, report, survivors
from zograph.errors import VerifyError
from zograph.schedule import Event, Schedule, Stream, check, least_capacity, races, schedule


def scheduled(case: Case) -> Schedule:
    return schedule(case.dag, case.units, case.capacity)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_mutant_is_caught(name: str) -> None:
    plans = {}
    for count, slots in ((1, 1), (3, 1), (5, 2), (7, 3)):
        for costs in ([Cost()] * count, mixed(count, count)):
            case = BUILDERS[name](costs, slots)
            plan = plans[f"{name}, {count} stages, {slots} slots, {costs[0]}"] = scheduled(case)
            made, missed = survivors(plan)
            assert not missed
            assert made >= len(plan.events) + 2 * len(plan.order)
    print(report(plans))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(anything(most=9))
def test_every_mutant_of_a_random_step_is_caught(case: Case) -> None:
    least = least_capacity(case.dag, case.units)
    plan = schedule(case.dag, case.units, {arena: 2 * size for arena, size in least.items()})
    assert races(plan) == []
    assert not survivors(plan)[1]


def test_check_passes_what_is_sound() -> None:
    check(scheduled(cuda_disk(mixed(5), 2)))


def two_stages() -> Schedule:
    return scheduled(cpu_disk([Cost()] * 2, 2))


def test_the_message_teaches() -> None:
    plan = two_stages()
    lost = Event("fetch 0", "fold 0", 0)
    assert lost in plan.events
    with pytest.raises(VerifyError) as caught:
        check(replace(plan, events=tuple(e for e in plan.events if e != lost)))
    text = str(caught.value)
    assert "edge: 'fold 0' may start before 'fetch 0' ends: the dag has this edge" in text
    assert "Add an event, or swap the two if they share a stream." in text
    assert "'fold 0' is number 0 on compute, among 'fold 0' 'body 0' 'fold 1'" in text


def without(*lost: Event) -> Callable[[Schedule], Schedule]:
    return lambda plan: replace(plan, events=tuple(e for e in plan.events if e not in lost))


def moved(plan: Schedule) -> Schedule:
    return replace(plan, offsets={**plan.offsets, "u1": plan.offsets["u0"]})


def too_high(plan: Schedule) -> Schedule:
    return replace(plan, offsets={**plan.offsets, "u1": PAGE + 1})


def homeless(plan: Schedule) -> Schedule:
    return replace(plan, offsets={"u0": 0})


def turned(plan: Schedule) -> Schedule:
    return replace(plan, events=(*plan.events, Event("body 1", "fetch 0", 0)))


def foreign(plan: Schedule) -> Schedule:
    return replace(plan, events=(*plan.events, Event("nothing", "fetch 0", 0)))


def old(plan: Schedule) -> Schedule:
    return replace(plan, events=(*plan.events, Event("body 1", "fetch 0", 2)))


def astray(plan: Schedule) -> Schedule:
    order = {**plan.order, Stream.WRITE: plan.order[Stream.READ]}
    return replace(plan, order={**order, Stream.READ: plan.order[Stream.WRITE]})


@pytest.mark.parametrize(
    ("spoil", "rules"),
    [
        (without(Event("fold 0", "writeback 0", 0)), {"edge", "write", "fill", "cell"}),
        (without(Event("fetch 0", "fold 0", 0)), {"edge", "fill", "cell"}),
        (without(Event("writeback 0", "fetch 0", 1)), {"memory", "cell"}),
        (moved, {"memory"}),
        (too_high, {"room"}),
        (homeless, {"room"}),
        (turned, {"deadlock"}),
        (foreign, {"event"}),
        (old, {"event"}),
        (astray, {"order"}),
    ],
)
def test_each_rule_has_a_schedule_that_breaks_it(
    spoil: Callable[[Schedule], Schedule], rules: set[str]
) -> None:
    spoilt = spoil(two_stages())
    found = {race.rule for race in races(spoilt)}
    assert found == rules
    with pytest.raises(VerifyError):
        check(spoilt)


def test_a_tied_weight_loaded_before_its_store_is_a_race() -> None:
    case = tied([Cost()] * 3, 3)
    plan = scheduled(case)
    lost = Event("writeback 0", "fetch 2", 0)
    assert lost in plan.events
    plan.dag.remove_edge("writeback 0", "fetch 2")  # the cell remains
    pairs = {(r.before, r.after, r.lag) for r in races(without(lost)(plan)) if r.rule == "cell"}
    assert ("writeback 0", "fetch 2", 0) in pairs


def test_a_slow_last_reader_of_the_step_before_is_seen() -> None:
    plan = two_stages()
    lost = Event("writeback 0", "fetch 0", 1)
    assert lost in plan.events
    texts = [str(race) for race in races(without(lost)(plan))]
    assert any("'writeback 0' of the step before ends" in text for text in texts)


def test_mutants_are_of_every_kind() -> None:
    plan = two_stages()
    broken = list(mutants(plan))
    assert {races(mutant)[0].rule for mutant in broken} >= {"edge", "memory", "order", "room"}
    assert "mutants" in report({"two stages": plan})
