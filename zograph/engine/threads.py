"""The CPU engine: a thread per stream, and counts of finished tasks for events.

A task is a callable. The thread of a stream runs the tasks issued to it in order; before each one
it waits for the tasks that the schedule's events name. The caller's thread only issues and waits,
so that Ctrl-C reaches it at once and never stops a task half-way.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping

import torch

from zograph.schedule import Schedule, Stream

Action = Callable[[], None]


class Session:
    """One schedule, run again and again; the tail of a step fetches for the next one.

    Parameters
    ----------
    schedule
        Order, events and tasks that may run ahead.
    actions
        What each task of the schedule does.
    """

    def __init__(self, schedule: Schedule, actions: Mapping[str, Action]) -> None:
        self.schedule, self.actions = schedule, actions
        self._steps = 0
        self._issued: Counter[str] = Counter()
        self._board = Board(schedule)
        self._threads = [
            threading.Thread(target=self._board.work, args=(s,), name=f"zograph {s}", daemon=True)
            for s in schedule.order
        ]
        for thread in self._threads:
            thread.start()
        # Idle threads know the board alone. At exit they must be gone before the interpreter is.
        self._end = weakref.finalize(self, end, self._board, self._threads)

    @property
    def measured(self) -> dict[str, tuple[float, float]]:
        """Start and end of each task's last run, in seconds of :func:`time.perf_counter`."""
        return dict(self._board.measured)

    def run(self) -> None:
        """Run one step; return when its compute tasks have ended.

        Transfers may still be under way: of the step's own results, and of the next step's first
        weights.

        Raises
        ------
        BaseException
            What a task raised, here or in the transfers behind the step before. The session is
            of no use then but to be closed.
        """
        ahead = set(self.schedule.ahead)
        self._steps += 1
        issue: dict[Stream, list[tuple[str, Action]]] = {}
        for stream, names in self.schedule.order.items():
            wanted = [n for n in names if self._issued[n] < self._steps]
            wanted += [n for n in names if n in ahead]
            self._issued.update(wanted)
            issue[stream] = [(n, self.actions[n]) for n in wanted]
        self._board.issue(issue)
        last = self.schedule.order.get(Stream.COMPUTE, ())[-1:]
        self._board.wait(dict.fromkeys(last, self._steps))

    def drain(self) -> None:
        """Wait until everything that was issued has ended.

        Raises
        ------
        BaseException
            What a task raised.
        """
        self._board.wait(self._issued)

    def close(self) -> None:
        """Let running tasks end, drop the others and end the threads. Raises nothing."""
        self._end()


def end(board: Board, threads: list[threading.Thread]) -> None:
    """Let running tasks end, drop the others and wait for the threads."""
    board.stop()
    for thread in threads:
        if thread is not threading.current_thread():  # it may drop the last reference
            thread.join()


class Board:
    """What the threads of a session share: their queues, and how often each task has ended."""

    def __init__(self, schedule: Schedule) -> None:
        self.measured: dict[str, tuple[float, float]] = {}
        self._done: Counter[str] = Counter()
        self._queues: dict[Stream, deque[tuple[str, Action]]] = {s: deque() for s in schedule.order}
        self._waits: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for event in schedule.events:
            self._waits[event.after].append((event.before, event.lag))
        self._failure: BaseException | None = None
        self._stopped = False
        # Ctrl-C inside Condition.__enter__, which is Python, would leave the lock taken for good.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def issue(self, tasks: Mapping[Stream, list[tuple[str, Action]]]) -> None:
        """Add tasks to the queues."""
        with self._lock:
            for stream, wanted in tasks.items():
                self._queues[stream].extend(wanted)
            self._changed.notify_all()

    def wait(self, counts: Mapping[str, int]) -> None:
        """Wait until tasks have ended so many times; raise what any task has raised."""
        with self._lock:
            while any(self._done[n] < k for n, k in counts.items()):
                if self._failure is not None or self._stopped:
                    raise self._failure or RuntimeError("the session was closed")
                self._changed.wait()
            if self._failure is not None:
                raise self._failure

    def stop(self) -> None:
        """Run no further task."""
        with self._lock:
            self._stopped = True
            self._changed.notify_all()

    def work(self, stream: Stream) -> None:
        """Run the tasks of a stream until stopped; the body of its thread."""
        with torch.no_grad():
            while self._work_once(self._queues[stream]):
                pass

    def _work_once(self, queue: deque[tuple[str, Action]]) -> bool:
        with self._lock:
            while not self._stopped and not (queue and self._due(queue[0][0])):
                self._changed.wait()
            if self._stopped:
                return False
            name, action = queue.popleft()
        try:
            start = time.perf_counter()
            action()
            self.measured[name] = (start, time.perf_counter())
        except BaseException as error:  # noqa: BLE001  (raised again on the caller's thread)
            with self._lock:
                self._failure = self._failure or error
            self.stop()
            return False
        with self._lock:
            self._done[name] += 1
            self._changed.notify_all()
        return True

    def _due(self, name: str) -> bool:
        """Whether everything that the next run of a task waits for has ended."""
        step = self._done[name]
        return all(self._done[before] > step - lag for before, lag in self._waits[name])
