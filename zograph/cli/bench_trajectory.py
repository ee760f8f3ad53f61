"""`zograph bench trajectory`: zeroth-order runs with and without Anderson mixing.

Every run starts from the same weights and has the same number of forwards ("evaluations"; a step
of q directions has 2 q). Learning rates of plain runs are tuned by doubling and halving, with the
first seed; a mixed run takes that of the plain run with as many directions. The target of each seed
is what its plain run with one direction has come to. Losses are of all data, also where the steps
see batches of it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import zograph
from zograph.cli.inputs import integer
from zograph.cli.output import check_file

CHECKS = 100
"""How often in a run the loss of all data is computed; these forwards are not counted."""
BLOWN_UP = 1e3
"""Times its first loss at which a run is over."""

PENALTY = 1e-3
"""On the squared weights of logistic regression."""
PLAIN = "plain"

Batch = dict[str, Any]


class Quadratic(nn.Module):
    """Half of ``sum(i ** -power * w_i ** 2)`` over `size` weights, times the mean of a batch."""

    curvature: torch.Tensor

    def __init__(self, size: int, power: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(size))
        self.register_buffer("curvature", torch.arange(1.0, size + 1) ** -power)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.curvature * self.w**2).sum() * x.mean()


class Logistic(nn.Module):
    """Logistic regression: x f32[B, features], y i64[B] -> mean cross entropy and a penalty.

    Without it the digits, which a plane can part, have no minimum.
    """

    def __init__(self, features: int, classes: int, penalty: float = PENALTY) -> None:
        super().__init__()
        self.penalty = penalty
        self.linear = nn.Linear(features, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        penalty = self.penalty / 2 * self.linear.weight.square().sum()
        return F.cross_entropy(self.linear(x), y) + penalty


@dataclass(frozen=True)
class Problem:
    """A loss to minimise: the model, all of its data, and how many rows a step sees."""

    name: str
    model: Callable[[], nn.Module]
    data: Batch
    rows: int | None = None
    """None: all."""

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of a run, the same for every run."""
        generator = torch.Generator().manual_seed(0)
        size = len(next(iter(self.data.values())))
        while True:
            if self.rows is None:
                yield self.data
            else:
                picked = torch.randint(size, (self.rows,), generator=generator)
                yield {k: v[picked] for k, v in self.data.items()}


@dataclass
class Run:
    """What a run has come to."""

    lr: float
    directions: int
    evaluations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Behind so many evaluations."""
    gate: dict[str, int] | None = None
    """Of a mixed run: cycles, and how they ended."""

    @property
    def final(self) -> float:
        """The last loss; infinite if the run has blown up."""
        return self.losses[-1] if self.losses[-1] < self.losses[0] else math.inf

    def reached(self, target: float) -> int | None:
        """Return the evaluations behind which the loss was at most `target` first."""
        pairs = zip(self.evaluations, self.losses, strict=True)
        return next((n for n, loss in pairs if loss <= target), None)


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "trajectory",
        help="zeroth-order runs with and without Anderson mixing",
        description="Minimise ill-conditioned quadratics of 1500 weights, and logistic regression "
        "of features of decaying variance (3002 weights) and of scikit-learn's digits (2570, with "
        "all data and with batches), by plain zeroth-order steps and with Anderson mixing at equal "
        "forward evaluations.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--powers", type=float, nargs="*", default=[2, 3, 4], metavar="P",
        help="quadratics with curvatures i ** -P")  # fmt: skip
    add("--rows", type=integer(0), nargs="*", default=[0, 32, 128, 512, 2048], metavar="N",
        help="batch sizes of logistic regression; 0: all rows, of both data sets")  # fmt: skip
    add("--directions", type=integer(1), default=16, metavar="Q", help="shared by a cycle")
    add("--inner-steps", type=integer(3), default=8, metavar="K", help="of a cycle")
    add("--seeds", type=integer(0), nargs="+", default=[0, 1, 2], metavar="N")
    add("--evaluations", type=integer(100), default=12000, metavar="N", help="of each run")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    torch.set_num_threads(1)
    mixing = zograph.Anderson(directions=args.directions, inner_steps=args.inner_steps)
    print(
        f"{args.evaluations} evaluations, cycles of {mixing.inner_steps} steps over "
        f"{mixing.directions} directions, {len(args.seeds)} seeds\n{'':36}{'lr':>8}{'loss':>11}"
        f"{'spread':>10}{'to target':>11}{'of plain':>10}"
    )
    found = {}
    for problem in problems(args.powers, args.rows):
        found[problem.name] = compare(problem, mixing, args.evaluations, args.seeds)
        report(problem.name, found[problem.name])
    if args.json:
        given = {"evaluations": args.evaluations, "anderson": asdict(mixing)}
        rows = {
            name: {way: [asdict(run) for run in runs] for way, runs in ways.items()}
            for name, ways in found.items()
        }
        args.json.write_text(
            json.dumps(given | {"problems": rows}, indent=2) + "\n", encoding="utf-8"
        )
    return 0


def problems(powers: list[float], rows: list[int]) -> Iterator[Problem]:
    """Yield the problems."""
    for power in powers:
        name = f"quadratic, i^-{power:g}"
        yield Problem(name, partial(Quadratic, 1500, power), {"x": torch.ones(2)})
    if not rows:
        return
    if 0 in rows:
        data = features(400, 1500, 3)
        yield Problem("logistic, i^-3", partial(Logistic, 1500, 2, 0.0), data)
    data = digits()
    for count in rows:
        picked = data if count else {k: v[:200] for k, v in data.items()}
        name = f"logistic, batch {count}" if count else "logistic, all of 200"
        yield Problem(name, partial(Logistic, 256, 10), picked, count or None)


def features(rows: int, size: int, power: float) -> Batch:
    """Return normal features of decaying variance, and labels that follow from them by chance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size, generator=generator)
    x *= torch.arange(1.0, size + 1) ** (-power / 2)
    odds = torch.sigmoid(x @ torch.randn(size, generator=generator))
    return {"x": x, "y": torch.bernoulli(odds, generator=generator).long()}


