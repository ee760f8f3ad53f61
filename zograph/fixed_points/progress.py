"""Which samples have stopped, why, and how good they were: the same for both solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from zograph.fixed_points.flag import Flag
from zograph.fixed_points.options import SolveOptions

FLOOR = 1e-5
"""Added to the norm of f(z) in the relative residual."""

DIVERGED = 1e6
"""A sample has diverged when its residual is this many times the smallest it has had."""


@dataclass(frozen=True)
class FixedPointInfo:
    """How a solve ended, sample by sample.

    Attributes
    ----------
    iterations : Tensor
        int64[B]: evaluations of the cell until the sample stopped.
    residual : Tensor
        float32[B] (float64 for a float64 state): the residual of the z that is returned, as
        `stop` measures it; NaN where the cell returned NaN.
    converged : Tensor
        bool[B]: whether it is at most `tol`.
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor


pytree.register_dataclass(FixedPointInfo)


@dataclass(frozen=True)
class Status:
    """The end of a solve, for the host.

    Attributes
    ----------
    running, diverged, broken : int
        Samples that were still running, that diverged, and for which the cell returned NaN.
    """

    running: int
    diverged: int
    broken: int


class Progress:
    """The state of every sample's iteration.

    Attributes
    ----------
    active : Tensor
        bool[B]: samples that have not stopped.
    best : Tensor
        float64[B]: the smallest residual so far.
    """

    def __init__(self, batch: int, device: torch.device, options: SolveOptions) -> None:
        def full(value: float | bool | int, dtype: torch.dtype) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        self.options = options
        self.active = full(True, torch.bool)
        self.converged = full(False, torch.bool)
        self.broken = full(False, torch.bool)
        self.iterations = full(0, torch.int64)
        self.best = full(math.inf, torch.float64)
        self._least = full(math.inf, torch.float64)
        self._flag = Flag(device.type == "cuda", 3)

    def update(self, residual: Tensor, value: Tensor) -> tuple[Tensor, bool]:
        """Take an iteration's norms of f(z) - z and f(z) in, float64[B] each.

        Returns
        -------
        improved : Tensor
            bool[B]: running samples whose z is the best so far.
        go_on : bool
            False once the host knows that all samples have stopped.
        """
        options = self.options
        measure = residual / (value + FLOOR) if options.stop == "relative" else residual
        broken = self.active & (residual.isnan() | value.isnan())
        # An infinite value has no residual of its own; its sample has diverged.
        diverged = self.active & ~broken & ~(residual.isfinite() & value.isfinite())
        self._least = torch.minimum(self._least, residual.nan_to_num(nan=math.inf))
        diverged |= self.active & (residual > DIVERGED * self._least)
        improved = self.active & ~broken & ~diverged & (measure < self.best)
        self.best = torch.where(improved, measure, self.best)
        self.converged |= improved & (measure <= options.tol)
        self.broken |= broken
        self.iterations += self.active
        self.active = self.active & ~(self.converged | diverged | broken)
        told = self._flag.send(self._counts())
        return improved, told is None or told[0] > 0

    def finish(self, dtype: torch.dtype) -> tuple[FixedPointInfo, Status]:
        """Return how the samples ended; on a GPU, wait for it."""
        nan = torch.full_like(self.best, math.nan)
        residual = torch.where(self.broken, nan, self.best).to(dtype)
        running, ended, broken = self._flag.newest()
        status = Status(running, ended - broken, broken)
        return FixedPointInfo(self.iterations, residual, self.converged), status

    def _counts(self) -> Tensor:
        """Return int64[3]: samples running, stopped without convergence, broken."""
        stopped = ~self.active & ~self.converged
        return torch.stack([self.active.sum(), stopped.sum(), self.broken.sum()])
