"""CUDA's streams and events on threads: work is issued now and runs later, in stream order."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

import torch


class FakeStream:
    """A device stream: a thread that runs what was issued, in order."""

    def __init__(self, device: torch.device) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def issue(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def wait_event(self, event: FakeEvent) -> None:
        reached = event.reached
        self.issue(reached.wait)  # type: ignore[arg-type]

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = FakeEvent()
        event.record(self)
        event.reached.wait()


class FakeEvent:
    """Reached when its stream gets to where it was recorded last; at once if it never was."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.reached.set()

    def record(self, stream: FakeStream) -> None:
        reached = self.reached = threading.Event()
        stream.issue(reached.set)

    def synchronize(self) -> None:
        FakeCuda.host_waits.append(threading.current_thread().name)
        self.reached.wait()


class FakeCuda:
    """What :class:`zograph.engine.cuda.CudaSession` uses of ``torch.cuda``."""

    Event = FakeEvent
    host_waits: list[str] = []  # noqa: RUF012  (shared on purpose)

    def __init__(self) -> None:
        self._default = FakeStream(torch.device("cpu"))
        self._streams = [self._default]
        self._local = threading.local()
        FakeCuda.host_waits.clear()

    def Stream(self, device: torch.device) -> FakeStream:
        self._streams.append(FakeStream(device))
        return self._streams[-1]

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        found: FakeStream = getattr(self._local, "stream", self._default)
        return found

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def synchronize(self, device: torch.device) -> None:
        for stream in self._streams:
            stream.synchronize()