def digits() -> Batch:
    """Return scikit-learn's digits, scaled up to 16x16: f32[1797, 256], and i64[1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    wide = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    return {"x": wide.flatten(1), "y": torch.tensor(data.target)}


def compare(
    problem: Problem, mixing: zograph.Anderson, evaluations: int, seeds: Sequence[int]
) -> dict[str, list[Run]]:
    """Tune the plain runs, mix at the rate of the one with as many directions; a run a seed."""
    first, *others = seeds
    ways: dict[str, list[Run]] = {}
    for way, directions in ((PLAIN, 1), (f"plain, q = {mixing.directions}", mixing.directions)):
        best = tuned(problem, directions, evaluations, first)
        ways[way] = [best, *(trained(problem, best.lr, directions, evaluations, s) for s in others)]
    ways["mixed"] = [
        trained(problem, best.lr, directions, evaluations, seed, mixing) for seed in seeds
    ]
    return ways


def tuned(problem: Problem, directions: int, evaluations: int, seed: int) -> Run:
    """Return the run with the lowest last loss among rates a factor of 2 apart."""
    runs: dict[int, Run] = {}
    best = 0
    while not {best - 1, best, best + 1} <= runs.keys():
        for power in {best - 1, best, best + 1} - runs.keys():
            runs[power] = trained(problem, 2.0**power, directions, evaluations, seed)
        lowest = min(runs, key=lambda k: runs[k].final)
        best = lowest if math.isfinite(runs[lowest].final) else min(runs)
    return runs[best]


def trained(
    problem: Problem,
    lr: float,
    directions: int,
    evaluations: int,
    seed: int,
    mixing: zograph.Anderson | None = None,
) -> Run:
    """Run until the evaluations are used up or the loss has blown up."""
    result, spent = Run(lr, directions), 0
    with zograph.compile(
        problem.model(),
        loss_fn=lambda m, **batch: m(**batch),
        lr=lr,
        device="cpu",
        backend="eager",
        directions=directions,
        seed=seed,
        anderson=mixing,
        on_nan="skip",
    ) as step:
        for batch in problem.batches():
            if spent >= len(result.losses) * evaluations // CHECKS:
                result.evaluations.append(spent)
                result.losses.append(float(step.evaluate(**problem.data).loss))
                if not result.losses[-1] <= BLOWN_UP * result.losses[0]:
                    break
            if spent >= evaluations:
                break
            step(**batch)
            spent += 2 * directions
        if step.mixing is not None:
            kept = ("cycles", "mixed", "closed", "rejected", "slow")
            result.gate = {name: getattr(step.mixing, name) for name in kept}
    return result


def report(name: str, ways: dict[str, list[Run]]) -> None:
    """Print the rows of one problem."""
    goals = [(run.final, run.reached(run.final)) for run in ways[PLAIN]]
    for way, runs in ways.items():
        losses = [run.losses[-1] for run in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        counts = [run.reached(goal) for run, (goal, _) in zip(runs, goals, strict=True)]
        ratios = [n / m for n, (_, m) in zip(counts, goals, strict=True) if n and m]
        shown = f"{'never' if not ratios else f'{len(ratios)} of {len(runs)}':>11}{'':>10}"
        if len(ratios) == len(runs):
            middle = statistics.median(n for n in counts if n)
            shown = f"{middle:11.0f}{statistics.median(ratios):10.2f}"
        mean = statistics.mean(losses)
        print(f"{name:22}{way:14}{runs[0].lr:8.3g}{mean:11.4g}{spread:10.2g}{shown}")
    gates = [run.gate for run in ways["mixed"] if run.gate is not None]
    told = (f"{key} {[gate[key] for gate in gates]}" for key in gates[0])
    print(f"{'':22}{', '.join(told)}", flush=True)
