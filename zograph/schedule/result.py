"""A finished schedule: who runs after whom, where each unit stands, and the predicted times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx

from zograph.errors import OptionError
from zograph.schedule.tasks import Stream, Task, Unit

Span = tuple[float, float]


class CapacityError(ValueError):
    """An arena is too small for any schedule.

    Attributes
    ----------
    arena : str
        The arena that is too small.
    needed : int
        The smallest capacity in bytes that is enough.
    capacity : int
        What there was.
    """

    def __init__(self, arena: str, needed: int, capacity: int) -> None:
        super().__init__(
            f"the arena {arena!r} has {capacity} bytes; the step needs at least {needed}. Raise "
            "the capacity, or cut the stages smaller."
        )
        self.arena = arena
        self.needed = needed
        self.capacity = capacity


@dataclass(frozen=True)
class Event:
    """In step t, `after` waits until `before` of step t - `lag` has ended; lag is 0 or 1."""

    before: str
    after: str
    lag: int


@dataclass(frozen=True)
class Schedule:
    """One step that repeats without end: the same orders, events and offsets every time.

    Times are in seconds. The predicted timeline is that of the steady state; its zero is where
    the previous step's last compute task ended, so this step's last one ends at `seconds`.

    Attributes
    ----------
    dag
        The tasks and their dependencies within one step.
    units
        The slot memory by name.
    capacity
        Bytes of each arena.
    order
        One step's tasks on each stream, in the order in which they run. A stream's first task of
        the next step follows its last of this one.
    events
        What the streams wait for besides their own order; none follows from the others.
    offsets
        Where each unit stands in its arena, in bytes.
    ahead
        Tasks of the next step that may be issued with this one: everything they wait for is in
        this step or in `ahead`. In the order of issue.
    start, end
        Predicted times of each task in the steady state; tasks in `ahead` may start below zero.
    seconds
        Predicted time from step to step.
    cold_seconds
        Predicted time of a first step, until its last task has ended.
    """

    dag: nx.DiGraph
    units: dict[str, Unit]
    capacity: dict[str, int]
    order: dict[Stream, tuple[str, ...]]
    events: tuple[Event, ...]
    offsets: dict[str, int]
    ahead: tuple[str, ...]
    start: dict[str, float]
    end: dict[str, float]
    seconds: float
    cold_seconds: float

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks by name."""
        return {name: data["task"] for name, data in self.dag.nodes(data=True)}

    @cached_property
    def peak(self) -> dict[str, int]:
        """The highest byte in use of each arena."""
        peak = dict.fromkeys(self.capacity, 0)
        for name, offset in self.offsets.items():
            unit = self.units[name]
            peak[unit.arena] = max(peak.get(unit.arena, 0), offset + unit.bytes)
        return peak

    @cached_property
    def busy(self) -> dict[Stream, float]:
        """The seconds of a step for which each stream runs something."""
        return {
            stream: sum(self.tasks[name].seconds for name in names)
            for stream, names in self.order.items()
        }

    @cached_property
    def limiting(self) -> Stream:
        """The stream with the most to do."""
        return max(self.busy, key=lambda stream: self.busy[stream], default=Stream.COMPUTE)

    @cached_property
    def overlap(self) -> float:
        """The share of the time with a transfer under way in which compute is busy too."""
        spans: dict[bool, list[Span]] = defaultdict(list)
        for name, task in self.tasks.items():
            spans[task.stream is Stream.COMPUTE] += self._within(self.start[name], self.end[name])
        compute, transfers = union(spans[True]), union(spans[False])
        total = sum(end - start for start, end in transfers)
        return shared(compute, transfers) / total if total > 0 else 1.0

    def draw(self, path: str | Path, measured: Mapping[str, Span] | None = None) -> Path:
        """Draw the timeline of a step into an SVG file: a row for each stream.

        Parameters
        ----------
        path
            Where to write; it ends in ``.svg``.
        measured
            Start and end of tasks in seconds, by any clock: drawn below the predicted ones,
            with the first compute task in the same place.

        Raises
        ------
        OptionError
            If the suffix is another one.
        """
        from zograph.schedule.chart import chart

        path = Path(path)
        if path.suffix != ".svg":
            raise OptionError(f"cannot draw {path.name!r}: a timeline is an .svg file")
        if measured:
            compute = self.order.get(Stream.COMPUTE, ())
            first = next((n for n in compute if n in measured), next(iter(measured)))
            shift = self.start[first] - measured[first][0]
            measured = {n: (a + shift, b + shift) for n, (a, b) in measured.items()}
        path.write_text(chart(self, measured or None), encoding="utf-8")
        return path

    def _within(self, start: float, end: float) -> list[Span]:
        """Return a span of the endless timeline as spans of one period."""
        if self.seconds <= 0 or end <= start:
            return []
        length = min(end - start, self.seconds)
        first = start % self.seconds
        if first + length <= self.seconds:
            return [(first, first + length)]
        return [(first, self.seconds), (0.0, first + length - self.seconds)]


def union(spans: Iterable[Span]) -> list[Span]:
    """Return the spans that cover the same time without touching each other, in order.

    Examples
    --------
    >>> union([(3, 4), (0, 1), (0.5, 2)])
    [(0, 2), (3, 4)]
    """
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def shared(a: list[Span], b: list[Span]) -> float:
    """Return how much time two lists from :func:`union` have in common.

    Examples
    --------
    >>> shared([(0, 2), (3, 4)], [(1, 3.5)])
    1.5
    """
    i = j = 0
    total = 0.0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
