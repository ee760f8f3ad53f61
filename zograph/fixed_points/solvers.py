"""The two solvers: forward (Picard) iteration and Anderson mixing.

Both evaluate the cell at z, stop each sample on its residual, freeze the samples that have
stopped, and return each sample's best z. Neither keeps a graph for autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from zograph.fixed_points.history import History
from zograph.fixed_points.options import SolveOptions, Solver
from zograph.fixed_points.progress import FixedPointInfo, Progress, Status
from zograph.fixed_points.ring import Ring
from zograph.fixed_points.state import Cell, State, choose, rows, squares, wide

Solved = tuple[State, FixedPointInfo, Status]


def picard(cell: Cell, z0: State, options: SolveOptions) -> Solved:
    """Iterate ``z <- f(z)``.

    Parameters
    ----------
    cell
        The map; state to state.
    z0 : tuple of Tensor
        Where to start; left as it is.
    options : SolveOptions
        `window`, `beta` and `ridge` have no meaning here.

    Returns
    -------
    state : tuple of Tensor
        For each sample the z with the smallest residual; z0 if none was finite.
    info : FixedPointInfo
    status : Status
    """
    progress = Progress(len(z0[0]), z0[0].device, options)
    z = best = z0
    for _ in range(options.max_iter):
        value = cell(z)
        pairs = zip(rows(value), rows(z), strict=True)
        sums = torch.stack([squares(a, b) for a, b in pairs]).sum(dim=0)
        improved, go_on = progress.update(*sums.sqrt().unbind(dim=1))
        best = choose(improved, z, best)
        if not go_on:
            break
        z = choose(progress.active, value, z)
    return best, *progress.finish(wide(z0[0].dtype))


def anderson(cell: Cell, z0: State, options: SolveOptions) -> Solved:
    """Mix the last iterates so that the mixed residual is smallest (Anderson 1965, type II).

    The next z is ``sum_i a_i (z_i + beta r_i)`` with ``r = f(z) - z`` and the weights a that
    minimise ``||sum_i a_i r_i||`` under ``sum a = 1`` (Walker and Ni 2011), found from the Gram
    matrix of the residuals, to which each iteration adds one row.

    A sample whose residual grows, or that gains too little, restarts by a forward step from its
    best iterate (:mod:`zograph.fixed_points.safeguard`). So for a map that contracts by L in the
    Euclidean norm, n evaluations lower the residual by ``L ** ((n - 1) // (window + 1))`` or
    more (with `beta` 1): never slower than forward iteration by more than a factor of window + 1.

    Parameters and results are those of :func:`picard`. Memory: twice the window in states.
    """
    batch, device = len(z0[0]), z0[0].device
    progress, ring = Progress(batch, device, options), Ring(batch, device, options)
    history = History(z0, ring.slots, options.history_dtype)
    z = z0
    for k in range(options.max_iter):
        value, slot = cell(z), ring.next_slot()
        seen = history.observe(slot, progress.active, value, z)
        improved, go_on = progress.update(seen.residual, seen.value)
        ring.record(k, slot, progress.active | improved, improved, seen.products)
        if not go_on:
            break
        z = history.mix(ring.weights(k, slot, progress.active, seen.residual), options.beta - 1)
    found = history.mix(ring.best_alone(), -1.0)
    return choose(ring.best >= 0, found, z0), *progress.finish(wide(z0[0].dtype))


SOLVE: dict[Solver, Callable[[Cell, State, SolveOptions], Solved]] = {
    "auto": anderson,
    "anderson": anderson,
    "picard": picard,
}
"""The solvers by the name that options give them."""
