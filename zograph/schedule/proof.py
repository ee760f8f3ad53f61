"""What must have ended when a task of a schedule starts, whatever the tasks take.

The race verifier builds upon it. It shares no code with the scheduler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from itertools import pairwise

import networkx as nx

from zograph.schedule.result import Schedule
from zograph.schedule.tasks import Task

STEPS = 3
LAST = STEPS - 1
"""The step that is judged: lags are 0 or 1, so it has as much before it as ever matters."""


class Proof:
    """What must have ended when a task starts, over all executions.

    Tasks are numbered as one worker would run them. Bit `step * count + number` of a mask stands
    for a task in a step.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.names = list(sequential(schedule))
        self.number = {name: i for i, name in enumerate(self.names)}
        self.count = len(self.names)
        self.tasks: list[Task] = [schedule.dag.nodes[name]["task"] for name in self.names]
        graph = nx.DiGraph()
        graph.add_nodes_from(range(STEPS * self.count))
        for names in schedule.order.values():
            line = [self.bit(name, step) for step in range(STEPS) for name in names]
            graph.add_edges_from(pairwise(line))
        for event in schedule.events:
            for step in range(event.lag, STEPS):
                graph.add_edge(
                    self.bit(event.before, step - event.lag), self.bit(event.after, step)
                )
        self.ended = [0] * (STEPS * self.count)
        done: set[int] = set()
        waits = dict(graph.in_degree())
        ready = [node for node, degree in waits.items() if degree == 0]
        while ready:
            node = ready.pop()
            done.add(node)
            mask = self.ended[node] | 1 << node
            for other in graph.successors(node):
                self.ended[other] |= mask
                waits[other] -= 1
                if waits[other] == 0:
                    ready.append(other)
        stuck = [node for node in graph if node not in done]
        self.stuck = [self.names[node % self.count] for node in stuck]

    def bit(self, name: str, step: int) -> int:
        """The number of a task in a step."""
        return step * self.count + self.number[name]

    def mask(self, numbers: Collection[int], step: int) -> int:
        """The bits of some tasks in a step."""
        mask = 0
        for number in numbers:
            mask |= 1 << step * self.count + number
        return mask

    def follows(self, after: int, step: int, mask: int) -> bool:
        """Whether all tasks of a mask have ended when a task starts."""
        return mask & ~self.ended[step * self.count + after] == 0


def units_of(task: Task) -> set[str]:
    """Return the names of the units that a task touches."""
    return {*task.reads, *task.writes} | ({task.fills} if task.fills else set())


def sequential(schedule: Schedule) -> Iterator[str]:
    """Yield the tasks as one worker would run them: by the dag, then by order of insertion."""
    graph = nx.DiGraph(schedule.dag.edges)
    graph.add_nodes_from(schedule.dag)
    tasks = dict(schedule.dag.nodes(data="task"))
    filler = {task.fills: name for name, task in tasks.items() if task.fills}
    for name, task in tasks.items():
        graph.add_edges_from((filler[u], name) for u in units_of(task) if filler[u] != name)
    place = {name: i for i, name in enumerate(tasks)}
    yield from nx.lexicographical_topological_sort(graph, key=lambda name: place[name])


def users_of(proof: Proof) -> dict[str, list[int]]:
    """Return the tasks that touch each unit, in order."""
    users: dict[str, list[int]] = defaultdict(list)
    for i, task in enumerate(proof.tasks):
        for name in units_of(task):
            users[name].append(i)
    return users
