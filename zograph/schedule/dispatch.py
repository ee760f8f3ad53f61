"""List scheduling: run a step in predicted time, always starting the most urgent task.

Memory could deadlock: a unit fetched early may hold the bytes that an earlier stage needs in
order to finish. So a fill starts only if the step could still end from there one task at a time,
in the order of a layout known to fit (the banker's rule).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from zograph.schedule.memory import Layout, Span, aligned, first_fit, walk
from zograph.schedule.problem import Problem

LOOK = 8
"""How many ready tasks of a stream are looked at."""


@dataclass(frozen=True)
class Rule:
    """What is most urgent, and how fills may use memory.

    Attributes
    ----------
    rank
        For each task; the lowest runs first.
    strict
        Whether a fill waits while a more urgent one waits for room in the same arena.
    tail, head
        The last `tail` fills of an arena keep off the memory of its first `head` fills, so that
        the next step's first fills need not wait for this step's end.
    """

    rank: tuple[float, ...]
    strict: bool = True
    tail: int = 0
    head: int = 0


def critical(problem: Problem) -> tuple[float, ...]:
    """Return ranks by the longest way to the end of the step: the longest is most urgent."""
    way = [0.0] * len(problem.tasks)
    for task in reversed(range(len(way))):
        follow = max((way[other] for other in problem.after[task]), default=0.0)
        way[task] = problem.seconds[task] + follow
    return tuple(-length for length in way)


def by_need(sequence: Sequence[int]) -> tuple[float, ...]:
    """Return ranks by the place in a sequence: the order in which compute needs the fills."""
    ranks = [0.0] * len(sequence)
    for place, task in enumerate(sequence):
        ranks[task] = float(place)
    return tuple(ranks)


class Dispatcher:
    """One run of a step, cold, under a rule.

    Parameters
    ----------
    safe
        A first-fit layout within the capacity, see :func:`zograph.schedule.memory.fitted`.
    capacity
        Bytes of each arena.
    """

    def __init__(self, problem: Problem, safe: Layout, capacity: Sequence[int], rule: Rule) -> None:
        self.problem, self.safe, self.capacity, self.rule = problem, safe, capacity, rule
        self.place = [0] * len(problem.tasks)
        for at, task in enumerate(safe.sequence):
            self.place[task] = at
        self.started = [False] * len(problem.tasks)
        self.first = 0  # everything before it in the safe sequence has started
        self.last = -1  # nothing behind it has
        self.missing = [len(before) for before in problem.before]
        self.left = [len(users) for users in problem.users]  # that have not ended
        self.unstarted = list(self.left)
        self.live: dict[int, None] = {}  # filled, or about to be, and with users to start
        self.calm = self._calm()
        self.offsets = [-1] * len(problem.units)
        self.taken: list[list[Span]] = [[] for _ in problem.arenas]
        self.ready: dict[int, list[tuple[float, int]]] = {s: [] for s in set(problem.stream)}
        self.running: list[tuple[float, int]] = []
        self.busy: set[int] = set()
        self.sequence: list[int] = []
        self.keep_off = self._keep_off()

    def run(self) -> Layout | None:
        """Return the order in which the tasks started, and where the units stood.

        None if the memory is too fragmented to go on: what ends early can lead first fit astray.
        """
        for task, count in enumerate(self.missing):
            if count == 0:
                self._offer(task)
        now = 0.0
        while len(self.sequence) < len(self.started):
            while (urgent := self._next()) is not None:
                self._start(urgent, now)
            if not self.running and not self._rescue(now):
                return None
            now = self.running[0][0]
            while self.running and self.running[0][0] <= now:
                self._end(heappop(self.running)[1])
        return Layout(tuple(self.sequence), tuple(self.offsets))

    def _keep_off(self) -> dict[int, int]:
        """Return the lowest offset for each unit that has one because of `tail` and `head`."""
        problem, found = self.problem, {}
        for arena, capacity in enumerate(self.capacity):
            fills = [problem.fills[t] for t in self.safe.sequence if problem.fills[t] >= 0]
            fills = [u for u in fills if problem.arena[u] == arena]
            if self.rule.tail + self.rule.head > len(fills):
                continue
            floor = sum(aligned(problem.units[u].bytes) for u in fills[: self.rule.head])
            for u in fills[len(fills) - self.rule.tail :]:
                if floor + problem.units[u].bytes <= capacity:
                    found[u] = floor
        return found

    def _offer(self, task: int) -> None:
        insort(self.ready[self.problem.stream[task]], (self.rule.rank[task], task))

    def _next(self) -> int | None:
        """Return the most urgent task that can start, with its unit's offset set."""
        idle = [own[:LOOK] for stream, own in self.ready.items() if stream not in self.busy]
        full: set[int] = set()
        for _, task in sorted(entry for own in idle for entry in own):
            unit = self.problem.fills[task]
            if unit < 0:
                return task
            arena = self.problem.arena[unit]
            if arena in full:
                continue
            if self._fits(task, unit, self.keep_off.get(unit, 0)):
                return task
            if self.rule.strict:
                full.add(arena)
        return None

    def _fits(self, task: int, unit: int, floor: int) -> bool:
        arena, size = self.problem.arena[unit], self.problem.units[unit].bytes
        offset = first_fit(self.taken[arena], size, self.capacity[arena], floor)
        if offset is None:
            return False
        self.offsets[unit] = offset
        return self._ends(task)

    def _rescue(self, now: float) -> bool:
        """Start what is next in the safe sequence, wherever there is room."""
        task = self.safe.sequence[self.first]
        unit = self.problem.fills[task]
        if unit >= 0 and not self._fits(task, unit, 0):
            return False
        self._start(task, now)
        return True

    def _start(self, task: int, now: float) -> None:
        problem = self.problem
        own = self.ready[problem.stream[task]]
        own.pop(bisect_left(own, (self.rule.rank[task], task)))
        self.busy.add(problem.stream[task])
        heappush(self.running, (now + problem.seconds[task], task))
        self.sequence.append(task)
        self.started[task] = True
        self.last = max(self.last, self.place[task])
        while self.first < len(self.started) and self.started[self.safe.sequence[self.first]]:
            self.first += 1
        unit = problem.fills[task]
        if unit >= 0:
            start = self.offsets[unit]
            insort(self.taken[problem.arena[unit]], (start, start + problem.units[unit].bytes))
            self.live[unit] = None
        for used in problem.uses[task]:
            self.unstarted[used] -= 1
            if self.unstarted[used] == 0:
                del self.live[used]

    def _end(self, task: int) -> None:
        problem = self.problem
        self.busy.remove(problem.stream[task])
        for unit in problem.uses[task]:
            self.left[unit] -= 1
            if self.left[unit] == 0:
                start = self.offsets[unit]
                span = (start, start + problem.units[unit].bytes)
                self.taken[problem.arena[unit]].remove(span)
        for other in problem.after[task]:
            self.missing[other] -= 1
            if self.missing[other] == 0:
                self._offer(other)

    def _ends(self, task: int) -> bool:
        """Return whether the step could end, one task at a time, after this fill."""
        problem, sequence = self.problem, self.safe.sequence
        offsets = {unit: self.offsets[unit] for unit in [*self.live, problem.fills[task]]}
        left = {unit: self.unstarted[unit] for unit in offsets}
        taken: list[list[Span]] = [[] for _ in problem.arenas]
        for unit, start in offsets.items():
            insort(taken[problem.arena[unit]], (start, start + problem.units[unit].bytes))
        self._use(task, taken, offsets, left)
        last = max(self.last, self.place[task])
        for at in range(self.first, len(sequence)):
            if at > last and offsets == self.calm[at]:
                return True  # from here on it is the safe sequence
            other = sequence[at]
            if self.started[other] or other == task:
                continue
            unit = problem.fills[other]
            if unit >= 0:
                arena, size = problem.arena[unit], problem.units[unit].bytes
                offset = first_fit(taken[arena], size, self.capacity[arena])
                if offset is None:
                    return False
                insort(taken[arena], (offset, offset + size))
                offsets[unit], left[unit] = offset, len(problem.users[unit])
            self._use(other, taken, offsets, left)
        return True

    def _use(
        self, task: int, taken: list[list[Span]], offsets: dict[int, int], left: dict[int, int]
    ) -> None:
        """Free, in a thought, the units that nothing needs after a task."""
        for unit in self.problem.uses[task]:
            left[unit] -= 1
            if left[unit] == 0:
                start = offsets.pop(unit)
                span = (start, start + self.problem.units[unit].bytes)
                taken[self.problem.arena[unit]].remove(span)

    def _calm(self) -> list[dict[int, int]]:
        """Return the units that live before each task of the safe sequence, and their offsets."""
        live: dict[int, int] = {}
        found: list[dict[int, int]] = []
        for task, freed in walk(self.problem, self.safe.sequence):
            found.append(dict(live))
            unit = self.problem.fills[task]
            if unit >= 0:
                live[unit] = self.safe.offsets[unit]
            for unit in freed:
                del live[unit]
        return found
