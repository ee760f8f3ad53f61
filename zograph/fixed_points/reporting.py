"""What a user is told of a solve: warnings with counts, and errors."""

from __future__ import annotations

import warnings

from zograph.errors import CellError
from zograph.fixed_points.options import SolveOptions
from zograph.fixed_points.progress import Status


def report(
    status: Status, batch: int, options: SolveOptions, what: str, stacklevel: int = 2
) -> None:
    """Warn of samples that have not converged, in the name of the `stacklevel`-th caller.

    Raises
    ------
    CellError
        If the cell returned NaN.
    """
    if status.broken:
        raise CellError(
            f"{what}: the cell returned NaN for {status.broken} of {batch} samples. Check the "
            f"cell at z0, and that what it closes over is finite."
        )
    warn(status, batch, options, what, stacklevel + 1)


def warn(status: Status, batch: int, options: SolveOptions, what: str, stacklevel: int = 2) -> None:
    """Warn of samples that have not converged; say nothing of NaN, which shows by itself."""
    if status.diverged:
        warnings.warn(
            f"{what}: {status.diverged} of {batch} samples diverged and were stopped at their best "
            f"iterate. The map may not contract; try a smaller beta or spectral regularisation.",
            stacklevel=stacklevel,
        )
    if status.running:
        warnings.warn(
            f"{what}: {status.running} of {batch} samples did not reach tol={options.tol:g} in "
            f"max_iter={options.max_iter} evaluations; their best iterates are returned.",
            stacklevel=stacklevel,
        )
