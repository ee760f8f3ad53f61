"""What one iteration of Anderson mixing takes beside the cell."""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import zograph

ITERATIONS = 16
"""Of a solve, of which those with a full window are counted."""

Solve = Callable[[Callable[[Tensor], Tensor], Tensor], Any]


def measure(args: argparse.Namespace, z0: Tensor) -> dict[str, Any]:
    """Time copies, zograph's mixing and the textbook's, in turn.

    The map is linear and slow to converge, so that every iteration mixes.
    """
    window, state = args.window, z0.numel() * z0.element_size()
    factors = torch.linspace(0.5, 0.999, z0[0].numel()).view(z0.shape[1:])
    given: dict[str, Any] = {
        "tol": 1e-9, "max_iter": ITERATIONS, "solver": "anderson", "window": window,
    }  # fmt: skip
    ways: dict[str, Solve] = {
        "float32": lambda f, z: zograph.fixed_point(f, z, **given),
        "bfloat16": lambda f, z: zograph.fixed_point(f, z, **given, history_dtype=torch.bfloat16),
        "textbook": lambda f, z: textbook(f, z, window, ITERATIONS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rates = []
    for _ in range(args.rounds):
        rates.append(bandwidth(window * state))
        for name, solve in ways.items():
            seconds[name].append(
                beside(solve, lambda z: torch.addcmul(z0 + 1, z, factors), z0, window)
            )
    # The new residual and the window's are read for the row of the Gram matrix; the window's
    # values are read and one state is written for the mixture.
    residuals = {"float32": 1.0, "bfloat16": 0.5, "textbook": 1.0}
    moved = {n: state * (1 + window * part + window + 1) for n, part in residuals.items()}
    return {
        "window": window,
        "state_bytes": state,
        "copied_per_second": statistics.median(rates),
        "ways": {
            name: {
                "seconds": statistics.median(taken),
                "of_bytes": statistics.median(
                    t * rate / moved[name] for t, rate in zip(taken, rates, strict=True)
                ),
                "of_textbook": statistics.median(
                    t / b for t, b in zip(taken, seconds["textbook"], strict=True)
                ),
            }
            for name, taken in seconds.items()
        },
    }


def bandwidth(size: int) -> float:
    """Return the bytes a second that a copy reads and writes."""
    source, target = (torch.ones(size // 4) for _ in range(2))
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - start)
    return 2 * size / statistics.median(taken[1:])


def beside(solve: Solve, f: Callable[[Tensor], Tensor], z0: Tensor, window: int) -> float:
    """Return the median seconds from the end of an evaluation to the start of the next."""
    begins, ends = [], []

    def cell(z: Tensor) -> Tensor:
        begins.append(time.perf_counter())
        value = f(z)
        ends.append(time.perf_counter())
        return value

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not reach tol", category=UserWarning)
        solve(cell, z0)
    gaps = [b - e for b, e in zip(begins[1:], ends, strict=False)]
    return statistics.median(gaps[window:])


def textbook(f: Callable[[Tensor], Tensor], z: Tensor, window: int, count: int) -> Tensor:
    """Mix as the formula is written: all residuals, their full Gram matrix, the bordered system.

    References
    ----------
    Walker and Ni 2011, and the tutorial named in :mod:`zograph.cli.anderson.model`.
    """
    batch, width = len(z), z[0].numel()
    states = torch.zeros(batch, window, width)
    values, best, least = states.clone(), z, torch.full((batch, 1), torch.inf)
    for k in range(count):
        value, n = f(z), min(k + 1, window)
        states[:, k % window], values[:, k % window] = z.flatten(1), value.flatten(1)
        residuals = values[:, :n] - states[:, :n]
        gram = residuals @ residuals.mT
        one = torch.ones(batch, n, 1)
        system = torch.cat([
            torch.cat([torch.zeros(batch, 1, 1), one.mT], dim=2),
            torch.cat([one, gram + 1e-4 * torch.eye(n)], dim=2),
        ], dim=1)  # fmt: skip
        right = torch.eye(n + 1)[:, :1].expand(batch, -1, -1)
        weights = torch.linalg.solve(system, right)[:, 1:]
        size = (value - z).flatten(1).norm(dim=1, keepdim=True) / value.flatten(1).norm(
            dim=1, keepdim=True
        )
        better = (size < least).view(-1, *[1] * (z.dim() - 1))
        best, least = torch.where(better, z, best), torch.minimum(size, least)
        z = (weights.mT @ values[:, :n]).view_as(z)
    return best
