"""Slot memory: where units stand, and the order of tasks that needs the least of it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from zograph.schedule.problem import STREAMS, Problem
from zograph.schedule.tasks import Stream

ALIGNMENT = 4096
"""Units start at multiples of this, as direct reads from a disk ask for."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """An order of all tasks and a place for each unit that is right when they run one by one.

    Whatever waits only for what stands earlier in `sequence` cannot deadlock, so every schedule
    comes from a layout.
    """

    sequence: tuple[int, ...]
    offsets: tuple[int, ...]

    def peaks(self, problem: Problem) -> tuple[int, ...]:
        """Return the highest byte in use of each arena."""
        peaks = [0] * len(problem.arenas)
        for unit, arena, offset in zip(problem.units, problem.arena, self.offsets, strict=True):
            peaks[arena] = max(peaks[arena], offset + unit.bytes)
        return tuple(peaks)


def aligned(offset: int) -> int:
    """Round an offset up to where a unit may start.

    Examples
    --------
    >>> aligned(1), aligned(4096)
    (4096, 4096)
    """
    return -(-offset // ALIGNMENT) * ALIGNMENT


def first_fit(taken: Sequence[Span], size: int, capacity: int, floor: int = 0) -> int | None:
    """Return the lowest offset with room, or None.

    Parameters
    ----------
    taken
        What is in use, as sorted (start, end).
    floor
        No offset below it.

    Examples
    --------
    >>> first_fit([(0, 100), (8192, 9000)], 4096, 20000)
    4096
    """
    at = aligned(floor)
    for start, end in taken:
        if at + size <= start:
            break
        at = max(at, aligned(end))
    return at if at + size <= capacity else None


def frugal(problem: Problem, order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return an order that fills units as late and frees them as early as it can.

    Tasks that fill nothing come first, then those that move a unit that is there already, then
    the fills that the next other task waits for.

    Parameters
    ----------
    order
        A topological order that says what is next where there is a choice.
    """
    order = range(len(problem.tasks)) if order is None else order
    rank = {task: place for place, task in enumerate(order)}
    missing = [len(before) for before in problem.before]
    ready: tuple[list[int], list[int]] = ([], [])  # of ranks
    fresh: set[int] = set()
    placed: list[int] = []
    done = [False] * len(missing)

    def offer(task: int) -> None:
        if problem.fills[task] < 0:
            heappush(ready[0], rank[task])
        elif len(problem.uses[task]) > 1:
            heappush(ready[1], rank[task])
        else:
            fresh.add(task)

    goals = [task for task in order if goal(problem, task)]
    for task, count in enumerate(missing):
        if count == 0:
            offer(task)
    at = 0
    while len(placed) < len(missing):
        if ready[0] or ready[1]:
            task = order[heappop(ready[0] or ready[1])]
        else:
            while at < len(goals) and done[goals[at]]:
                at += 1
            wanted = waiting(problem, goals[at], done) if at < len(goals) else fresh
            task = min(fresh & wanted, key=rank.__getitem__)
            fresh.remove(task)
        done[task] = True
        placed.append(task)
        for other in problem.after[task]:
            missing[other] -= 1
            if missing[other] == 0:
                offer(other)
    return tuple(placed)


def goal(problem: Problem, task: int) -> bool:
    """Return whether fills are done for this task's sake."""
    return problem.fills[task] < 0 or STREAMS[problem.stream[task]] is Stream.COMPUTE


def waiting(problem: Problem, target: int, done: Sequence[bool]) -> set[int]:
    """Return a task and what must run before it and has not."""
    found = {target}
    stack = [target]
    while stack:
        for task in problem.before[stack.pop()]:
            if not done[task] and task not in found:
                found.add(task)
                stack.append(task)
    return found


def walk(problem: Problem, sequence: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield the tasks of a sequence, each with the units that nothing needs after it."""
    left = [len(users) for users in problem.users]
    for task in sequence:
        for unit in problem.uses[task]:
            left[unit] -= 1
        yield task, [unit for unit in problem.uses[task] if left[unit] == 0]


def fitted(problem: Problem, sequence: tuple[int, ...]) -> Layout:
    """Place each unit at the lowest offset with room at the time of its fill."""
    offsets = [0] * len(problem.units)
    taken: list[list[Span]] = [[] for _ in problem.arenas]
    for task, freed in walk(problem, sequence):
        unit = problem.fills[task]
        if unit >= 0:
            own, size = taken[problem.arena[unit]], problem.units[unit].bytes
            offset = first_fit(own, size, capacity=1 << 62)
            assert offset is not None, "memory without an end has room"
            offsets[unit] = offset
            insort(own, (offset, offset + size))
        for unit in freed:
            span = (offsets[unit], offsets[unit] + problem.units[unit].bytes)
            taken[problem.arena[unit]].remove(span)
    return Layout(sequence, tuple(offsets))


def packed(problem: Problem, sequence: tuple[int, ...]) -> Layout:
    """Place the largest units first, each as low as those that live with it allow."""
    lives: dict[int, Span] = {}
    for at, (task, freed) in enumerate(walk(problem, sequence)):
        if problem.fills[task] >= 0:
            lives[problem.fills[task]] = (at, len(sequence))
        for unit in freed:
            lives[unit] = (lives[unit][0], at)
    offsets = [0] * len(problem.units)
    placed: list[list[int]] = [[] for _ in problem.arenas]
    for unit in sorted(lives, key=lambda u: (-problem.units[u].bytes, lives[u])):
        first, last = lives[unit]
        others = placed[problem.arena[unit]]
        near = [o for o in others if lives[o][0] <= last and first <= lives[o][1]]
        taken = sorted((offsets[o], offsets[o] + problem.units[o].bytes) for o in near)
        offset = first_fit(taken, problem.units[unit].bytes, capacity=1 << 62)
        assert offset is not None, "memory without an end has room"
        offsets[unit] = offset
        others.append(unit)
    return Layout(sequence, tuple(offsets))


def floors(problem: Problem) -> tuple[int, ...]:
    """Return the most bytes that one task needs at once, for each arena."""
    most = [0] * len(problem.arenas)
    for own in problem.uses:
        for arena in {problem.arena[u] for u in own}:
            sizes = [problem.units[u].bytes for u in own if problem.arena[u] == arena]
            spare = max(aligned(size) - size for size in sizes)  # behind the unit placed last
            most[arena] = max(most[arena], sum(map(aligned, sizes)) - spare)
    return tuple(most)


def least(problem: Problem) -> Layout:
    """Return the layout with the smallest peaks of those tried: what is always possible."""
    bound = floors(problem)
    found: list[tuple[int, tuple[int, ...], Layout]] = []
    for sequence in (frugal(problem), tuple(range(len(problem.tasks)))):
        for place in (fitted, packed):
            layout = place(problem, sequence)
            peaks = layout.peaks(problem)
            if peaks == bound:
                return layout
            found.append((sum(peaks), peaks, layout))
    return min(found, key=lambda entry: entry[:2])[2]
