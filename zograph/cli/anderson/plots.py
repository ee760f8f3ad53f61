"""The pictures of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zograph.cli.anderson.solvers import FORWARD, MIXED
from zograph.cli.inputs import InputError
from zograph.cli.output import check_file


def check(folder: Path) -> None:
    """Refuse pictures that could not be drawn after a long run.

    Raises
    ------
    InputError
        If matplotlib is missing or the folder cannot be written.
    """
    check_file(folder / "picture.svg", "--plot")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--plot needs matplotlib: pip install matplotlib, or zograph[plot]"
        ) from error


def draw(result: dict[str, Any], folder: Path) -> None:
    """Draw one picture for each problem and one for the trainings, as svg."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "zograph"}):
        for found in result.get("solvers", ()):
            figure = Figure(figsize=(12, 4), layout="constrained")
            _residuals(figure.subplots(1, 3), found)
            figure.suptitle(f"cell {found['problem']}")
            figure.savefig(folder / f"solvers-{found['problem']}.svg", metadata={"Date": None})
        if rows := result.get("training"):
            figure = Figure(figsize=(8, 4), layout="constrained")
            _accuracies(figure.subplots(), rows)
            figure.savefig(folder / "training.svg", metadata={"Date": None})


def _residuals(axes: Any, found: dict[str, Any]) -> None:
    """Draw residuals against iterations and seconds, and each sample's iterations."""
    iterations, seconds, counts = axes
    for name, row in found["solvers"].items():
        curve = row["curve"]
        iterations.semilogy(range(1, len(curve["residual"]) + 1), curve["residual"], label=name)
        seconds.semilogy(curve["seconds"], curve["residual"], label=name)
        counts.hist([n for n in row["iterations"] if n], bins=20, histtype="step", label=name)
    mixed = found["solvers"][MIXED]
    if mixed["crossover"] is not None:
        seconds.axvline(mixed["crossover"], color="0.5", linewidth=0.8)
    crossover = "none" if mixed["crossover"] is None else f"{mixed['crossover']:.2f} s"
    seconds.set_title(
        f"crossover with {FORWARD} {crossover}, penalty {mixed['penalty']:.2f}", fontsize="small"
    )
    iterations.set(xlabel="evaluations", ylabel="relative residual, mean of the samples")
    seconds.set(xlabel="seconds")
    counts.set(xlabel="evaluations of a sample", ylabel="samples")
    iterations.legend()


def _accuracies(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the test accuracies of the training runs."""
    colors: dict[str, Any] = {}
    for row in rows:
        label = f"{row['method']}, {row['solver']}"
        times = [row["seconds"] * i / (len(row["accuracies"]) - 1)
                 for i in range(len(row["accuracies"]))]  # fmt: skip
        known = colors.get(label)
        (line,) = axis.plot(times, row["accuracies"], color=known, label=None if known else label)
        colors[label] = line.get_color()
    axis.set(xlabel="seconds of training", ylabel="test accuracy")
    axis.legend()
