"""The CPU engine: order, events, errors, interrupts and the end of its threads."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zograph.test_offload import compiled, same, train, usual, weights
from zograph.engine.threads import Board, Session
from zograph.schedule import Schedule, Stream, Task, Unit, schedule
from zograph.stores.host import HostStore

LIMIT = 20.0
"""Seconds after which something hangs."""


def guarded(run: Callable[[], None]) -> BaseException | None:
    """Run on a thread of its own; return what it raised, fail if it does not end."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001  (handed on)
            raised.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive(), "the engine hangs"
    return raised[0] if raised else None


def pipeline(stages: int, slots: int) -> Schedule:
    """Fetch, compute and write back `stages` weights through `slots` slots."""
    dag, size = nx.DiGraph(), 4096
    units = {str(i): Unit(str(i), "device", size) for i in range(stages)}
    last = None
    for i in range(stages):
        cell = (f"w{i}",)
        tasks = [
            Task(f"fetch {i}", Stream.READ, 1.0, fills=str(i), loads=cell),
            Task(f"fold {i}", Stream.COMPUTE, 0.1, writes=(str(i),)),
            Task(f"body {i}", Stream.COMPUTE, 1.0, reads=(str(i),)),
            Task(f"writeback {i}", Stream.WRITE, 1.0, reads=(str(i),), stores=cell),
        ]
        for task in tasks:
            dag.add_node(task.name, task=task)
        dag.add_edges_from(pairwise(t.name for t in tasks[:3]))
        dag.add_edge(f"fold {i}", f"writeback {i}")
        if last is not None:
            dag.add_edge(last, f"body {i}")
        last = f"body {i}"
    return schedule(dag, units, {"device": slots * size})


def alive() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("zograph ")}


@pytest.fixture(autouse=True)
def _no_thread_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = alive()
    yield
    gc.collect()
    left = alive() - before
    for thread in left:
        thread.join(LIMIT)
    assert not {t for t in left if t.is_alive()}


class Log:
    """Records when tasks start and end, and moves a value through every slot."""

    def __init__(self, found: Schedule, seed: int, most: float = 2e-3) -> None:
        self.found, self.random, self.most = found, random.Random(seed), most
        self.lock = threading.Lock()
        self.lines: list[tuple[str, str, str]] = []
        """(start or end, task, thread) in order."""
        self.actions = {name: self.action(name) for name in found.dag}

    def action(self, name: str) -> Callable[[], None]:
        def run() -> None:
            with self.lock:
                self.lines.append(("start", name, threading.current_thread().name))
                pause = self.random.random() * self.most
            time.sleep(pause)
            with self.lock:
                self.lines.append(("end", name, threading.current_thread().name))

        return run

    def check(self, steps: int) -> None:
        """Assert that streams and events were kept, from step to step."""
        start: dict[tuple[str, int], int] = {}
        end: dict[tuple[str, int], int] = {}
        for at, (what, name, thread) in enumerate(self.lines):
            table = start if what == "start" else end
            count = sum((name, i) in table for i in range(steps + 2))
            table[name, count] = at
            stream = self.found.tasks[name].stream
            assert thread == f"zograph {stream}"
        for stream, names in self.found.order.items():
            ran = [n for w, n, t in self.lines if w == "start" and t == f"zograph {stream}"]
            assert ran[: steps * len(names)] == list(names) * steps
        for name in self.found.dag:
            ahead = name in self.found.ahead
            assert (name, steps - 1) in end
            assert ((name, steps) in end) == ahead
        for event in self.found.events:
            for i in range(steps):
                if i >= event.lag:
                    assert end[event.before, i - event.lag] < start[event.after, i], event


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_streams_and_events_are_kept_under_random_delays(slots: int) -> None:
    found = pipeline(5, slots)
    assert any(e.lag for e in found.events)
    for seed in range(3):
        log = Log(found, seed)
        session = Session(found, log.actions)

        def run(session: Session = session) -> None:
            for _ in range(4):
                session.run()
            session.drain()

        assert guarded(run) is None
        log.check(4)
        session.close()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_random_dags(data: st.DataObject) -> None:
    dag, count = nx.DiGraph(), data.draw(st.integers(1, 9))
    for i in range(count):
        stream = data.draw(st.sampled_from([Stream.READ, Stream.COMPUTE, Stream.WRITE]))
        dag.add_node(f"t{i}", task=Task(f"t{i}", stream, 1.0))
        for j in range(i):
            if data.draw(st.booleans()):
                dag.add_edge(f"t{j}", f"t{i}")
    found = schedule(dag, {}, {})
    log = Log(found, data.draw(st.integers(0, 99)), most=1e-3)
    session = Session(found, log.actions)

    def run() -> None:
        for _ in range(3):
            session.run()
        session.drain()

    assert guarded(run) is None
    log.check(3)
    session.close()


