"""The contestants of `zograph bench step`, timed alternately in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zograph.pool import pool
from zograph.step import ZOStep

EPS, LR = 1e-3, 1e-7


class Contest:
    """Two eager forwards, a plain MeZO step and zograph's on one model and batch.

    `logged` is the same step on a model of its own that writes a log.
    """

    def __init__(
        self, model: nn.Module, batch: Mapping[str, Any], step: ZOStep, logged: ZOStep
    ) -> None:
        self.model, self.batch, self.step = model, batch, step
        self.contestants: dict[str, Callable[[], object]] = {
            "two forwards": self.two_forwards,
            "plain MeZO step": self.mezo,
            "zograph step": lambda: step(**batch),
            "zograph step with log": lambda: logged(**batch),
        }

    @torch.no_grad()
    def loss(self) -> float:
        """Return the eager loss at the current weights."""
        return float(self.model(**self.batch, use_cache=False).loss)

    def two_forwards(self) -> None:
        """Run what every two-point estimate needs at least."""
        self.loss()
        self.loss()

    @torch.no_grad()
    def mezo(self) -> None:
        """Run a step as MeZO does: four passes of `torch.normal` over all weights."""
        seed = int(torch.randint(1_000_000_000, ()))
        self.shift(seed, EPS)
        plus = self.loss()
        self.shift(seed, -2 * EPS)
        minus = self.loss()
        self.shift(seed, EPS)
        self.shift(seed, -LR * (plus - minus) / (2 * EPS))

    def shift(self, seed: int, scale: float) -> None:
        """Add `scale` times the seeded direction to every weight."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.model.parameters():
            z = torch.normal(0.0, 1.0, p.shape, generator=generator, dtype=p.dtype)
            p.add_(z, alpha=scale)

    def run(self, repeats: int) -> dict[str, Any]:
        """Warm up, time `repeats` alternating rounds, then measure peaks one by one."""
        for contestant in self.contestants.values():
            contestant()
            contestant()
        seconds: dict[str, list[float]] = {name: [] for name in self.contestants}
        for _ in range(repeats):
            for name, contestant in self.contestants.items():
                start = time.perf_counter()
                contestant()
                seconds[name].append(time.perf_counter() - start)
        self.step.synchronize()
        base = statistics.median(seconds["two forwards"])
        rows = {}
        for name, contestant in self.contestants.items():
            median = statistics.median(seconds[name])
            peak = peak_over_idle(contestant)
            rows[name] = {
                "median": median,
                "ratio": median / base,
                "seconds": seconds[name],
                "peak_bytes": peak,
            }
        return {"contestants": rows}


def peak_over_idle(action: Callable[[], object]) -> int | None:
    """Return how far the process's memory rises during `action` (Linux; else None).

    Kept outputs of the materialize operators count as risen, too: the pool is emptied first.
    """
    pool.clear()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        idle = status_bytes("VmRSS")
        action()
        return status_bytes("VmHWM") - idle
    except OSError:
        return None


def status_bytes(field: str) -> int:
    """Return one memory field of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
