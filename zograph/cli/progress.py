"""The progress of a run: a bar on a terminal, lines elsewhere; and a calm end when asked."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from tqdm import tqdm

SMOOTHED = 50
"""The shown loss is the mean of so many last steps."""

LINES = 20
"""Where there is no terminal, about so many lines are printed in all."""


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of the run: of the device if it is CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """Shows smoothed loss, learning rate, steps a second and peak memory.

    Parameters
    ----------
    steps
        Of the whole run.
    every
        Steps from one reading of the losses to the next.
    earlier
        The losses of the steps that were taken before, where a run goes on.
    """

    def __init__(
        self, steps: int, every: int, device: torch.device, earlier: Sequence[float] = ()
    ) -> None:
        self.history: list[tuple[int, float]] = []
        self._losses: deque[float] = deque(maxlen=SMOOTHED)
        self._pending: list[torch.Tensor] = []
        self._steps, self._every, self._device = steps, every, device
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._first, self._spacing = len(earlier), max(1, steps // LINES)
        self._told = self._first // self._spacing
        self._start = time.perf_counter()
        for done, loss in enumerate(torch.tensor(earlier, dtype=torch.float32), 1):
            self._pending.append(loss)
            self._read(done)

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        if self._terminal:
            self._bar = tqdm(
                total=self._steps, initial=self._first, unit="step", dynamic_ncols=True
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, done: int, loss: torch.Tensor, lr: float) -> None:
        """Take the loss of a step; it is read, on every `every`-th step, not before."""
        self._pending.append(loss)
        if self._bar is not None:
            self._bar.update()
        smoothed = self._read(done)
        if smoothed is None:
            return
        peak = peak_bytes(self._device) / 2**30
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {smoothed:.4f}, lr {lr:.2e}, peak {peak:.2f} GiB")
            return
        if done != self._steps and done // self._spacing == self._told:
            return
        self._told = done // self._spacing
        rate = (done - self._first) / (time.perf_counter() - self._start)
        print(
            f"  step {done}/{self._steps}  loss {smoothed:.4f}  lr {lr:.2e}  "
            f"{rate:.2f} steps/s  peak {peak:.2f} GiB",
            file=sys.stderr,
            flush=True,
        )

    def _read(self, done: int) -> float | None:
        """Read the pending losses if it is time to; return the smoothed one then."""
        if done % self._every and done != self._steps:
            return None
        self._losses.extend(torch.stack(self._pending).tolist())
        self._pending.clear()
        smoothed = sum(self._losses) / len(self._losses)
        self.history.append((done, smoothed))
        return smoothed


class Interrupt:
    """While entered, the first signal only sets `asked`; a second one interrupts at once.

    Attributes
    ----------
    asked : signal.Signals or None
        The signal that came.

    Parameters
    ----------
    signals
        Ctrl-C, and what else is to be taken so.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self.asked: signal.Signals | None = None
        self._signals = signals or (signal.SIGINT,)
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._note) for s in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        for each in self._signals:
            signal.signal(each, signal.default_int_handler)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)
