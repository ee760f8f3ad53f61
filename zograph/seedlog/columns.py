"""What the records of a log say, as columns: for tables, pictures and a run's progress."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from zograph.seedlog.file import LogFile
from zograph.seedlog.format import SKIPPED

Column = np.ndarray[Any, np.dtype[Any]]

COLUMNS = (
    "step",
    "lr",
    "skipped",
    "seed",
    "scale",
    "coef",
    "loss_plus",
    "loss_minus",
    "projected_grad",
)
"""Of :func:`rows`."""

_BLOCK = 1 << 12
"""Steps whose text is in memory at a time."""


def branch_losses(log: LogFile) -> Column:
    """Return loss+ and loss- of each step: float32 [steps, 2], the means over its directions.

    With the bits of `zograph.StepRecord`, as all columns here.
    """
    losses = log.table["each"]["losses"].astype(np.float64)
    means: Column = (_in_order(losses) / losses.shape[1]).astype(np.float32)
    return means


def mean_losses(log: LogFile) -> Column:
    """Return what each step returned: float32 [steps]."""
    plus, minus = branch_losses(log).astype(np.float64).T
    means: Column = ((plus + minus) / 2).astype(np.float32)
    return means


def projected_grads(log: LogFile) -> Column:
    """Return the projected gradient of each step: float64 [steps], the mean over directions."""
    grads = _grads(log, log.table)
    means: Column = _in_order(grads) / grads.shape[1]
    return means


def skipped(log: LogFile) -> Column:
    """Return which steps moved nothing because a loss was not finite: bool [steps]."""
    return _skipped(log.table)


def rows(log: LogFile) -> Iterator[tuple[str, ...]]:
    """Yield a row of `COLUMNS` for every step and direction, in order.

    Every number has as many digits as it takes to read the same float32 or float64 back.
    """
    directions = log.header.directions
    for start in range(0, len(log), _BLOCK):
        table = log.table[start : start + _BLOCK]
        each = table["each"].reshape(-1)
        flags = _skipped(table).astype(np.int64)
        of_steps = (np.repeat(c, directions) for c in (table["step"], table["lr"], flags))
        of_directions = (each["seed"], each["scale"], each["coef"], *each["losses"].T)
        columns = (*of_steps, *of_directions, _grads(log, table).reshape(-1))
        yield from zip(*(c.astype(str).tolist() for c in columns), strict=True)


def _skipped(table: Column) -> Column:
    found: Column = (table["flags"] & SKIPPED) != 0
    return found


def _grads(log: LogFile, table: Column) -> Column:
    """Return (loss+ - loss-) / (2 eps): float64 [steps, directions]."""
    losses = table["each"]["losses"].astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity, of a skipped step
        found: Column = (losses[..., 0] - losses[..., 1]) / (2 * log.header.options["eps"])
    return found


def _in_order(values: Column) -> Column:
    """Add up the directions, axis 1, one after the other."""
    total: Column = values[:, 0]
    for i in range(1, values.shape[1]):
        total = total + values[:, i]
    return total
