"""The CUDA engine: the tasks of the device's streams are issued, not awaited.

The threads of :mod:`zograph.engine.threads` run the same tasks in the same order. On a stream of
the device a task counts as done when it has been issued: between two such streams an event makes
the later one wait on the device, and no thread waits for the device but those that read and write
the disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from zograph.engine.threads import Action, Session
from zograph.schedule import Schedule, Stream

DEVICE_STREAMS = (Stream.TO_DEVICE, Stream.COMPUTE, Stream.TO_HOST)


class CudaSession(Session):
    """A session whose transfers and compute run on three CUDA streams.

    Parameters
    ----------
    schedule, actions
        As for :class:`zograph.engine.threads.Session`; actions of device streams only issue.
    device
        The CUDA device.
    cuda
        ``torch.cuda``, or what a test puts in its place.
    """

    def __init__(
        self,
        schedule: Schedule,
        actions: Mapping[str, Action],
        device: torch.device,
        cuda: Any = torch.cuda,
    ) -> None:
        self._device, self._cuda = device, cuda
        compute = cuda.current_stream(device)
        streams = {s: cuda.Stream(device) for s in DEVICE_STREAMS if s is not Stream.COMPUTE}
        self._streams = streams | {Stream.COMPUTE: compute}
        # Two events a task: at most one step is issued ahead, so the other one is still whole.
        self._events = {n: (cuda.Event(), cuda.Event()) for n in schedule.dag}
        self._before: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for event in schedule.events:
            if schedule.tasks[event.before].stream in DEVICE_STREAMS:
                self._before[event.after].append((event.before, event.lag))
        wrapped = {n: self._wrapped(schedule, n, action) for n, action in actions.items()}
        super().__init__(schedule, wrapped)

    def run(self) -> None:
        """Issue one step; the caller's stream waits for its compute, the caller does not."""
        caller, compute = self._cuda.current_stream(self._device), self._streams[Stream.COMPUTE]
        if caller != compute:
            compute.wait_stream(caller)
        super().run()
        if caller != compute:
            caller.wait_stream(compute)

    def drain(self) -> None:
        """Wait until everything that was issued has ended, on the device too."""
        super().drain()
        self._cuda.synchronize(self._device)

    def close(self) -> None:
        """End the threads once the device is done with what they issued."""
        super().close()
        self._cuda.synchronize(self._device)

    def _wrapped(self, schedule: Schedule, name: str, action: Action) -> Action:
        """Let a task wait for device tasks by events, and record its own."""
        stream = schedule.tasks[name].stream
        steps = 0

        def before() -> list[Any]:
            """Return the events of the runs that this run follows."""
            runs = ((b, steps - lag) for b, lag in self._before[name])
            return [self._events[b][step % 2] for b, step in runs if step >= 0]

        def on_host() -> None:
            nonlocal steps
            for event in before():
                event.synchronize()
            action()
            steps += 1

        def on_device() -> None:
            nonlocal steps
            with self._cuda.stream(self._streams[stream]):
                for event in before():
                    self._streams[stream].wait_event(event)
                action()
                self._events[name][steps % 2].record(self._streams[stream])
            steps += 1

        return on_device if stream in DEVICE_STREAMS else on_host
