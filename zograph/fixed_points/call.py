"""`zograph.fixed_point`: the front of the solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zograph.errors import CaptureError
from zograph.fixed_points.gradient import attach
from zograph.fixed_points.options import SolveOptions, Solver, Stop
from zograph.fixed_points.progress import FixedPointInfo
from zograph.fixed_points.reporting import report
from zograph.fixed_points.solvers import SOLVE
from zograph.fixed_points.state import State, check_like, check_start, unwritten
from zograph.fixed_points.tracing import is_tracing, trace

Z = TypeVar("Z", Tensor, tuple[Tensor, ...])


def fixed_point(
    f: Callable[..., Any],
    z0: Z,
    *,
    tol: float = 1e-3,
    max_iter: int = 50,
    solver: Solver = "auto",
    stop: Stop = "relative",
    window: int = 5,
    beta: float = 1.0,
    ridge: float = 1e-6,
    history_dtype: torch.dtype | None = None,
    backward_tol: float | None = None,
    backward_max_iter: int | None = None,
) -> tuple[Z, FixedPointInfo]:
    """Find z with ``z = f(z)``, sample by sample.

    Runs the solver where it is called. In a model that :func:`zograph.compile` captures it
    becomes one node of the graph with `f` as a subgraph, which the pass `anderson` rewrites.

    The result is differentiable by the implicit function theorem: parameters and tensors that `f`
    closes over get gradients, z0 gets none. Nothing of the iteration is kept for it, and a second
    derivative is not available.

    Parameters
    ----------
    f
        Maps z to a tensor of the same shape and dtype; of a tuple of tensors, ``f(*z)`` to such a
        tuple. Samples must not influence each other.
    z0 : Tensor or tuple of Tensor
        Where to start; real floating, dimension 0 counts the samples in each.
    tol : float
        A sample stops when its residual is at most this.
    max_iter : int
        Most evaluations of `f`.
    solver : {"auto", "anderson", "picard"}
        Anderson mixing or forward iteration. ``auto`` leaves it to the pass, which measures. Here
        it is Anderson mixing: nothing would keep what a clock decides, and bits would change from
        run to run.
    stop : {"relative", "absolute"}
        Residual: ``||f(z) - z|| / (||f(z)|| + 1e-5)`` over all tensors of a sample, or
        ``||f(z) - z||``.
    window : int
        Iterates that Anderson mixes, 2 or more; it stores twice as many states.
    beta : float
        Damping of the mixed step, in (0, 1]. Forward iteration has none.
    ridge : float
        On the diagonal of the mixing system, whose own diagonal is 1.
    history_dtype : torch.dtype, optional
        Of the stored residuals, for example bfloat16; the state's own by default.
    backward_tol, backward_max_iter : float, int, optional
        Of the backward system, which the same solver solves. As forward by default.

    Returns
    -------
    z : Tensor or tuple of Tensor
        For each sample the iterate with the smallest residual; a sample that has converged is
        not moved any more.
    info : FixedPointInfo
        Iterations, residual and convergence of each sample.

    Raises
    ------
    OptionError
        If an option is unknown or out of range, or z0 is no state.
    CellError
        If `f` changes shape, dtype or number of the tensors, writes to them, or returns NaN.

    Warns
    -----
    UserWarning
        With counts, if samples diverge or `max_iter` is reached.

    References
    ----------
    Anderson 1965; Walker and Ni 2011. Bai, Kolter and Koltun 2019 (deep equilibrium models).

    Examples
    --------
    >>> import torch, zograph
    >>> z, info = zograph.fixed_point(torch.cos, torch.zeros(2, 1), tol=1e-5)
    >>> [round(x, 4) for x in z.flatten().tolist()], info.converged.tolist()
    ([0.7391, 0.7391], [True, True])
    """
    given = dict(locals())
    del given["f"], given["z0"]
    options = SolveOptions(**given)
    start = check_start((z0,) if isinstance(z0, Tensor) else z0)

    def cell(z: State) -> State:
        with unwritten(z):
            return check_like(f(*z), z)

    z, info = (trace if is_tracing() else solve)(cell, start, options)
    found: Any = z[0] if isinstance(z0, Tensor) else z
    return found, info


def solve(
    cell: Callable[[State], State], start: State, options: SolveOptions
) -> tuple[State, FixedPointInfo]:
    """Run the solver that the options name; differentiable where gradients are on.

    Raises
    ------
    CaptureError
        If there are no values to solve with: under a trace that is not zograph's.
    """
    if any(isinstance(x, FakeTensor) for x in start):
        raise CaptureError(
            "zograph.fixed_point meets tensors without values. Only zograph.compile can capture "
            "it; for torch.export or torch.compile, call them on the cell."
        )
    with torch.no_grad():
        detached = tuple(x.detach() for x in start)
        z, info, status = SOLVE[options.solver](cell, detached, options)
    report(status, len(start[0]), options, "zograph.fixed_point", stacklevel=4)
    if torch.is_grad_enabled():
        z = attach(cell, z, options.backward())
    return z, info
