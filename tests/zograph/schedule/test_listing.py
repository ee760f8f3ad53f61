"""Schedules: within memory, without deadlock, near the best, ahead into the next step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import cache
from itertools import islice

import networkx as nx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.zograph.schedule.dags import (
    BUILDERS,
    PAGE,
    Case,
    Cost,
    anything,
    cases,
    chain,
    cpu_disk,
    cuda_disk,
    mixed,
    streamed,
    tied,
)
from tests.zograph.schedule.exhaustive import best, orders
from tests.zograph.schedule.mutants import lives, meet
from zograph.schedule import (
    CapacityError,
    Event,
    Schedule,
    Stream,
    Task,
    Unit,
    least_capacity,
    races,
    schedule,
)

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def scheduled(case: Case, *, once: bool = False) -> Schedule:
    return schedule(case.dag, case.units, case.capacity, once=once)


@cache
def plans() -> dict[str, Schedule]:
    """A schedule of every case."""
    return {name: scheduled(case) for name, case in cases()}


def assert_sound(plan: Schedule) -> None:
    """No race; the predicted times keep orders, events and memory."""
    assert races(plan) == []
    slack = 1e-6 * max(1.0, plan.seconds)
    for names in plan.order.values():
        for a, b in zip(names, [*names[1:], names[0]], strict=True):
            shift = plan.seconds if b == names[0] else 0.0
            assert plan.end[a] <= plan.start[b] + shift + slack
    for event in plan.events:
        shift = plan.seconds * event.lag
        assert plan.end[event.before] <= plan.start[event.after] + shift + slack
    spans = lives(plan)
    for a, unit in plan.units.items():
        assert plan.offsets[a] % PAGE == 0
        assert 0 <= plan.offsets[a] <= plan.capacity[unit.arena] - unit.bytes
        for b, other in plan.units.items():
            if a < b and unit.arena == other.arena and meet(spans[a], spans[b], plan.seconds):
                starts = plan.offsets[a], plan.offsets[b]
                assert starts[0] + unit.bytes <= starts[1] or starts[1] + other.bytes <= starts[0]
    computed = [plan.end[name] for name in plan.order.get(Stream.COMPUTE, ())]
    if computed:
        assert max(computed) == pytest.approx(plan.seconds)
        assert min(plan.start[n] for n in plan.order[Stream.COMPUTE]) >= -slack
    assert max(plan.busy.values()) - slack <= plan.seconds <= plan.cold_seconds + slack
    assert all(plan.peak[arena] <= size for arena, size in plan.capacity.items())
    assert 0.0 <= plan.overlap <= 1.0 + 1e-9


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_kind_of_step_is_sound_and_the_same_every_time(name: str) -> None:
    for costs, slots in (([Cost()] * 4, 2), (mixed(5, 1), 2), (mixed(9, 2), 3)):
        case = BUILDERS[name](costs, slots)
        plan = scheduled(case)
        assert_sound(plan)
        again = scheduled(BUILDERS[name](costs, slots))
        assert (plan.order, plan.events, plan.offsets) == (again.order, again.events, again.offsets)
        assert (plan.start, plan.ahead, plan.seconds) == (again.start, again.ahead, again.seconds)


@FEW
@given(streamed())
def test_streamed_chains_never_deadlock(case: Case) -> None:
    plan = scheduled(case)
    assert_sound(plan)


@FEW
@given(anything())
def test_random_dags_need_their_least_capacity_exactly(case: Case) -> None:
    least = least_capacity(case.dag, case.units)
    plan = schedule(case.dag, case.units, least)
    assert_sound(plan)
    assert plan.peak == least or all(plan.peak[a] <= least[a] for a in least)
    for arena, size in least.items():
        with pytest.raises(CapacityError) as caught:
            schedule(case.dag, case.units, {**least, arena: size - 1})
        error = caught.value
        assert (error.arena, error.needed, error.capacity) == (arena, size, size - 1)
    roomy = schedule(case.dag, case.units, {arena: 3 * size for arena, size in least.items()})
    assert_sound(roomy)


def test_a_chain_needs_one_slot_of_the_largest_stage() -> None:
    for name, case in cases():
        largest = max(unit.bytes for unit in case.units.values())
        assert set(least_capacity(case.dag, case.units).values()) == {largest}, name


def test_units_that_one_task_needs_at_once_are_counted_together() -> None:
    dag = nx.DiGraph()
    units = {name: Unit(name, "device", 5000) for name in "ab"}
    for name in "ab":
        dag.add_node(f"fetch {name}", task=Task(f"fetch {name}", Stream.READ, 1.0, fills=name))
    dag.add_node("body", task=Task("body", Stream.COMPUTE, 1.0, reads=("a", "b")))
    assert least_capacity(dag, units) == {"device": 8192 + 5000}
    with pytest.raises(CapacityError, match="'device' has 10000 bytes; the step needs at least"):
        schedule(dag, units, {"device": 10000})


def small_cases() -> Iterator[Case]:
    """Steps small enough for every order of dispatch to be tried."""
    for seed in range(100):
        rand = random.Random(seed)
        name = rand.choice(sorted(BUILDERS))
        costs = [
            Cost(*(float(rand.randint(0, 8)) for _ in range(4)), PAGE * rand.choice([1, 1, 2, 3]))
            for _ in range({"frozen": 3, "cuda-disk": 1}.get(name, 2))
        ]
        case = BUILDERS[name](costs, rand.choice([1, 2, 3]))
        for a, b in list(case.dag.edges):
            if a.startswith("body") and b.startswith("body") and rand.random() < 0.3:
                case.dag.remove_edge(a, b)
        if len(list(islice(orders(case.dag), 71))) < 71:
            yield case


def test_within_five_percent_of_the_best_order() -> None:
    compared = 0
    for case in small_cases():
        cold, steady = best(case)
        assert scheduled(case).seconds <= 1.05 * steady
        assert scheduled(case, once=True).cold_seconds <= 1.05 * cold
        compared += 1
    assert compared >= 25


@pytest.mark.parametrize(("fetch", "body"), [(2.0, 1.0), (1.0, 2.0), (1.5, 1.5)])
def test_two_slots_hide_transfers_under_compute(fetch: float, body: float) -> None:
    cost = Cost(fetch=fetch, fold=0.0, body=body, store=0.0)
    plan = scheduled(chain([cost] * 20, 2, frozen=True))
    assert plan.seconds == pytest.approx(20 * max(fetch, body), rel=0.02)
    assert plan.overlap >= min(1.0, body / fetch) - 0.05
    assert plan.limiting is (Stream.READ if fetch > body else Stream.COMPUTE) or fetch == body


def test_one_slot_takes_the_serial_time() -> None:
    cost = Cost(fetch=1.0, fold=0.5, body=1.0, store=2.0)
    plan = scheduled(cpu_disk([cost] * 5, 1))
    assert plan.seconds == pytest.approx(5 * (1.0 + 0.5 + 2.0))  # body runs under the write
    assert plan.cold_seconds == pytest.approx(plan.seconds)


def test_the_next_step_begins_in_this_one_if_memory_allows() -> None:
    plan = scheduled(cpu_disk([Cost()] * 8, 2))
    assert plan.ahead[0] == "fetch 0"
    assert plan.start["fetch 0"] < 0
    assert plan.seconds == pytest.approx(sum(plan.tasks[n].seconds for n in plan.order["compute"]))
    assert not {e.after for e in plan.events if e.lag == 0} & set(plan.ahead[:1])
    single = scheduled(cpu_disk([Cost(body=3.0)] * 8, 1))
    assert single.start["fetch 0"] >= 0


def test_ahead_is_what_waits_for_nothing_of_its_own_step() -> None:
    for name, plan in plans().items():
        waits = {task: [e for e in plan.events if e.after == task] for task in plan.dag}
        known: set[str] = set()
        for task in plan.ahead:
            assert all(e.lag == 1 or e.before in known for e in waits[task]), name
            known.add(task)
        for stream, names in plan.order.items():
            ours = tuple(task for task in plan.ahead if task in names)
            assert names[: len(ours)] == ours, name
            assert stream is not Stream.COMPUTE or not ours, name


def test_a_tied_weight_is_loaded_after_it_was_stored() -> None:
    case = tied([Cost(body=0.1)] * 3, 3)
    case.dag.remove_edge("writeback 0", "fetch 2")  # then the cells alone demand it
    plan = scheduled(case)
    assert Event("writeback 0", "fetch 2", 0) in plan.events
    assert plan.end["writeback 0"] <= plan.start["fetch 2"]
    assert_sound(plan)


def test_events_lie_between_streams() -> None:
    for name, plan in plans().items():
        streams = {task: data["task"].stream for task, data in plan.dag.nodes(data=True)}
        assert all(streams[e.before] != streams[e.after] for e in plan.events), name
        assert len(set(plan.events)) == len(plan.events), name


def test_large_steps_are_scheduled_quickly() -> None:
    case = cpu_disk(mixed(400, 3), 3)
    begin = time.process_time()
    plan = scheduled(case)
    middle = time.process_time()
    assert races(plan) == []
    assert middle - begin < 3
    assert time.process_time() - middle < 2
    assert plan.seconds <= 1.05 * max(plan.busy.values())


def test_staging_buffers_never_block_the_way_back() -> None:
    for staging in (1, 2, 3):
        case = cuda_disk([Cost()] * 10, 2)
        case.capacity["staging"] = staging * PAGE
        assert_sound(scheduled(case))


def test_faulty_dags_are_refused() -> None:
    case = cpu_disk([Cost()] * 2, 2)
    case.dag.add_edge("body 1", "fetch 0")
    with pytest.raises(ValueError, match="cycle"):
        scheduled(case)
    case = cpu_disk([Cost()] * 2, 2)
    case.dag.nodes["fetch 1"]["task"] = Task("fetch 1", Stream.READ, 1.0, fills="u0")
    with pytest.raises(ValueError, match="both fill 'u0'"):
        scheduled(case)
    case.dag.nodes["fetch 1"]["task"] = Task("fetch 1", Stream.READ, 1.0)
    with pytest.raises(ValueError, match="'u1', which no task fills"):
        scheduled(case)
    case.dag.add_node("lost")
    with pytest.raises(ValueError, match="'lost' has no attribute"):
        scheduled(case)
    case = cpu_disk([Cost()] * 2, 2)
    del case.units["u1"]
    with pytest.raises(ValueError, match="'u1' is filled but not declared"):
        scheduled(case)


def test_an_empty_step() -> None:
    plan = schedule(nx.DiGraph(), {}, {"device": 1})
    assert (plan.order, plan.events, plan.seconds, plan.overlap) == ({}, (), 0.0, 1.0)
    assert plan.peak == {"device": 0}
    assert races(plan) == []
