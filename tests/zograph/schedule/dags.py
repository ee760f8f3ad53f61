"""Steps to schedule: streamed chains on every kind of machine, tied weights, random dags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from hypothesis import strategies as st

from zograph.schedule import Stream, Task, Unit

PAGE = 4096


@dataclass(frozen=True)
class Case:
    """The arguments of `schedule`."""

    dag: nx.DiGraph
    units: dict[str, Unit]
    capacity: dict[str, int]


@dataclass(frozen=True)
class Cost:
    """Seconds of a stage's tasks, and its bytes."""

    fetch: float = 1.0
    fold: float = 0.25
    body: float = 1.0
    store: float = 1.0
    bytes: int = PAGE


def add(dag: nx.DiGraph, task: Task, *after: str) -> None:
    dag.add_node(task.name, task=task)
    dag.add_edges_from((name, task.name) for name in after)


def chain(
    costs: Sequence[Cost],
    slots: int = 2,
    *,
    fetch: Stream = Stream.READ,
    store: Stream = Stream.WRITE,
    tied: Mapping[int, int] | None = None,
    frozen: bool = False,
) -> Case:
    """A chain of streamed stages; stage `i` of `tied` loads the cell of stage `tied[i]` as well."""
    dag, units = nx.DiGraph(), {}
    for i, cost in enumerate(costs):
        unit = Unit(f"u{i}", "device", cost.bytes)
        units[unit.name] = unit
        first = (tied or {}).get(i)
        loads = (f"w{i}",) if first is None else (f"w{i}", f"w{first}")
        add(dag, Task(f"fetch {i}", fetch, cost.fetch, fills=unit.name, loads=loads))
        if first is not None:
            dag.add_edge(f"writeback {first}", f"fetch {i}")
        add(dag, Task(f"fold {i}", Stream.COMPUTE, cost.fold, writes=(unit.name,)), f"fetch {i}")
        add(dag, Task(f"body {i}", Stream.COMPUTE, cost.body, reads=(unit.name,)), f"fold {i}")
        if i:
            dag.add_edge(f"body {i - 1}", f"body {i}")
        if not frozen:
            stored = Task(
                f"writeback {i}", store, cost.store, reads=(unit.name,), stores=(f"w{i}",)
            )
            add(dag, stored, f"fold {i}")
    return Case(dag, units, {"device": slots * max(cost.bytes for cost in costs)})


def cpu_disk(costs: Sequence[Cost], slots: int = 2) -> Case:
    return chain(costs, slots)


def cpu_host(costs: Sequence[Cost], slots: int = 2) -> Case:
    return chain(costs, slots, fetch=Stream.TO_DEVICE, store=Stream.TO_HOST)


cuda_host = cpu_host


def tied(costs: Sequence[Cost], slots: int = 2) -> Case:
    """The last stage uses the first one's weight, as a language model's head its embedding."""
    return chain(costs, slots, tied={len(costs) - 1: 0} if len(costs) > 1 else {})


def frozen(costs: Sequence[Cost], slots: int = 2) -> Case:
    """Nothing is written back."""
    return chain(costs, slots, frozen=True)


def cuda_disk(costs: Sequence[Cost], slots: int = 2) -> Case:
    """From the disk through staging buffers to the device, and back the same way."""
    dag, units = nx.DiGraph(), {}
    for i, cost in enumerate(costs):
        for name, arena in ((f"u{i}", "device"), (f"in{i}", "staging"), (f"out{i}", "staging")):
            units[name] = Unit(name, arena, cost.bytes)
        add(dag, Task(f"read {i}", Stream.READ, cost.fetch, fills=f"in{i}", loads=(f"w{i}",)))
        up = Task(f"fetch {i}", Stream.TO_DEVICE, cost.fetch / 4, fills=f"u{i}", reads=(f"in{i}",))
        add(dag, up, f"read {i}")
        add(dag, Task(f"fold {i}", Stream.COMPUTE, cost.fold, writes=(f"u{i}",)), f"fetch {i}")
        add(dag, Task(f"body {i}", Stream.COMPUTE, cost.body, reads=(f"u{i}",)), f"fold {i}")
        if i:
            dag.add_edge(f"body {i - 1}", f"body {i}")
        down = Task(f"save {i}", Stream.TO_HOST, cost.store / 4, fills=f"out{i}", reads=(f"u{i}",))
        add(dag, down, f"fold {i}")
        out = Task(f"write {i}", Stream.WRITE, cost.store, reads=(f"out{i}",), stores=(f"w{i}",))
        add(dag, out, f"save {i}")
    most = max(cost.bytes for cost in costs)
    return Case(dag, units, {"device": slots * most, "staging": 2 * slots * most})


