"""The steps of a seed log as a table for other programs, and as a picture."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np

from zograph.cli.inputs import InputError
from zograph.cli.output import check_file
from zograph.seedlog import LogFile
from zograph.seedlog.columns import COLUMNS, Column, mean_losses, projected_grads, rows

SMOOTHED = 50
"""The line over the losses of single steps is the mean of so many."""

PICTURES = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
"""Endings, and the metadata that leaves the date out: the same log gives the same bytes."""

DENSE = 20_000
"""From so many steps on the points are drawn as pixels inside the picture."""


def write_csv(log: LogFile, path: Path | None) -> None:
    """Write `COLUMNS` of every step and direction; to standard output if there is no path.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    if path is None:
        _write(log, sys.stdout)
        return
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            _write(log, file)
    except OSError as error:
        raise InputError(f"--csv {path}: cannot be written: {error.strerror}") from error


def _write(log: LogFile, file: Any) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows(log))


def plot(log: LogFile, path: Path) -> None:
    """Draw loss and projected gradient over the steps.

    Raises
    ------
    InputError
        If matplotlib is missing, the ending is unknown, the log is empty, or the file cannot be
        written.
    """
    if path.suffix not in PICTURES:
        raise InputError(f"--plot {path}: the ending must be one of {', '.join(PICTURES)}")
    check_file(path, "--plot")
    if not len(log):
        raise InputError(f"--plot: {log.path} has no step yet")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "--plot needs matplotlib: pip install matplotlib, or zograph[plot]"
        ) from error
    steps, losses = log.table["step"], mean_losses(log)
    with matplotlib.rc_context({"svg.hashsalt": "zograph"}):
        figure = Figure(figsize=(8, 6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        points: dict[str, Any] = {"s": 4, "linewidths": 0, "rasterized": len(log) > DENSE}
        upper.scatter(steps, losses, color="0.7", label="of a step", **points)
        upper.plot(steps, smoothed(losses), label=f"mean of {SMOOTHED} steps")
        upper.set_ylabel("loss")
        upper.legend()
        lower.scatter(steps, projected_grads(log), **points)
        lower.axhline(0, color="0.5", linewidth=0.8)
        lower.set_ylabel("projected gradient")
        lower.set_xlabel("step")
        upper.set_title(log.path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata=PICTURES[path.suffix])
        except OSError as error:
            raise InputError(f"--plot {path}: cannot be written: {error.strerror}") from error


def smoothed(losses: Column) -> Column:
    """Return the mean of the last `SMOOTHED` finite values up to each one, NaN if there is none."""
    finite = np.isfinite(losses)
    sums = np.cumsum(np.where(finite, losses, 0.0), dtype=np.float64)
    counts = np.cumsum(finite)
    for total in (sums, counts):
        total[SMOOTHED:] -= total[:-SMOOTHED].copy()
    with np.errstate(invalid="ignore"):
        found: Column = sums / counts
    return found
