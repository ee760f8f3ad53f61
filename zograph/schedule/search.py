"""Local search on small steps: move one task in the order, keep what makes the step shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto

from zograph.schedule.memory import ALIGNMENT, Layout, Span, aligned, walk
from zograph.schedule.problem import Problem

Score = tuple[float, float]
EARLY = 16
"""How many of an arena's first fills count as the step's first."""


def improved(
    problem: Problem,
    layout: Layout,
    capacity: Sequence[int],
    keep_off: Mapping[int, int],
    score: Callable[[Layout], Score],
    goal: Score,
    budget: int,
) -> Layout:
    """Return a layout at least as good.

    Parameters
    ----------
    keep_off
        The lowest offset of each unit that has one.
    score
        How long a layout takes; less is better.
    goal
        A score that none can beat.
    budget
        How many orders to try.
    """
    best = score(layout), layout
    seen: set[tuple[int, ...]] = {layout.sequence}
    improving = True
    while improving and best[0] > goal:
        improving = False
        for sequence in neighbours(problem, best[1].sequence):
            if sequence in seen:
                continue
            seen.add(sequence)
            if len(seen) > budget:
                return best[1]
            for other in placements(problem, sequence, capacity, keep_off):
                if (value := score(other)) < best[0]:
                    best = value, other
                    improving = True
            if improving:
                break
    return best[1]


def neighbours(problem: Problem, sequence: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the orders with one task elsewhere, where that can change anything."""
    for at, task in enumerate(sequence):
        rest = sequence[:at] + sequence[at + 1 :]
        for step in (-1, 1):
            place = at
            while 0 <= place + min(step, 0) < len(rest):
                other = rest[place + min(step, 0)]
                if other in (problem.before if step < 0 else problem.after)[task]:
                    break
                place += step
                if related(problem, task, other):
                    yield (*rest[:place], task, *rest[place:])


def related(problem: Problem, a: int, b: int) -> bool:
    """Return whether two tasks share a stream or, one of them filling, an arena."""
    if problem.stream[a] == problem.stream[b]:
        return True
    if problem.fills[a] < 0 and problem.fills[b] < 0:
        return False
    arenas = [{problem.arena[u] for u in problem.uses[t]} for t in (a, b)]
    return not arenas[0].isdisjoint(arenas[1])


class Place(Enum):
    """Which of equally good places a unit takes."""

    LOW = auto()
    """The lowest."""
    LATE = auto()
    """The one that the step fills last for the first time, for the next step's first fills."""
    SPLIT = auto()
    """The highest if the unit outlives one that is filled later, else the lowest."""


def placements(
    problem: Problem,
    sequence: tuple[int, ...],
    capacity: Sequence[int],
    keep_off: Mapping[int, int],
) -> Iterator[Layout]:
    """Yield layouts of a sequence, with the units in different places."""
    layouts = (placed(problem, sequence, capacity, keep_off, place) for place in Place)
    yield from dict.fromkeys(layout for layout in layouts if layout is not None)


def placed(
    problem: Problem,
    sequence: tuple[int, ...],
    capacity: Sequence[int],
    keep_off: Mapping[int, int],
    place: Place,
) -> Layout | None:
    """Run a sequence once and give each fill the memory that lets it start first.

    Returns
    -------
    Layout or None
        None if a fill finds no room.
    """
    free: dict[int, float] = {}
    end = [0.0] * len(sequence)
    left = [len(users) for users in problem.users]
    ready = [0.0] * len(problem.units)  # when the last user ends
    offsets = [0] * len(problem.units)
    held: list[list[tuple[int, int, int]]] = [[] for _ in problem.arenas]  # the last in each byte
    early: list[list[Span]] = [[] for _ in problem.arenas]
    top = outliving(problem, sequence) if place is Place.SPLIT else set()
    for task in sequence:
        start = max((end[other] for other in problem.before[task]), default=0.0)
        start = max(start, free.get(problem.stream[task], 0.0))
        unit = problem.fills[task]
        if unit >= 0:
            arena, size = problem.arena[unit], problem.units[unit].bytes
            choice: tuple[float, int, int] | None = None
            floor = keep_off.get(unit, 0)
            for at in edges(held[arena], size, floor, capacity[arena]):
                before = [u for a, b, u in held[arena] if a < at + size and at < b]
                if any(left[u] > 0 for u in before):
                    continue
                when = max([start, *(ready[u] for u in before)])
                taste = 0
                if place is Place.LATE:
                    first = (i for i, (a, b) in enumerate(early[arena]) if a < at + size and at < b)
                    taste = -next(first, EARLY)
                elif unit in top:
                    taste = -at
                choice = min(choice or (when, taste, at), (when, taste, at))
            if choice is None:
                return None
            start, _, at = choice
            offsets[unit] = at
            held[arena] = [*cut(held[arena], at, at + size), (at, at + size, unit)]
            if len(early[arena]) < EARLY:
                early[arena].append((at, at + size))
        end[task] = free[problem.stream[task]] = start + problem.seconds[task]
        for used in problem.uses[task]:
            left[used] -= 1
            ready[used] = max(ready[used], end[task])
    return Layout(sequence, tuple(offsets))


def edges(
    held: Sequence[tuple[int, int, int]], size: int, floor: int, capacity: int
) -> Iterator[int]:
    """Yield the offsets beside what is there, and at both ends of the arena."""
    limit = (capacity - size) // ALIGNMENT * ALIGNMENT
    found = {floor, limit}
    for start, end, _ in held:
        found |= {aligned(start), aligned(end), (start - size) // ALIGNMENT * ALIGNMENT}
    yield from sorted(at for at in found if floor <= at <= limit)


def cut(
    held: Sequence[tuple[int, int, int]], low: int, high: int
) -> Iterator[tuple[int, int, int]]:
    """Yield what is left of some spans outside of another."""
    for start, end, unit in held:
        if start < min(end, low):
            yield start, min(end, low), unit
        if max(start, high) < end:
            yield max(start, high), end, unit


def outliving(problem: Problem, sequence: Sequence[int]) -> set[int]:
    """Return the units that are in use for longer than one filled after them."""
    found = set()
    lives: list[int] = []
    for _, freed in walk(problem, sequence):
        lives += freed
    order = [problem.fills[t] for t in sequence if problem.fills[t] >= 0]
    last = {unit: at for at, unit in enumerate(lives)}
    soonest = len(lives)
    for unit in reversed(order):
        if last[unit] > soonest:
            found.add(unit)
        soonest = min(soonest, last[unit])
    return found
