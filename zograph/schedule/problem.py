"""A step's dag with numbers for names, and the order that its data demand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from zograph.schedule.tasks import Stream, Task, Unit

STREAMS = tuple(Stream)


@dataclass(frozen=True)
class Problem:
    """What is to be scheduled. Tasks are numbered as they would run one at a time.

    That order is the topological one that keeps the order of insertion where the dag leaves a
    choice. Accesses to a cell, and in-place writes of a unit, stay in this order.

    Attributes
    ----------
    tasks, units
        What the numbers stand for.
    arenas
        Names of the arenas.
    stream, seconds
        Of each task; the stream as an index into :data:`STREAMS`.
    before, after
        For each task, those of the same step that must end before it, and those that wait.
    past
        For each task, those of the previous step that must end before it, for their cells.
    fills
        For each task, the unit whose memory it takes, or -1.
    uses
        For each task, all units that it touches.
    users
        For each unit, all tasks that touch it.
    arena
        For each unit, the index of its arena.
    """

    tasks: tuple[Task, ...]
    units: tuple[Unit, ...]
    arenas: tuple[str, ...]
    stream: tuple[int, ...]
    seconds: tuple[float, ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    past: tuple[tuple[int, ...], ...]
    fills: tuple[int, ...]
    uses: tuple[tuple[int, ...], ...]
    users: tuple[tuple[int, ...], ...]
    arena: tuple[int, ...]


def compiled(dag: nx.DiGraph, units: Mapping[str, Unit]) -> Problem:
    """Number a dag's tasks and add the order of their accesses to the dag's own edges.

    Raises
    ------
    ValueError
        If the dag has a cycle, a node without its task, or a unit that is not filled exactly once
        before its other uses.
    """
    order = sequential(dag)
    tasks = tuple(dag.nodes[name]["task"] for name in order)
    number = {name: i for i, name in enumerate(order)}
    filled = {task.fills: i for i, task in enumerate(tasks) if task.fills is not None}
    if unknown := sorted(filled.keys() - units.keys()):
        raise ValueError(f"the unit {unknown[0]!r} is filled but not declared")
    used = tuple(units[name] for name in filled)
    index = {name: i for i, name in enumerate(filled)}
    uses = [tuple(dict.fromkeys(index[u] for u in touched(task))) for task in tasks]
    users: list[list[int]] = [[] for _ in used]
    for i, own in enumerate(uses):
        for u in own:
            users[u].append(i)

    before: list[set[int]] = [set() for _ in tasks]
    past: list[set[int]] = [set() for _ in tasks]
    for a, b in dag.edges:
        before[number[b]].add(number[a])
    for u, own_users in enumerate(users):
        name = used[u].name
        accesses = [(i, name in tasks[i].writes or tasks[i].fills == name) for i in own_users]
        for i, j, lag in conflicts(accesses):
            if lag == 0:
                before[j].add(i)
    for cell in cells(tasks):
        for i, j, lag in conflicts(cell):
            (past if lag else before)[j].add(i)
    after: list[list[int]] = [[] for _ in tasks]
    for j, own_before in enumerate(before):
        for i in sorted(own_before):
            after[i].append(j)
    arenas = tuple(dict.fromkeys(unit.arena for unit in used))
    return Problem(
        tasks=tasks,
        units=used,
        arenas=arenas,
        stream=tuple(STREAMS.index(task.stream) for task in tasks),
        seconds=tuple(task.seconds for task in tasks),
        before=tuple(tuple(sorted(s)) for s in before),
        after=tuple(map(tuple, after)),
        past=tuple(tuple(sorted(s)) for s in past),
        fills=tuple(-1 if task.fills is None else index[task.fills] for task in tasks),
        uses=tuple(uses),
        users=tuple(map(tuple, users)),
        arena=tuple(arenas.index(unit.arena) for unit in used),
    )


def sequential(dag: nx.DiGraph) -> list[str]:
    """Return the order in which one worker would run the tasks, fills before uses."""
    full = nx.DiGraph()
    full.add_nodes_from(dag)
    full.add_edges_from(dag.edges)
    filler: dict[str, str] = {}
    for name, data in dag.nodes(data=True):
        task = data.get("task")
        if not isinstance(task, Task) or task.name != name:
            raise ValueError(f"the node {name!r} has no attribute `task` of that name")
        if task.fills is not None and filler.setdefault(task.fills, name) != name:
            raise ValueError(f"{filler[task.fills]!r} and {name!r} both fill {task.fills!r}")
    for name, data in dag.nodes(data=True):
        for unit in touched(data["task"]):
            if unit not in filler:
                raise ValueError(f"{name!r} uses the unit {unit!r}, which no task fills")
            if filler[unit] != name:
                full.add_edge(filler[unit], name)
    position = {name: i for i, name in enumerate(dag)}
    try:
        return list(nx.lexicographical_topological_sort(full, key=position.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(a for a, _ in nx.find_cycle(full))
        raise ValueError(f"the dag has a cycle: {cycle}") from None


def touched(task: Task) -> tuple[str, ...]:
    """Return the names of all units that a task uses."""
    own = () if task.fills is None else (task.fills,)
    return (*own, *task.writes, *task.reads)


def cells(tasks: Sequence[Task]) -> Iterator[tuple[tuple[int, bool], ...]]:
    """Return who loads (False) and stores (True) a cell, in order, once for cells alike."""
    accesses: dict[str, dict[int, bool]] = defaultdict(dict)
    for i, task in enumerate(tasks):
        for cell in task.loads:
            accesses[cell][i] = False
        for cell in task.stores:
            accesses[cell][i] = True
    yield from dict.fromkeys(tuple(own.items()) for own in accesses.values())


def conflicts(accesses: Iterable[tuple[int, bool]]) -> Iterator[tuple[int, int, int]]:
    """Return neighbours that must stay in order when a list of accesses repeats every step.

    Parameters
    ----------
    accesses
        Tasks in order, and whether each writes.

    Yields
    ------
    tuple of int
        Before, after, and the lag in steps. What follows from these is left out.

    Examples
    --------
    >>> list(conflicts([(0, False), (3, True)]))  # a load, then a store
    [(3, 0, 1), (0, 3, 0)]
    """
    accesses = list(accesses)
    writer: tuple[int, int] | None = None
    readers: list[tuple[int, int]] = []
    for lap in (0, 1):
        for task, writes in accesses:
            waits = readers if writes and readers else [writer] if writer else []
            if lap == 1:
                yield from ((other, task, lap - at) for other, at in waits if other != task)
            if writes:
                writer, readers = (task, lap), []
            else:
                readers.append((task, lap))
