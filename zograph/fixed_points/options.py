"""The options of a solve, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from zograph.errors import OptionError

Solver = Literal["auto", "anderson", "picard"]
Stop = Literal["relative", "absolute"]

SOLVERS = ("auto", "anderson", "picard")
STOPS = ("relative", "absolute")


@dataclass(frozen=True)
class SolveOptions:
    """How :func:`zograph.fixed_point` solves. Hashable; printed in graphs.

    Attributes
    ----------
    tol : float
        A sample has converged when its residual is at most this.
    max_iter : int
        Most evaluations of the cell.
    solver : {"auto", "anderson", "picard"}
        Anderson mixing, or forward iteration. What ``auto`` means is measured for the pass
        `anderson`; in eager it is Anderson mixing.
    stop : {"relative", "absolute"}
        The residual: ``||f(z) - z|| / (||f(z)|| + 1e-5)``, or its numerator.
    window : int
        States that are mixed, 2 or more.
    beta : float
        Damping: the next iterate mixes ``z + beta (f(z) - z)``; in (0, 1].
    ridge : float
        Added to the diagonal of the Gram matrix of the residuals scaled to length 1.
    history_dtype : torch.dtype or None
        What past residuals are stored in; None: the state's own dtype, at least float32.
    backward_tol, backward_max_iter : float, int or None
        The same for the backward system; None: as forward.
    """

    tol: float = 1e-3
    max_iter: int = 50
    solver: Solver = "auto"
    stop: Stop = "relative"
    window: int = 5
    beta: float = 1.0
    ridge: float = 1e-6
    history_dtype: torch.dtype | None = None
    backward_tol: float | None = None
    backward_max_iter: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("solver", SOLVERS), ("stop", STOPS)):
            if getattr(self, name) not in known:
                found = getattr(self, name)
                raise OptionError(f"{name}={found!r} is unknown; use one of {', '.join(known)}.")
        for name in ("tol", "backward_tol"):
            tol = getattr(self, name)
            if tol is not None and not (math.isfinite(tol) and tol > 0):
                raise OptionError(f"{name} is {tol}; it must be finite and positive.")
        for name, least in (("max_iter", 1), ("backward_max_iter", 1), ("window", 2)):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < least):
                raise OptionError(f"{name} is {count!r}; it must be an integer, {least} or more.")
        if not 0 < self.beta <= 1:
            raise OptionError(f"beta is {self.beta}; it must be above 0 and at most 1.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise OptionError(f"ridge is {self.ridge}; it must be finite and not negative.")
        dtype = self.history_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise OptionError(f"history_dtype is {dtype}; it must be a floating dtype or None.")

    def backward(self) -> SolveOptions:
        """Return the options of the backward system."""
        return replace(
            self,
            tol=self.backward_tol or self.tol,
            max_iter=self.backward_max_iter or self.max_iter,
        )
