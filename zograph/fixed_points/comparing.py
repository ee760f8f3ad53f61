"""What each solver takes for one fixed point, and which of them that speaks for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zograph.fixed_points.options import SolveOptions
from zograph.fixed_points.progress import FixedPointInfo
from zograph.fixed_points.solvers import anderson, picard
from zograph.fixed_points.state import Cell, State

ROUNDS = 10
"""Timed solves by each solver at most, after one that is not timed."""
LIMIT = 2.0
"""Seconds of timed solves after which there is no other round."""


@dataclass(frozen=True)
class Choice:
    """What ``solver="auto"`` has come to mean for one fixed point, and why.

    Attributes
    ----------
    solver : {"anderson", "picard"}
        The solver that is predicted to be done first.
    forward, mixing : float or None
        Evaluations of the cell that forward iteration and Anderson mixing need until the last
        sample has converged, continued at the rate so far where `max_iter` cut them off; None if
        a sample gets nowhere.
    penalty : float
        What an evaluation takes longer with mixing than without, as a share of the latter.
    """

    solver: str
    forward: float | None
    mixing: float | None
    penalty: float

    def __str__(self) -> str:
        counts = ["no end" if n is None else f"{n:.0f}" for n in (self.forward, self.mixing)]
        return (
            f"{self.solver} ({counts[0]} evaluations forward, {counts[1]} mixing, which take "
            f"{1 + self.penalty:.2f} times as long)"
        )


def compare(cell: Cell, z0: State, options: SolveOptions) -> tuple[State, FixedPointInfo, Tensor]:
    """Solve with both solvers, by turns, and time them.

    Takes four solves or more, and the memory of one.

    Returns
    -------
    state, info
        Of the last solve by mixing.
    findings : Tensor
        float64[2, 3] on the CPU, for :func:`choose`: forward iteration, then mixing; samples that
        get nowhere, evaluations until the others have converged, seconds an evaluation.
    """
    first = picard(cell, z0, replace(options, max_iter=1))[1].residual
    ends: dict[int, FixedPointInfo] = {}
    least, spent = [math.inf, math.inf], 0.0
    for turn in range(1 + ROUNDS):
        for i, solve in enumerate((picard, anderson)):
            start = now(z0)
            z, ends[i], _ = solve(cell, z0, options)
            if turn:
                seconds = now(z0) - start
                least[i], spent = min(least[i], seconds), spent + seconds
        if spent > LIMIT:
            break
    findings = []
    for i, end in ends.items():
        stuck, evaluations = evaluations_until(first, end, options)
        findings.append([stuck, evaluations, least[i] / int(end.iterations.max())])
    return z, ends[1], torch.tensor(findings, dtype=torch.float64)


def now(state: State) -> float:
    """Return the time in seconds when the device of a state is done with what is queued."""
    if state[0].device.type == "cuda":
        torch.cuda.current_stream(state[0].device).synchronize()
    return time.perf_counter()


def evaluations_until(
    first: Tensor, end: FixedPointInfo, options: SolveOptions
) -> tuple[int, float]:
    """Predict when the last sample has converged.

    Parameters
    ----------
    first
        [B]: the residual at the start.

    Returns
    -------
    tuple
        Samples that get nowhere: they have stopped without convergence, or have gained nothing by
        `max_iter`. And the evaluations that the others need; a sample that was still running is
        taken to gain on as it has on average.
    """
    taken, gained = end.iterations.double(), (first.double() / end.residual).log()
    rest = (end.residual.double() / options.tol).log() * taken / gained
    running = ~end.converged & (end.iterations == options.max_iter) & (gained > 0)
    needed = torch.where(end.converged, taken, taken + rest)[end.converged | running]
    stuck = len(first) - len(needed)
    return stuck, float(needed.max()) if len(needed) else 0.0


def choose(findings: Tensor) -> Choice:
    """Choose a solver by what :func:`compare` has found.

    The one for which fewer samples get nowhere; of two that are alike the one that is done first;
    of two that get nowhere at all, mixing, which has the safeguard.
    """
    (stuck, forward, step), (caught, mixing, mixed) = findings.tolist()
    is_forward = (stuck, forward * step) < (caught, mixing * mixed)
    return Choice(
        "picard" if is_forward else "anderson",
        None if stuck else forward,
        None if caught else mixing,
        mixed / step - 1,
    )
