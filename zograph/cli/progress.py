"""The progress of a run: a bar on a terminal, lines elsewhere; and a calm Ctrl-C."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections import deque
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
    """Shows smoothed loss, learning rate, steps a second and peak memory."""

    def __init__(self, steps: int, every: int, device: torch.device) -> None:
        self.history: list[tuple[int, float]] = []
        self._losses: deque[float] = deque(maxlen=SMOOTHED)
        self._pending: list[torch.Tensor] = []
        self._steps, self._every, self._device = steps, every, device
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._spacing, self._told = max(1, steps // LINES), 0
        self._start = time.perf_counter()

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        if self._terminal:
            self._bar = tqdm(total=self._steps, unit="step", dynamic_ncols=True)
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
        if done % self._every and done != self._steps:
            return
        self._losses.extend(torch.stack(self._pending).tolist())
        self._pending.clear()
        smoothed = sum(self._losses) / len(self._losses)
        self.history.append((done, smoothed))
        peak = peak_bytes(self._device) / 2**30
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {smoothed:.4f}, lr {lr:.2e}, peak {peak:.2f} GiB")
            return
        if done != self._steps and done // self._spacing == self._told:
            return
        self._told = done // self._spacing
        rate = done / (time.perf_counter() - self._start)
        print(
            f"  step {done}/{self._steps}  loss {smoothed:.4f}  lr {lr:.2e}  "
            f"{rate:.2f} steps/s  peak {peak:.2f} GiB",
            file=sys.stderr,
            flush=True,
        )


class Interrupt:
    """While entered, the first Ctrl-C only sets `asked`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)
