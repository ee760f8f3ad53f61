"""A compiled step, run, timed and looked at from outside, for `zograph bench offload`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from zograph.cli.contest import status_bytes
from zograph.engine.threads import Action, Session
from zograph.ir import info
from zograph.memory import give_back
from zograph.meter import Meter
from zograph.pool import pool
from zograph.runtime import Runner
from zograph.schedule import Stream
from zograph.schedule.result import Span, shared, union
from zograph.slots import Slots
from zograph.step import ZOStep
from zograph.stores.base import padded


def baseline_bytes() -> int:
    """Free what is not in use, reset the process's peak, and return what it holds."""
    pool.clear()
    give_back(collect=True)
    held = status_bytes("VmRSS")
    reset_peak()
    return held


def reset_peak() -> None:
    """Make VmHWM begin again at what the process holds."""
    Path("/proc/self/clear_refs").write_text("5")


class Trial:
    """A compiled step, run, timed and looked at from outside.

    `beside` makes a context for each step to run in; its end counts as the step's.
    """

    def __init__(
        self,
        zo: ZOStep,
        batch: Mapping[str, Any],
        baseline: int,
        beside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.zo, self.batch, self.baseline, self.beside = zo, batch, baseline, beside
        self.losses: list[tuple[float, float]] = []
        self.spans: list[tuple[str, float, float]] = []
        self.fixed = 0

    @property
    def runner(self) -> Runner:
        """The runner of the compiled graph."""
        return self.zo._last_compiled().runner

    def run(self, repeats: int, *, metered: bool) -> dict[str, Any]:
        """Take two steps to warm up and `repeats` timed ones; report everything."""
        compile_peak = status_bytes("VmHWM") - self.baseline
        reset_peak()
        self.step()
        self.step()
        self.runner.drain()
        before, began = self.moved(), time.perf_counter()
        self.wrap(self.timed)
        seconds = [self.step() for _ in range(repeats)]
        ended = time.perf_counter()
        self.runner.drain()
        moved = {stream: n - before[stream] for stream, n in self.moved().items()}
        peak = status_bytes("VmHWM") - self.baseline
        plan, counted = self.zo.plan, self.metered() if metered else None
        self.runner.close()
        return {
            "seconds": seconds,
            "losses": self.losses[: repeats + 2],
            "plan": plan.to_json(),
            "compile_seconds": self.zo.compile_seconds,
            "peak_bytes": max(peak, compile_peak),
            "compile_peak_bytes": compile_peak,
            "step_peak_bytes": peak,
            "baseline_bytes": self.baseline,
            "moved_bytes": {s: n // max(repeats, 1) for s, n in moved.items()},
            "overlap": self.overlap(began, ended),
            "busy": self.busy(repeats),
            "metered": counted,
        }

    def step(self) -> float:
        """Run one step; return its seconds."""
        start = time.perf_counter()
        with self.beside():
            self.zo(**self.batch)
        last = self.zo.last
        assert last is not None
        self.losses.append((last.loss_plus, last.loss_minus))
        return time.perf_counter() - start

    def moved(self) -> dict[str, int]:
        """Return the bytes that each transfer stream has moved so far."""
        return self.runner.moved_bytes

    @property
    def slots(self) -> Slots:
        """The slots; there are some from the first step on."""
        assert self.runner.slots is not None
        return self.runner.slots

    @property
    def session(self) -> Session:
        """The threads; they run from the first step on."""
        assert self.runner._session is not None
        return self.runner._session

    def wrap(self, around: Callable[[str, Action], Action]) -> None:
        """Replace every task's action from the next step on."""
        found = self.session.actions
        self.session.actions = {task: around(task, found[task]) for task in found}

    def timed(self, task: str, action: Action) -> Action:
        """Record when a task runs."""

        def run() -> None:
            start = time.perf_counter()
            action()
            self.spans.append((task, start, time.perf_counter()))

        return run

    def overlap(self, began: float, ended: float) -> float | None:
        """Return the share of transfer time in which compute was busy; None without transfers."""
        compute, transfers = self.streams(began, ended)
        total = sum(end - start for start, end in transfers)
        return shared(compute, transfers) / total if total else None

    def streams(self, began: float, ended: float) -> tuple[list[Span], list[Span]]:
        """Return when compute, and any transfer, was under way."""
        tasks = self.zo.schedule.tasks
        spans: tuple[list[Span], list[Span]] = [], []
        for task, start, end in self.spans:
            if began <= start < ended:
                which = tasks[task].stream is not Stream.COMPUTE
                spans[which].append((start, min(end, ended)))
        return union(spans[0]), union(spans[1])

    def busy(self, repeats: int) -> dict[str, float]:
        """Return the seconds of a step for which each kind of task ran."""
        total: dict[str, float] = {}
        for task, start, end in self.spans:
            kind = task.partition(" ")[0]
            total[kind] = total.get(kind, 0.0) + (end - start) / max(repeats, 1)
        return total

    def metered(self) -> dict[str, int]:
        """Run one more step with every tensor counted that a stage makes."""
        meter: list[Meter] = []

        def counted(task: str, action: Action) -> Action:
            def run() -> None:
                if not meter:  # the stages run on one thread, one after the other
                    meter.append(Meter(self.given()))
                with meter[0]:
                    action()

            return run if task.startswith("body ") else action

        self.wrap(counted)
        self.step()
        layout = info(self.zo.graph).layout
        assert layout is not None
        found = {
            "held": sum(padded(t.nbytes) for t in self.runner.weights.held.values()),
            "arena": self.zo.schedule.peak.get("device", 0),
            "fixed": self.fixed,
            "stages": meter[0].most(layout.copies),
        }
        return found | {"total": sum(found.values())}

    def given(self) -> tuple[torch.Tensor, ...]:
        """Return what stands in memory before a stage has run; note what of it is no weight."""
        weights, arena = self.runner.weights, self.slots.arena
        fixed = [v for f in self.runner._frames for v in f.values() if isinstance(v, torch.Tensor)]
        fixed += [*self.zo.model.buffers(), *weights.constants.values()]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in fixed}
        self.fixed = sum(storages.values())
        return (*fixed, *weights.held.values(), *arena._raw.values())
