"""What stands in a graph: a solve whose first argument is the cell, a graph of its own.

``fixed_point`` is what capture leaves, ``anderson_solve`` and ``picard_solve`` what the pass
`anderson` makes of it. All return ``(*z, iterations, residual, converged)``; a sample for which the
cell returned NaN is NaN in z, so that the loss tells. ``trial_solve`` stands in graphs that the
pass `trial` makes to measure; it returns what it has found behind the others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from zograph.fixed_points.comparing import compare
from zograph.fixed_points.history import History
from zograph.fixed_points.options import SolveOptions, Solver, Stop
from zograph.fixed_points.progress import FixedPointInfo
from zograph.fixed_points.reporting import warn
from zograph.fixed_points.ring import slots_of
from zograph.fixed_points.solvers import SOLVE
from zograph.fixed_points.state import Cell, State, check_like
from zograph.fixed_points.tracing import TracedCell, fake_results

Body = Callable[..., Sequence[Tensor]]


def fixed_point(
    cell: Body, state: State, closed: State, *, solver: Solver, **options: Any
) -> State:
    """Solve with the named solver; ``auto`` is Anderson mixing."""
    return _solve(cell, state, closed, SolveOptions(solver=solver, **options))


def anderson_solve(
    cell: Body,
    state: State,
    closed: State,
    *,
    tol: float,
    max_iter: int,
    stop: Stop,
    window: int,
    beta: float,
    ridge: float,
    history_dtype: torch.dtype | None,
) -> State:
    """Solve by Anderson mixing."""
    mixing: dict[str, Any] = {"window": window, "beta": beta, "ridge": ridge}
    options = SolveOptions(tol, max_iter, "anderson", stop, history_dtype=history_dtype, **mixing)
    return _solve(cell, state, closed, options)


def picard_solve(
    cell: Body, state: State, closed: State, *, tol: float, max_iter: int, stop: Stop
) -> State:
    """Solve by forward iteration."""
    return _solve(cell, state, closed, SolveOptions(tol, max_iter, "picard", stop))


def trial_solve(cell: Body, state: State, closed: State, **options: Any) -> State:
    """Solve by both; return what each took, too: float64[2, 3], see :func:`compare`."""
    wanted = SolveOptions(**options)
    if any(isinstance(x, FakeTensor) for x in state):
        findings = torch.empty(2, 3, dtype=torch.float64)
        return (*_fake(cell, state, closed, wanted), findings)
    z, info, findings = compare(_body(cell, closed), state, wanted)
    return (*_results(z, info), findings)


SOLVES = (fixed_point, anderson_solve, picard_solve, trial_solve)


def is_solve(node: fx.Node) -> bool:
    """Whether a node is a solve."""
    return node.op == "call_function" and node.target in SOLVES


def is_of_solve(node: fx.Node) -> bool:
    """Whether a node is a solve or takes one of its results."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, fx.Node) and is_solve(source)


def options_of(traced: TracedCell) -> dict[str, Any]:
    """Return the keyword arguments of the node that capture leaves."""
    o = traced.options
    return {
        "solver": o.solver,
        "tol": o.tol,
        "max_iter": o.max_iter,
        "stop": o.stop,
        "window": o.window,
        "beta": o.beta,
        "ridge": o.ridge,
        "history_dtype": o.history_dtype,
    }


def _solve(cell: Body, state: State, closed: State, options: SolveOptions) -> State:
    if any(isinstance(x, FakeTensor) for x in state):
        return _fake(cell, state, closed, options)

    z, info, status = SOLVE[options.solver](_body(cell, closed), state, options)
    warn(status, len(state[0]), options, "zograph.fixed_point", stacklevel=3)
    if status.broken:
        broken = info.residual.isnan()
        z = tuple(x.masked_fill(broken.view(-1, *[1] * (x.dim() - 1)), torch.nan) for x in z)
    return _results(z, info)


def _body(cell: Body, closed: State) -> Cell:
    return lambda z: tuple(cell(*z, *closed))


def _results(z: State, info: FixedPointInfo) -> State:
    return (*(x.contiguous() for x in z), info.iterations, info.residual, info.converged)


def _fake(cell: Body, state: State, closed: State, options: SolveOptions) -> State:
    """Evaluate the cell once, in the memory that an iteration takes."""
    mixes = options.solver != "picard"
    window = History(state, slots_of(options), options.history_dtype) if mixes else None
    value = check_like(tuple(cell(*state, *closed)), state)
    residual = tuple(a - b for a, b in zip(value, state, strict=True))
    found = tuple(fake_results(state))
    del window, value, residual
    return found