BUILDERS: dict[str, Callable[..., Case]] = {
    "cpu-disk": cpu_disk,
    "cpu-host": cpu_host,
    "cuda-host": cuda_host,
    "cuda-disk": cuda_disk,
    "tied": tied,
    "frozen": frozen,
}


def mixed(count: int, seed: int = 0) -> list[Cost]:
    """Stages of unlike size and speed, the same for a seed."""
    found = []
    state = seed * 7919 + 12345
    for _ in range(count):
        state = (state * 1103515245 + 12345) % (1 << 31)
        a, b, c, d = (state >> 4) % 7, (state >> 9) % 5, (state >> 14) % 9, (state >> 19) % 6
        found.append(Cost(1 + a, 0.5 + b / 4, 1 + c, 1 + d, PAGE * (1 + a) - 100 * b))
    return found


def cases() -> Iterator[tuple[str, Case]]:
    """Yield a few real steps of every kind, with their names."""
    for name, build in BUILDERS.items():
        if name == "cuda-host":
            continue  # the tasks of cpu-host
        for count, slots in ((1, 1), (2, 2), (3, 1), (5, 2), (7, 3), (12, 2)):
            yield f"{name}, {count} stages, {slots} slots", build([Cost()] * count, slots)
            yield f"{name}, {count} unlike stages, {slots} slots", build(mixed(count, count), slots)


COSTS = st.builds(
    Cost,
    fetch=st.integers(0, 8).map(float),
    fold=st.integers(0, 3).map(float),
    body=st.integers(0, 8).map(float),
    store=st.integers(0, 8).map(float),
    bytes=st.integers(1, 3 * PAGE),
)


@st.composite
def streamed(draw: st.DrawFn, most: int = 6) -> Case:
    """A chain of any kind with any costs."""
    build = draw(st.sampled_from(sorted(BUILDERS)))
    costs = draw(st.lists(COSTS, min_size=1, max_size=most))
    return BUILDERS[build](costs, draw(st.integers(1, 3)))


@st.composite
def anything(draw: st.DrawFn, most: int = 12) -> Case:
    """A random dag: any stream, any edges, units with any users, cells loaded and stored anywhere.

    The capacity is left empty.
    """
    count = draw(st.integers(1, most))
    units: dict[str, Unit] = {}
    dag = nx.DiGraph()
    for i in range(count):
        fills = None
        if draw(st.booleans()):
            fills = f"u{i}"
            arena = draw(st.sampled_from(["device", "device", "staging"]))
            units[fills] = Unit(fills, arena, draw(st.integers(1, 3 * PAGE)))
        others = sorted(units.keys() - {fills})
        some = st.lists(st.sampled_from(others), unique=True, max_size=2) if others else st.just([])
        cells = st.lists(st.sampled_from("abc"), unique=True, max_size=1).map(tuple)
        task = Task(
            f"t{i}",
            draw(st.sampled_from(list(Stream))),
            draw(st.integers(0, 5).map(float)),
            fills=fills,
            reads=tuple(draw(some)),
            writes=tuple(draw(some)),
            loads=draw(cells),
            stores=draw(cells),
        )
        add(dag, task)
        for j in range(i):
            if draw(st.integers(0, 3)) == 0:
                dag.add_edge(f"t{j}", f"t{i}")
    return Case(dag, units, {})
