"""What the pass `anderson` decides in each mode, and how long an evaluation then takes."""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

import zograph
from zograph.cli.anderson.model import Classifier

Mode = Literal["always", "off", "auto"]
MODES: tuple[Mode, ...] = ("always", "off", "auto")
WIDTH = 512


class Linear(nn.Module):
    """``z -> a z + x`` with a diagonal a up to a factor, float32[B, 512]."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.linspace(0.0, factor, WIDTH))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.factors * z + x


class Dense(nn.Module):
    """``z -> tanh(W z + x)`` with random W of a spectral radius, float32[B, 512]."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * (radius / WIDTH**0.5))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x)


class Model(nn.Module):
    """The mean square of a cell's fixed point."""

    def __init__(self, cell: nn.Module, max_iter: int) -> None:
        super().__init__()
        self.cell, self.max_iter = cell, max_iter

    def forward(self, x: Tensor) -> Tensor:
        z, _ = zograph.fixed_point(
            lambda z: self.cell(z, x), torch.zeros_like(x), tol=1e-4, max_iter=self.max_iter
        )
        return z.square().mean()


def cases(args: argparse.Namespace, trained: Classifier, pixels: Tensor) -> dict[str, Any]:
    """Return five cells with their inputs; forward iteration wins on the first two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, WIDTH, generator=generator)
    with torch.no_grad():
        image = trained.stem(pixels)
    torch.manual_seed(0)
    return {
        "linear, 0.3": (Linear(0.3), x),
        "dense, 0.3": (Dense(0.3), x),
        "linear, 0.99": (Linear(0.99), x),
        "dense, 0.9": (Dense(0.9), x),
        "trained": (trained.cell, image),
    }


def measure(args: argparse.Namespace, trained: Classifier, pixels: Tensor) -> list[dict[str, Any]]:
    """Time an evaluation of each case in each mode, in turn; return medians."""
    rows = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not reach tol", category=UserWarning)
        for name, (cell, x) in cases(args, trained, pixels).items():
            rows.append({"case": name} | _case(args, Model(cell, args.max_iter), x))
    return rows


def _case(args: argparse.Namespace, model: Model, x: Tensor) -> dict[str, Any]:
    with ExitStack() as stack:
        steps = {}
        for mode in MODES:
            passes = zograph.default_passes().replace("anderson", zograph.passes.Anderson(mode))
            steps[mode] = stack.enter_context(
                zograph.compile(model, backend="eager", device="cpu", passes=passes)
            )
            steps[mode].prepare(x=x)
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(args.rounds):
            for mode, step in steps.items():
                start = time.perf_counter()
                step.evaluate(x=x)
                seconds[mode].append(time.perf_counter() - start)
        chosen = {choice.solver for choice in steps["auto"].solvers.values()}
    rounds = zip(*seconds.values(), strict=True)
    return {
        "seconds": {mode: statistics.median(taken) for mode, taken in seconds.items()},
        "chosen": "/".join(sorted(chosen)),
        "of_better": statistics.median(auto / min(on, off) for on, off, auto in rounds),
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Print the seconds of every mode."""
    print(
        f"\n{'case':16}{'always s':>10}{'off s':>10}{'auto s':>10}{'chosen':>11}{'of better':>11}"
    )
    for row in rows:
        shown = "".join(f"{row['seconds'][mode]:10.4f}" for mode in MODES)
        print(f"{row['case']:16}{shown}{row['chosen']:>11}{row['of_better']:11.2f}")
