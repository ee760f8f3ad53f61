"""The classifier trained for equal time with Anderson mixing and with forward iteration."""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import zograph
from zograph.cli.anderson.images import Images
from zograph.cli.anderson.model import BATCH, LR, SMOOTH, Classifier, batches, objective

ZO: dict[str, Any] = {"lr": 1e-4, "eps": 1e-2, "backend": "eager", "device": "cpu"}
TESTED = 100
"""Images a batch in a test."""

METHODS = ("backpropagation", "zeroth order")
SOLVERS = ("anderson", "picard")

HEAD = "method            solver      seed   steps    before    after  fluctuation   inference s"

Step = Callable[[Tensor, Tensor], None]


def measure(args: argparse.Namespace, trained: Classifier, images: Images) -> list[dict[str, Any]]:
    """Train in every way with every seed; return the accuracies and times of each run.

    Backpropagation starts from new weights, zeroth-order steps from the recipe's.
    """
    print(HEAD)
    rows = []
    for seed in args.seeds:
        for method in METHODS:
            for solver in SOLVERS:
                torch.manual_seed(seed)
                options = {"tol": 1e-3, "max_iter": 50, "solver": solver}
                model = Classifier(**options)
                if method == METHODS[1]:
                    model.load_state_dict(trained.state_dict())
                row = {"method": method, "solver": solver, "seed": seed}
                rows.append(row | trained_for(args, method, seed, model, images))
                print(_line(rows[-1]), flush=True)
    return rows


def trained_for(
    args: argparse.Namespace, method: str, seed: int, model: Classifier, images: Images
) -> dict[str, Any]:
    """Train for `train_seconds`, after one step; tests are left out of the time."""
    found = batches(images.train_x, images.train_y, BATCH)
    pixels, labels = images.test_x[: args.tested], images.test_y[: args.tested]
    accuracies = [accuracy(model, pixels, labels)]
    taken, steps = 0.0, 0
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", message=".*(did not reach tol|samples diverged)")
        train, settle = _stepper(method, model, seed, stack)
        train(*next(found))
        for check in range(1, args.checks + 1):
            while taken < args.train_seconds * check / args.checks:
                batch = next(found)
                start = time.perf_counter()
                train(*batch)
                taken += time.perf_counter() - start
                steps += 1
            settle()
            accuracies.append(accuracy(model, pixels, labels))
        seconds = inference(model, pixels[: args.batch])
    return {
        "steps": steps,
        "seconds": taken,
        "accuracies": accuracies,
        "accuracy": accuracies[-1],
        "fluctuation": statistics.stdev(accuracies[args.checks // 2 :]),
        "inference_seconds": seconds,
    }


def _stepper(
    method: str, model: Classifier, seed: int, stack: ExitStack
) -> tuple[Step, Callable[[], None]]:
    """Return what takes one training step, and what puts its result into the model."""
    if method == METHODS[0]:
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)

        def descend(pixels: Tensor, labels: Tensor) -> None:
            model.train()
            optimizer.zero_grad()
            torch.autograd.backward(objective(model, pixels, labels, SMOOTH))
            optimizer.step()

        return descend, lambda: None
    compiled = zograph.compile(model.eval(), loss_fn=_loss, seed=seed, **ZO)
    step = stack.enter_context(compiled)

    def perturb(pixels: Tensor, labels: Tensor) -> None:
        step(images=pixels, labels=labels)

    return perturb, step.synchronize


def _loss(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy(model: Classifier, pixels: Tensor, labels: Tensor) -> float:
    """Return the part of the images that the model, in eval mode, gets right."""
    model.eval()
    found = torch.cat([model(some).argmax(dim=1) for some in torch.split(pixels, TESTED)])
    return float((found == labels).double().mean())


@torch.no_grad()
def inference(model: Classifier, pixels: Tensor) -> float:
    """Return the seconds of a forward pass, the median of three."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        model(pixels)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['method']:18}{row['solver']:10}{row['seed']:6}{row['steps']:8}"
        f"{row['accuracies'][0]:10.3f}{row['accuracy']:9.3f}{row['fluctuation']:13.4f}"
        f"{row['inference_seconds']:12.3f}"
    )
