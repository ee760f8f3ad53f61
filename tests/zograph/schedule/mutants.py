"""Schedules with one thing wrong, each of them truly wrong: the race verifier must catch all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import networkx as nx

from zograph.schedule import Event, Schedule, races


def mutants(schedule: Schedule) -> Iterator[Schedule]:
    """Yield broken copies of a schedule that has no race."""
    yield from without_an_event(schedule)
    yield from with_a_later_event(schedule)
    yield from with_tasks_swapped(schedule)
    yield from with_a_unit_moved(schedule)
    yield from with_a_task_lost(schedule)
    yield from with_less_room(schedule)


def survivors(schedule: Schedule) -> tuple[int, list[Schedule]]:
    """Return how many mutants there are, and those that the verifier takes for sound."""
    every = list(mutants(schedule))
    return len(every), [mutant for mutant in every if not races(mutant)]


def without_an_event(schedule: Schedule) -> Iterator[Schedule]:
    """Events are minimal, so each one matters."""
    for event in schedule.events:
        yield replace(schedule, events=tuple(e for e in schedule.events if e != event))


def with_a_later_event(schedule: Schedule) -> Iterator[Schedule]:
    """An event that waits for the previous step where it should for this one."""
    for event in schedule.events:
        if event.lag == 0:
            late = Event(event.before, event.after, 1)
            yield replace(
                schedule, events=tuple(late if e == event else e for e in schedule.events)
            )


def with_tasks_swapped(schedule: Schedule) -> Iterator[Schedule]:
    """Neighbours on a stream, one of which depends on the other."""
    for stream, names in schedule.order.items():
        for at, (a, b) in enumerate(pairwise(names)):
            if nx.has_path(schedule.dag, a, b):
                swapped = (*names[:at], b, a, *names[at + 2 :])
                yield replace(schedule, order={**schedule.order, stream: swapped})


def with_a_unit_moved(schedule: Schedule) -> Iterator[Schedule]:
    """A unit in the memory of another that lives at the same time in the predicted timeline.

    That timeline keeps all orders and events, so it shows the clash.
    """
    spans = lives(schedule)
    for a, unit in schedule.units.items():
        for b, other in schedule.units.items():
            if a == b or unit.arena != other.arena or not unit.bytes or not other.bytes:
                continue
            if meet(spans[a], spans[b], schedule.seconds):
                offsets = {**schedule.offsets, a: schedule.offsets[b] + other.bytes - 1}
                capacity = {
                    **schedule.capacity,
                    unit.arena: schedule.capacity[unit.arena] + unit.bytes,
                }
                yield replace(schedule, offsets=offsets, capacity=capacity)


def with_a_task_lost(schedule: Schedule) -> Iterator[Schedule]:
    """A stream without its last task, and with it twice."""
    for stream, names in schedule.order.items():
        yield replace(schedule, order={**schedule.order, stream: names[:-1]})
        yield replace(schedule, order={**schedule.order, stream: (*names, names[-1])})


def with_less_room(schedule: Schedule) -> Iterator[Schedule]:
    """An arena that ends a byte too early."""
    for arena, peak in schedule.peak.items():
        if peak:
            yield replace(schedule, capacity={**schedule.capacity, arena: peak - 1})


def lives(schedule: Schedule) -> dict[str, tuple[float, float]]:
    """From when to when each unit is in use, in the predicted timeline."""
    found: dict[str, tuple[float, float]] = {}
    for name, task in schedule.tasks.items():
        for unit in (task.fills, *task.reads, *task.writes):
            if unit is not None:
                start, end = found.get(unit, (float("inf"), float("-inf")))
                start = min(start, schedule.start[name])
                found[unit] = start, max(end, schedule.end[name])
    return found


def meet(a: tuple[float, float], b: tuple[float, float], period: float) -> bool:
    """Whether two spans overlap when both repeat with a period, and by more than rounding."""
    if period <= 0:
        return False
    least = 1e-6 * period
    return any(
        min(a[1], b[1] + shift * period) - max(a[0], b[0] + shift * period) > least
        for shift in range(-3, 4)
    )


def report(schedules: Mapping[str, Schedule]) -> str:
    """Return a table of the mutants made and caught, a line for each schedule."""
    lines = []
    for name, schedule in schedules.items():
        made, missed = survivors(schedule)
        lines.append(f"{name:48} {made:5} mutants, {made - len(missed):5} caught")
    return "\n".join(lines)
