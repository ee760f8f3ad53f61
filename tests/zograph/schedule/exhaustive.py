"""The best a small step can do, by trying every order of dispatch. Shares no code with zograph."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx

from tests.zograph.schedule.dags import Case
from zograph.schedule import Stream, Task

PAGE = 4096
STEPS = 10

Place = tuple[int, int]


def orders(dag: nx.DiGraph) -> Iterator[list[Task]]:
    for names in nx.all_topological_sorts(dag):
        yield [dag.nodes[name]["task"] for name in names]


def places(case: Case, order: list[Task]) -> list[dict[str, Place]]:
    """All ways to place each unit on a multiple of the page while the tasks run one by one."""
    last = {u: t.name for t in order for u in (t.fills, *t.reads, *t.writes) if u}
    found: list[dict[str, Place]] = [{}]
    live: set[str] = set()
    for task in order:
        if task.fills:
            unit = case.units[task.fills]
            longer = []
            for before in found:
                taken = [before[u] for u in live if case.units[u].arena == unit.arena]
                for at in range(0, case.capacity[unit.arena] - unit.bytes + 1, PAGE):
                    span = (at, at + unit.bytes)
                    if all(span[1] <= a or b <= span[0] for a, b in taken):
                        longer.append({**before, unit.name: span})
            found = longer
            live.add(unit.name)
        live -= {u for u, name in last.items() if name == task.name}
    return found


def run(case: Case, order: list[Task], place: dict[str, Place]) -> tuple[float, float]:
    """Time of the first step, and of a step in the long run, everything as early as it may."""
    free: dict[Stream, float] = {}
    loaded: dict[str, float] = {}
    stored: dict[str, float] = {}
    used: dict[str, float] = {}  # the end of a unit's last use, over all steps
    computed = []
    cold = 0.0
    for step in range(STEPS):
        ends: dict[str, float] = {}
        for task in order:
            begin = free.get(task.stream, 0.0)
            begin = max([begin, *(ends[name] for name in case.dag.predecessors(task.name))])
            begin = max([begin, *(stored.get(c, 0.0) for c in (*task.loads, *task.stores))])
            begin = max([begin, *(loaded.get(c, 0.0) for c in task.stores)])
            if task.fills:
                a, b = place[task.fills]
                arena = case.units[task.fills].arena
                for other, (c, d) in place.items():
                    if case.units[other].arena == arena and c < b and a < d:
                        begin = max(begin, used.get(other, 0.0))
            end = begin + task.seconds
            ends[task.name] = free[task.stream] = end
            for u in (task.fills, *task.reads, *task.writes):
                if u:
                    used[u] = max(used.get(u, 0.0), end)
            for c in task.loads:
                loaded[c] = max(loaded.get(c, 0.0), end)
            for c in task.stores:
                stored[c] = max(stored.get(c, 0.0), end)
        if step == 0:
            cold = max(ends.values())
        computed.append(max(e for n, e in ends.items() if "body" in n or n[0] == "t"))
    half = STEPS // 2
    return cold, (computed[-1] - computed[half - 1]) / half


def best(case: Case) -> tuple[float, float]:
    """The shortest first step, and the shortest step in the long run, over all orders."""
    found = [run(case, order, place) for order in orders(case.dag) for place in places(case, order)]
    return min(cold for cold, _ in found), min(steady for _, steady in found)
