"""The CUDA engine on a simulated device, whose streams run late and at their own pace."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable

import networkx as nx
import pytest
import torch

from tests.zograph.fake_cuda import FakeCuda
from tests.zograph.schedule.dags import BUILDERS, Case, mixed
from zograph.engine.cuda import DEVICE_STREAMS, CudaSession
from zograph.schedule import Schedule, schedule

STEPS = 4


class Machine:
    """Runs the tasks of a schedule on integers: slots are pages, stored weights are cells."""

    def __init__(self, found: Schedule, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.found, self.delay = found, delay
        self.pages: dict[tuple[str, int], int] = {}
        self.cells: dict[str, int] = {}
        self.seen: list[tuple[str, int]] = []

    def unit(self, name: str) -> list[tuple[str, int]]:
        unit, offset = self.found.units[name], self.found.offsets[name]
        return [(unit.arena, p) for p in range(offset // 4096, -(-(offset + unit.bytes) // 4096))]

    def run(self, name: str) -> None:
        task = self.found.tasks[name]
        used = [p for u in (*task.reads, *task.writes) for p in self.unit(u)]
        before = [self.pages.get(p, 0) for p in used] + [self.cells.get(c, 0) for c in task.loads]
        time.sleep(self.delay())
        value = hash((name, tuple(before)))
        for page in [p for u in task.writes for p in self.unit(u)]:
            self.pages[page] = value
        for page in self.unit(task.fills) if task.fills else ():
            self.pages[page] = value
        time.sleep(self.delay())
        self.cells |= dict.fromkeys(task.stores, value)
        if name.startswith("body"):
            self.seen.append((name, value))


def alone(found: Schedule) -> Machine:
    """Run the steps one task after the other."""
    machine = Machine(found)
    for _ in range(STEPS):
        for name in nx.lexicographical_topological_sort(found.dag, key=list(found.dag).index):
            machine.run(name)
    return machine


def on_streams(found: Schedule, seed: int) -> Machine:
    """Run the steps on a simulated device with random delays."""
    rng = random.Random(seed)
    machine = Machine(found, lambda: rng.choice((0.0, 0.0, 0.0005, 0.002)))
    cuda = FakeCuda()

    def action(name: str) -> Callable[[], None]:
        if found.tasks[name].stream in DEVICE_STREAMS:
            return lambda: cuda.current_stream().issue(lambda: machine.run(name))
        return lambda: machine.run(name)

    device = torch.device("cpu")
    session = CudaSession(found, {n: action(n) for n in found.dag}, device, cuda)
    for _ in range(STEPS):
        session.run()
    session.drain()
    session.close()
    return machine


def found_for(case: Case) -> Schedule:
    return schedule(case.dag, case.units, case.capacity)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("slots", [1, 2])
def test_late_streams_change_nothing(name: str, slots: int) -> None:
    found = found_for(BUILDERS[name](mixed(5, 3), slots))
    expected = alone(found)
    for seed in range(3):
        machine = on_streams(found, seed)
        assert machine.seen == expected.seen
        assert machine.cells == expected.cells


def test_no_thread_but_the_disks_waits_for_the_device() -> None:
    on_streams(found_for(BUILDERS["cuda-host"](mixed(5, 3), 2)), 0)
    assert not FakeCuda.host_waits
    on_streams(found_for(BUILDERS["cuda-disk"](mixed(5, 3), 2)), 0)
    assert set(FakeCuda.host_waits) <= {"zograph read", "zograph write"}
    assert FakeCuda.host_waits


def test_without_events_the_result_differs() -> None:
    """The simulation can tell: device streams that do not wait read what is not there yet."""
    found = found_for(BUILDERS["cuda-host"](mixed(5, 3), 2))
    blind = dataclasses.replace(found, events=())
    expected = alone(found)
    assert any(on_streams(blind, seed).seen != expected.seen for seed in range(5))