def test_the_check_of_events_can_fail() -> None:
    found = pipeline(3, 1)
    log = Log(found, 0)
    session = Session(found, log.actions)
    session.run()
    session.drain()
    session.close()
    event = next(e for e in found.events if e.lag == 0)
    lines = [x for x in log.lines if x[1] != event.after]
    log.lines = [x for x in log.lines if x[1] == event.after] + lines
    with pytest.raises(AssertionError):
        log.check(1)


def test_run_returns_when_compute_has_ended_and_drain_when_all_has() -> None:
    found, gate, done = pipeline(2, 2), threading.Event(), []
    last = found.order[Stream.WRITE][-1]

    def wait() -> None:
        assert gate.wait(LIMIT)
        done.append(last)

    actions = {n: (wait if n == last else lambda: None) for n in found.dag}
    session = Session(found, actions)
    assert guarded(session.run) is None
    assert not done
    gate.set()
    assert guarded(session.drain) is None
    assert done == [last]
    assert found.dag.nodes.keys() == session.measured.keys()
    session.close()


class Boom(Exception):
    pass


@pytest.mark.parametrize("name", ["fetch 0", "fold 1", "body 2", "writeback 2", "fetch 2"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_failing_task_surfaces_once_as_its_own_error(name: str, at: int) -> None:
    found, error, ran = pipeline(3, 2), Boom("the disk is gone"), []

    def action(task: str) -> Callable[[], None]:
        def run() -> None:
            ran.append(task)
            if task == name and ran.count(task) == at + 1:
                raise error

        return run

    session = Session(found, {n: action(n) for n in found.dag})

    def run() -> None:
        for _ in range(4):
            session.run()
        session.drain()

    assert guarded(run) is error
    count = len(ran)
    assert guarded(session.close) is None
    assert ran.count(name) == at + 1
    assert len(ran) == count  # nothing starts behind the failure was seen
    assert not any(t.is_alive() for t in session._threads)


def test_an_error_behind_the_last_step_surfaces_in_drain() -> None:
    found, error = pipeline(2, 2), Boom()
    last = found.order[Stream.WRITE][-1]

    def fail() -> None:
        time.sleep(0.05)
        raise error

    session = Session(found, {n: (fail if n == last else lambda: None) for n in found.dag})
    assert guarded(session.run) is None
    assert guarded(session.drain) is error
    session.close()


def test_close_and_drain_twice() -> None:
    found = pipeline(3, 2)
    session = Session(found, {n: lambda: None for n in found.dag})
    assert guarded(session.drain) is None  # before anything ran
    assert guarded(session.run) is None
    for _ in range(2):
        assert guarded(session.drain) is None
    for _ in range(2):
        assert guarded(session.close) is None


def test_close_lets_running_tasks_end_and_drops_the_others() -> None:
    found, started, ran = pipeline(4, 1), threading.Event(), []

    def slow() -> None:
        started.set()
        time.sleep(0.1)
        ran.append("slow")

    first = found.order[Stream.READ][0]
    actions = {n: (lambda n=n: ran.append(n)) for n in found.dag}
    session = Session(found, actions | {first: slow})
    ends: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: ends.append(guarded(session.run)), daemon=True)
    thread.start()
    assert started.wait(LIMIT)
    assert guarded(session.close) is None
    assert ran == ["slow"]
    thread.join(LIMIT)
    assert [type(e) for e in ends] == [RuntimeError]  # who waits is told
    assert isinstance(guarded(session.run), RuntimeError)


def test_threads_end_with_the_session_and_with_the_step() -> None:
    before = alive()
    session = Session(pipeline(2, 2), {n: lambda: None for n in pipeline(2, 2).dag})
    session.run()
    threads = alive() - before
    assert len(threads) == 3
    session.drain()
    del session
    gc.collect()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()

    step = compiled("toy", memory="minimum")
    step(**usual("toy")(0)[0])
    threads, gone = alive() - before, weakref.ref(step)
    assert threads
    del step
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()


def test_a_step_without_streams_starts_no_thread() -> None:
    before = alive()
    step = compiled("toy")
    step(**usual("toy")(0)[0])
    assert alive() == before


@pytest.mark.parametrize("where", ["read", "write"])
def test_a_keyboard_interrupt_in_a_worker_loses_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(compiled("toy"), usual("toy"), 5)
    original, count = getattr(HostStore, where), [0]

    def interrupted(self: HostStore, *args: object) -> int:
        count[0] += 1
        if count[0] == 17:
            raise KeyboardInterrupt
        return int(original(self, *args))

    step, records = compiled("toy", memory="minimum"), []
    monkeypatch.setattr(HostStore, where, interrupted)
    while len(records) < 5:
        try:
            step(**usual("toy")(len(records))[0])
        except KeyboardInterrupt:
            continue
        records.append(step.last)
    step.synchronize()
    assert count[0] > 17
    assert tuple(records) == expected.records
    assert same(weights(step.model), expected.weights)


CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.conftest import SPEC
from zograph.device import DeviceSpec
DeviceSpec.measure = classmethod(lambda cls, *a, **k: SPEC)
import torch
from tests.zograph.test_offload import compiled, same, train, usual, weights
from zograph.stores.disk import DiskStore

signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
torch.set_num_threads(1)
expected = train(compiled("toy"), usual("toy"), 6)
step, records, hits = compiled("toy", memory="minimum", storage="work"), [], 0
step.prepare(**usual("toy")(0)[0])
read = DiskStore.read
def slow(self, name, buffer):
    time.sleep(0.01)
    return read(self, name, buffer)
DiskStore.read = slow
print("ready", flush=True)
while len(records) < 6 or not hits:
    try:
        step(**usual("toy")(len(records))[0])
        records.append(step.last)
    except KeyboardInterrupt:
        hits += 1
        assert not [t for t in threading.enumerate() if t.name.startswith("zograph ")]
    if len(records) == 6 and not hits:
        records, step = [], compiled("toy", memory="minimum", storage=f"work{time.time()}")
while True:
    try:
        step.synchronize()
        break
    except KeyboardInterrupt:
        hits += 1
assert tuple(records) == expected.records, "losses"
assert same(weights(step.model), expected.weights), "weights"
print("same", hits, flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_in_a_child_leaves_the_step_usable() -> None:
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", child.communicate(timeout=60)[1]
        for pause in (0.15, 0.2, 0.1):
            time.sleep(pause)
            child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 0, err
    assert out.startswith("same ")
    assert int(out.split()[1]) >= 1


def test_ctrl_c_at_any_moment_leaves_the_board_free() -> None:
    """An interruption that comes as the lock is taken must give it back."""
    board, hits, end = Board(pipeline(1, 1)), 0, time.monotonic() + 2
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        while time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, (20 + hits % 97) * 1e-6)
                while True:
                    board.issue({})
                    board.wait({})
            hits += 1
            free = threading.Thread(target=board.issue, args=({},), daemon=True)
            free.start()
            free.join(5)
            assert not free.is_alive()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 100


LEAVING = """
import os, threading, time
import torch
from tests.zograph.test_engine import pipeline
from zograph.engine.threads import Session

def task(name):
    def run():
        if name.startswith("writeback"):
            begun.set()
            time.sleep(0.3)
            torch.ones(300, 300) @ torch.ones(300, 300)
            os.write(1, b"ended ")
    return run

found, begun = pipeline(1, 1), threading.Event()
session = Session(found, {n: task(n) for n in found.dag})
session.run()
begun.wait()
"""


@pytest.mark.slow
def test_a_process_that_ends_lets_the_task_under_way_end() -> None:
    root = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "ended "), done.stderr


def test_gradients_are_off_on_the_threads() -> None:
    found, modes = pipeline(1, 1), []
    actions = {n: (lambda: modes.append(torch.is_grad_enabled())) for n in found.dag}
    session = Session(found, actions)
    session.run()
    session.drain()
    session.close()
    assert set(modes) == {False}
