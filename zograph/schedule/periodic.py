"""From a layout to a step that repeats: what waits for what, and when it runs in the long run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zograph.schedule.memory import Layout
from zograph.schedule.problem import STREAMS, Problem
from zograph.schedule.tasks import Stream

LAPS = 48
"""Steps to simulate at most until they repeat."""
CYCLES = 4
"""The longest pattern of steps that is recognised as repeating."""
NEVER = -(1 << 60)

Wait = tuple[int, int]
"""A task, and how many steps ago."""


@dataclass(frozen=True)
class Timeline:
    """Predicted times: of each task in the steady state, of a step then, and of a first step."""

    start: tuple[float, ...]
    end: tuple[float, ...]
    seconds: float
    cold_seconds: float


def demands(problem: Problem, layout: Layout) -> list[list[Wait]]:
    """Return what each task must wait for, whatever the stream; lags are 0 or 1.

    Only the nearest of each kind stand there: the last to touch the memory that a fill takes,
    the last store before a load. The others follow.
    """
    found: list[list[Wait]] = [[(t, 0) for t in before] for before in problem.before]
    for task, past in enumerate(problem.past):
        found[task] += [(t, 1) for t in past]
    held: list[list[tuple[int, int, int, int]]] = [[] for _ in problem.arenas]
    for lap in (0, 1):
        for task in layout.sequence:
            unit = problem.fills[task]
            if unit < 0:
                continue
            start = layout.offsets[unit]
            end = start + problem.units[unit].bytes
            kept = [(start, end, unit, lap)]
            for low, high, other, at in held[problem.arena[unit]]:
                if low < end and start < high:
                    if lap == 1:
                        found[task] += [(user, lap - at) for user in problem.users[other]]
                    kept += [(low, start, other, at)] if low < start else []
                    kept += [(end, high, other, at)] if end < high else []
                else:
                    kept.append((low, high, other, at))
            held[problem.arena[unit]] = kept
    return found


def events(problem: Problem, layout: Layout) -> list[list[Wait]]:
    """Return the fewest waits on other streams from which, with stream order, all follow.

    A vector clock holds, for each task and stream, how far that stream has come for certain
    when the task starts; a wait is needless if another one implies it.
    """
    count = [0] * len(STREAMS)
    place = [0] * len(problem.tasks)
    for task in layout.sequence:
        place[task] = count[problem.stream[task]]
        count[problem.stream[task]] += 1
    needs = []
    for task, waits in enumerate(demands(problem, layout)):
        latest: dict[int, int] = {}
        stream = problem.stream[task]
        for other, lag in waits:
            on = problem.stream[other]
            if on != stream:
                latest[on] = max(latest.get(on, NEVER), place[other] - lag * count[on])
        needs.append(latest)
    names = [[t for t in layout.sequence if problem.stream[t] == s] for s in range(len(STREAMS))]
    clocks: list[list[list[int]]] = [[[]] * len(place), [[]] * len(place)]
    found: list[list[Wait]] = [[] for _ in place]
    for lap in (0, 1):
        for task in layout.sequence:
            own = problem.stream[task]
            edges = {on: at + lap * count[on] for on, at in needs[task].items()}
            edges[own] = place[task] - 1 + lap * count[own]
            known = [NEVER] * len(STREAMS)
            for on, at in edges.items():
                if at >= 0:
                    step, index = divmod(at, count[on])
                    seen = clocks[step][names[on][index]]
                    known = [max(pair) for pair in zip(known, seen, strict=True)]
            for on, at in edges.items():
                if lap == 1 and on != own and known[on] < at:
                    step, index = divmod(at, count[on])
                    found[task].append((names[on][index], 1 - step))
            for on, at in edges.items():
                known[on] = max(known[on], at)
            clocks[lap][task] = known
    return found


def ahead(problem: Problem, layout: Layout, waits: list[list[Wait]]) -> Iterator[int]:
    """Yield the tasks that wait for nothing of their own step but each other, in order."""
    chosen: set[int] = set()
    closed = {STREAMS.index(Stream.COMPUTE)}
    for task in layout.sequence:
        stream = problem.stream[task]
        if stream in closed:
            continue
        if all(lag == 1 or other in chosen for other, lag in waits[task]):
            chosen.add(task)
            yield task
        else:
            closed.add(stream)


def timeline(problem: Problem, layout: Layout, waits: list[list[Wait]]) -> Timeline:
    """Simulate steps until they repeat, every task as early as it may.

    A step's tasks are issued no earlier than the begin of the step before.
    """
    compute = STREAMS.index(Stream.COMPUTE)
    last = [t for t in layout.sequence if problem.stream[t] == compute][-1:]
    sooner = [[t for t, lag in own if lag == 0] for own in waits]
    past = [[t for t, lag in own if lag == 1] for own in waits]
    stream, seconds = problem.stream, problem.seconds
    start, end = [0.0] * len(seconds), [0.0] * len(seconds)
    free = [0.0] * len(STREAMS)
    begins = [0.0, 0.0]
    history: list[tuple[list[float], list[float]]] = []
    cold = 0.0
    for lap in range(LAPS):
        old, end = end, [0.0] * len(seconds)
        start = [0.0] * len(seconds)
        free = [max(f, begins[-2]) for f in free]
        for task in layout.sequence:
            at = free[stream[task]]
            for other in sooner[task]:
                if end[other] > at:
                    at = end[other]
            for other in past[task]:
                if old[other] > at:
                    at = old[other]
            start[task] = at
            end[task] = free[stream[task]] = at + seconds[task]
        if lap == 0:
            cold = max(end, default=0.0)
        history.append((start, end))
        begins.append(end[last[0]] if last else max(end, default=0.0))
        for cycle in range(1, min(CYCLES, lap) + 1):
            shifts = [b - a for a, b in zip(history[-1 - cycle][1], end, strict=True)]
            if shifts and max(shifts) - min(shifts) <= 1e-9 * max(shifts):
                return _steady(history[-cycle:], max(shifts) / cycle, last, cold)
    # not yet regular, but a timetable with the slowest task's advance can be kept
    shifts = [b - a for a, b in zip(history[-2][1], end, strict=True)]
    return _steady(history[-1:], max(shifts, default=0.0), last, cold)


def _steady(
    history: list[tuple[list[float], list[float]]], seconds: float, last: list[int], cold: float
) -> Timeline:
    """Return the timetable with one period to which a repeating run of steps belongs."""
    starts, ends = [], []
    for back, (start, end) in enumerate(reversed(history)):
        starts.append([s + back * seconds for s in start])
        ends.append([e + back * seconds for e in end])
    final = [max(column) for column in zip(*ends, strict=True)]
    zero = (final[last[0]] if last else max(final, default=0.0)) - seconds
    first = [max(column) for column in zip(*starts, strict=True)]
    return Timeline(tuple(s - zero for s in first), tuple(e - zero for e in final), seconds, cold)
