"""Solvers side by side: forward iteration, torchdeq's Anderson mixing and zograph's."""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import zograph
from zograph.cli.anderson.problems import Problem
from zograph.fixed_points.progress import FLOOR
from zograph.fixed_points.state import rows, squares

FORWARD, MIXED, NARROW, PEER = "forward", "zograph", "zograph, bfloat16", "torchdeq"

Solve = Callable[[Callable[[Tensor], Tensor], Tensor], Any]


def contestants(args: argparse.Namespace) -> dict[str, Solve]:
    """Return the solvers by name; torchdeq's only where it is installed."""
    tol, most = min(args.tol), args.max_iter
    given: dict[str, Any] = {"tol": tol, "max_iter": most, "window": args.window}
    mixed = given | {"solver": "anderson"}
    found: dict[str, Solve] = {
        FORWARD: lambda f, z: zograph.fixed_point(f, z, **given, solver="picard"),
        MIXED: lambda f, z: zograph.fixed_point(f, z, **mixed),
        NARROW: lambda f, z: zograph.fixed_point(f, z, **mixed, history_dtype=torch.bfloat16),
    }
    if find_spec("torchdeq"):
        from torchdeq.solver import get_solver

        peer = get_solver("anderson")
        found[PEER] = lambda f, z: peer(f, z, tol=tol, max_iter=most, stop_mode="rel")
    return found


@dataclass(frozen=True)
class Run:
    """One solve, watched at its calls of the cell.

    Attributes
    ----------
    residuals : Tensor
        float64[K, B]: the smallest relative residual of each sample after each evaluation.
    seconds : list of float
        When each evaluation ended, without the time of watching.
    total : float
        When the solve ended.
    """

    residuals: Tensor
    seconds: list[float]
    total: float

    def iterations(self, tol: float) -> Tensor:
        """Return each sample's evaluations to a residual of at most `tol`; 0: never; int64[B]."""
        reached = self.residuals <= tol
        first = reached.int().argmax(dim=0) + 1
        return torch.where(reached[-1], first, 0)

    def evaluations(self, tol: float) -> int | None:
        """Return the evaluations until all samples have reached `tol`; None: never."""
        found = self.iterations(tol)
        return int(found.max()) if bool((found > 0).all()) else None

    def seconds_to(self, tol: float) -> float | None:
        """Return the seconds until all samples have reached `tol`, with the solve's last work."""
        count = self.evaluations(tol)
        if count is None:
            return None
        return self.seconds[count - 1] + self.total - self.seconds[-1]

    @cached_property
    def typical(self) -> list[float]:
        """The geometric mean of the samples' residuals after each evaluation."""
        mean: list[float] = self.residuals.log().mean(dim=1).exp().tolist()
        return mean

    def at(self, second: float) -> float:
        """Return the typical residual at a time, the end of the first evaluation or later."""
        return self.typical[bisect_right(self.seconds, second) - 1]


def watch(solve: Solve, problem: Problem) -> Run:
    """Solve a problem."""
    residuals: list[Tensor] = []
    seconds: list[float] = []
    watching = 0.0

    def cell(z: Tensor) -> Tensor:
        nonlocal watching
        value = problem.f(z)
        end = time.perf_counter()
        seconds.append(end - start - watching)
        residual, size = squares(*rows((value, z))).sqrt().unbind(dim=1)
        residuals.append(residual / (size + FLOOR))
        watching += time.perf_counter() - end
        return value

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*samples d", category=UserWarning)
        start = time.perf_counter()
        solve(cell, problem.z0)
        total = time.perf_counter() - start - watching
    return Run(torch.stack(residuals).cummin(dim=0).values, seconds, total)


def measure(args: argparse.Namespace, problem: Problem) -> dict[str, Any]:
    """Solve a problem by every solver, in turn, `rounds` times; return what it took."""
    solvers = contestants(args)
    runs: dict[str, list[Run]] = {name: [] for name in solvers}
    for _ in range(args.rounds):
        for name, solve in solvers.items():
            runs[name].append(watch(solve, problem))
    radius = problem.radius
    return {
        "problem": problem.name,
        "radius": {"median": float(radius.median()), "largest": float(radius.max())},
        "solvers": {name: summary(name, runs, args.tol) for name in runs},
    }


def summary(name: str, runs: dict[str, list[Run]], tols: Sequence[float]) -> dict[str, Any]:
    """Return what the runs of a solver took, alone and against the runs beside them."""
    taken, first = runs[name], runs[name][0]
    last = first.residuals[-1]

    def reached(tol: float) -> dict[str, Any]:
        iterations = first.iterations(tol)
        done = iterations[iterations > 0].double()
        return {
            "evaluations": first.evaluations(tol),
            "mean": float(done.mean()) if len(done) else None,
            "converged": len(done),
            "seconds": median([run.seconds_to(tol) for run in taken]),
            **{
                f"of_{peer}": of(taken, runs[peer], tol) for peer in (FORWARD, PEER) if peer in runs
            },
        }

    pairs = zip(taken, runs[FORWARD], strict=True)
    penalties = [a.total / len(a.seconds) / (b.total / len(b.seconds)) for a, b in pairs]
    return {
        "to": {f"{tol:g}": reached(tol) for tol in tols},
        "evaluations": len(first.seconds),
        "seconds": [run.total for run in taken],
        "residual": {"typical": first.typical[-1], "largest": float(last.max())},
        "penalty": statistics.median(penalties),
        **({} if name == FORWARD else equal_time(first, runs[FORWARD][0])),
        "iterations": first.iterations(min(tols)).tolist(),
        "curve": {"seconds": first.seconds, "residual": first.typical},
    }


def median(values: Sequence[float | None]) -> float | None:
    """Return the median; None if a value is missing."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if len(known) == len(values) else None


def of(ours: Sequence[Run], theirs: Sequence[Run], tol: float) -> float | None:
    """Return the median ratio of the seconds to `tol`, round by round.

    Where only theirs never got there, against all the time they took: an upper bound.
    """
    ratios = []
    for a, b in zip(ours, theirs, strict=True):
        seconds = a.seconds_to(tol)
        ratios.append(seconds and seconds / (b.seconds_to(tol) or b.total))
    return median(ratios)


def equal_time(run: Run, forward: Run) -> dict[str, float | None]:
    """Compare the typical residuals at equal times, as long as both run.

    Returns
    -------
    crossover : float or None
        Seconds from which on a run's residual is never above forward iteration's; None: it ends
        above it.
    equal_time : float
        A run's residual over forward iteration's at the end of the shorter of the two.
    """
    begin = max(run.seconds[0], forward.seconds[0])
    end = max(begin, min(run.seconds[-1], forward.seconds[-1]))
    times = sorted(t for t in [*run.seconds, *forward.seconds] if begin <= t <= end)
    ratios = [run.at(t) / forward.at(t) for t in times]
    above = [i for i, ratio in enumerate(ratios) if ratio > 1]
    after = above[-1] + 1 if above else 0
    return {
        "crossover": times[after] if after < len(times) else None,
        "equal_time": ratios[-1],
    }
