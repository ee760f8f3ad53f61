"""List scheduling: the entry is :func:`schedule`.

Several rules of priority each run the step once in predicted time; the layout whose endless
repetition is fastest wins, and small steps are then improved by local search. Equal input gives
the equal schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from random import Random

import networkx as nx

from zograph.schedule import memory, periodic
from zograph.schedule.dispatch import Dispatcher, Rule, by_need, critical
from zograph.schedule.memory import Layout
from zograph.schedule.problem import STREAMS, Problem, compiled
from zograph.schedule.result import CapacityError, Event, Schedule
from zograph.schedule.search import Score, improved, placements
from zograph.schedule.tasks import Unit

SMALL = 24
"""Steps of up to this many tasks get a local search"""
RANDOM = 24
"""after as many random orders have been tried as well,"""
STARTS = 4
"""from this many layouts,"""
BUDGET = 200
"""with this many orders each."""


def schedule(
    dag: nx.DiGraph,
    units: Mapping[str, Unit],
    capacity: Mapping[str, int],
    *,
    once: bool = False,
) -> Schedule:
    """Order a step that repeats, place its units, and say what waits for what.

    Parameters
    ----------
    dag
        The tasks by name, each node with its :class:`Task` as attribute ``task``. Edges are the
        dependencies within one step. Where it leaves the order of two accesses to a cell open,
        they stay in the order in which the nodes were added.
    units
        The slot memory that the tasks fill, by name.
    capacity
        Bytes of each arena.
    once
        Make a first step short, rather than one of many: for an evaluation.

    Returns
    -------
    Schedule
        It cannot deadlock, and :func:`zograph.schedule.races` finds nothing in it.

    Raises
    ------
    CapacityError
        If an arena has fewer bytes than :func:`least_capacity` says.
    ValueError
        If the dag has a cycle, or a unit is not filled exactly once.

    Examples
    --------
    >>> from zograph.schedule import Stream, Task
    >>> dag = nx.DiGraph()
    >>> dag.add_node("fetch", task=Task("fetch", Stream.READ, 1.0, fills="u", loads=("w",)))
    >>> dag.add_node("body", task=Task("body", Stream.COMPUTE, 2.0, reads=("u",)))
    >>> dag.add_edge("fetch", "body")
    >>> plan = schedule(dag, {"u": Unit("u", "device", 100)}, {"device": 100})
    >>> plan.events
    (Event(before='body', after='fetch', lag=1), Event(before='fetch', after='body', lag=0))
    >>> plan.seconds, plan.ahead
    (3.0, ('fetch',))
    """
    problem = compiled(dag, units)
    fallback = memory.least(problem)
    sizes = [capacity.get(arena, 0) for arena in problem.arenas]
    for arena, needed, size in zip(problem.arenas, fallback.peaks(problem), sizes, strict=True):
        if size < needed:
            raise CapacityError(arena, needed, size)
    best = chosen(problem, fallback, sizes, once=once)
    waits = periodic.events(problem, best)
    times = periodic.timeline(problem, best, waits)
    names = [task.name for task in problem.tasks]
    order: dict[int, list[str]] = {}
    for task in best.sequence:
        order.setdefault(problem.stream[task], []).append(names[task])
    return Schedule(
        dag=dag,
        units=dict(units),
        capacity=dict(capacity),
        order={STREAMS[stream]: tuple(order[stream]) for stream in sorted(order)},
        events=tuple(
            Event(names[other], names[task], lag)
            for task in best.sequence
            for other, lag in sorted(waits[task])
        ),
        offsets={u.name: at for u, at in zip(problem.units, best.offsets, strict=True)},
        ahead=tuple(names[task] for task in periodic.ahead(problem, best, waits)),
        start=dict(zip(names, times.start, strict=True)),
        end=dict(zip(names, times.end, strict=True)),
        seconds=times.seconds,
        cold_seconds=times.cold_seconds,
    )


def least_capacity(dag: nx.DiGraph, units: Mapping[str, Unit]) -> dict[str, int]:
    """Return the smallest bytes of each arena with which :func:`schedule` succeeds.

    Examples
    --------
    >>> from zograph.schedule import Stream, Task
    >>> dag = nx.DiGraph()
    >>> dag.add_node("fetch", task=Task("fetch", Stream.READ, 1.0, fills="u"))
    >>> least_capacity(dag, {"u": Unit("u", "device", 100)})
    {'device': 100}
    """
    problem = compiled(dag, units)
    return dict(zip(problem.arenas, memory.least(problem).peaks(problem), strict=True))


def chosen(problem: Problem, fallback: Layout, capacity: list[int], *, once: bool) -> Layout:
    """Return the layout with the shortest step, then the shortest first one, or vice versa.

    The fallback is among those compared, so there is one whatever else fails.
    """

    def score(layout: Layout) -> Score:
        times = periodic.timeline(problem, layout, periodic.events(problem, layout))
        return ranked(times.seconds, times.cold_seconds, once=once)

    found: dict[Layout, tuple[Score, dict[int, int]]] = {}
    goal = floor(problem, once=once)
    small = len(problem.tasks) <= SMALL

    def consider(layouts: Iterable[Layout], keep_off: dict[int, int]) -> None:
        for layout in layouts:
            if layout not in found:
                found[layout] = score(layout), keep_off

    def leaders() -> list[Layout]:
        return sorted(found, key=lambda layout: found[layout][0])[:STARTS]

    consider([fallback], {})
    for safe, rule in tries(problem, fallback):
        if any(peak > size for peak, size in zip(safe.peaks(problem), capacity, strict=True)):
            continue
        dispatcher = Dispatcher(problem, safe, capacity, rule)
        if (layout := dispatcher.run()) is not None and layout not in found:
            keep_off = dispatcher.keep_off
            consider([layout], keep_off)
            if small:
                consider(placements(problem, layout.sequence, capacity, keep_off), keep_off)
        best = found[leaders()[0]][0]
        if best <= goal or (best[0] <= goal[0] and not small):
            return leaders()[0]
    for layout in leaders()[: STARTS if small else 2]:
        keep_off = found[layout][1]
        if small:
            better = improved(problem, layout, capacity, keep_off, score, goal, BUDGET)
            consider([better], keep_off)
        else:
            consider(placements(problem, layout.sequence, capacity, keep_off), keep_off)
    return leaders()[0]


def tries(problem: Problem, fallback: Layout) -> Iterator[tuple[Layout, Rule]]:
    """Yield the rules of priority to try, each with the order in which all is safe to end."""
    safe = memory.fitted(problem, fallback.sequence)
    need, way = by_need(safe.sequence), critical(problem)
    yield safe, Rule(need)
    yield safe, Rule(way)
    yield safe, Rule(way, strict=False)
    for tail, head in ((1, 1), (2, 1), (3, 1), (2, 2), (4, 2)):
        yield safe, Rule(need, tail=tail, head=head)
    if len(need) <= SMALL:
        random = Random(0)
        for _ in range(RANDOM):
            shuffled = memory.frugal(problem, shuffle(problem, random))
            other = memory.fitted(problem, shuffled)
            yield other, Rule(by_need(shuffled))
            yield safe, Rule(by_need(shuffled), strict=False)
            yield safe, Rule(tuple(random.random() for _ in need))


def shuffle(problem: Problem, random: Random) -> list[int]:
    """Return a random topological order."""
    missing = [len(before) for before in problem.before]
    ready = [task for task, count in enumerate(missing) if count == 0]
    order = []
    while ready:
        task = ready.pop(random.randrange(len(ready)))
        order.append(task)
        for other in problem.after[task]:
            missing[other] -= 1
            if missing[other] == 0:
                ready.append(other)
    return order


def floor(problem: Problem, *, once: bool) -> Score:
    """Return times that no layout beats: the busiest stream, the longest way through a step."""
    busy = [0.0] * len(STREAMS)
    for stream, seconds in zip(problem.stream, problem.seconds, strict=True):
        busy[stream] += seconds
    longest = max((-rank for rank in critical(problem)), default=0.0)
    return ranked(max(busy), max(longest, *busy), once=once)


def ranked(seconds: float, cold_seconds: float, *, once: bool) -> Score:
    """Return the two times, the one that matters first; without the noise of rounding."""
    steady, cold = round(seconds, 12), round(cold_seconds, 12)
    return (cold, steady) if once else (steady, cold)
