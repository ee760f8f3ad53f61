"""`zograph bench anderson`: fixed points by Anderson mixing and by forward iteration."""

from __future__ import annotations

import argparse
import json
import pickle
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from zograph.cli.anderson import images, mixing, modes, plots, report, solvers, training
from zograph.cli.anderson.images import Images
from zograph.cli.anderson.model import Classifier, train
from zograph.cli.anderson.problems import LINEAR, TRAINED, problems
from zograph.cli.inputs import InputError, integer, number
from zograph.cli.output import check_file

PARTS = ("solvers", "mixing", "modes", "training")
SIDES = (4, 8, 16, 32)
"""Pixels a side that the images can be shrunk to."""


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "anderson",
        help="fixed points: Anderson mixing, torchdeq's and forward iteration",
        description="Solve the CIFAR-10 deep-equilibrium cell by forward iteration, torchdeq's "
        "Anderson mixing and zograph's, alternating in one run; time the mixing alone; train the "
        "model with both. The cell is trained first, by a fixed recipe.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=["solvers", "mixing", "modes"], metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all but training)")  # fmt: skip
    add("--data", type=Path, metavar="PATH",
        help="the folder of CIFAR-10's python batches, or an npz file with train_x, train_y, "
        "test_x, test_y; scikit-learn's digits without it")  # fmt: skip
    add("--model", type=Path, metavar="FILE", help="the trained model: read, or written if absent")
    add("--steps", type=integer(1), default=60, metavar="N", help="of the recipe")
    add("--cells", nargs="+", type=cell, default=[TRAINED, "0.95", "0.99", LINEAR], metavar="CELL",
        help="trained; a factor that the trained cell is scaled to contract by; linear, a map with "
        "a spectrum up to 0.99 (default: trained 0.95 0.99 linear)")  # fmt: skip
    add("--batch", type=integer(2), default=100, metavar="B", help="images")
    add("--pixels", type=int, choices=SIDES, default=32, metavar="N",
        help="the images' side in solvers and mixing (default: %(default)s)")  # fmt: skip
    add("--train-pixels", type=int, choices=SIDES, default=16, metavar="N",
        help="and where the model is trained (default: %(default)s)")  # fmt: skip
    add("--threads", type=integer(1), default=2, metavar="N")
    add("--rounds", type=integer(1), default=3, metavar="N")
    add("--tol", nargs="+", type=number(above=0), default=[1e-3, 1e-4], metavar="T")
    add("--max-iter", type=integer(3), default=300, metavar="N", help="evaluations of a solve")
    add(
        "--window", type=integer(2), default=5, metavar="N", help="of zograph; torchdeq has its own"
    )
    add(
        "--train-seconds", type=number(above=0), default=60.0, metavar="S", help="of a training run"
    )
    add("--seeds", nargs="+", type=integer(0), default=[0, 1, 2], metavar="N", help="of training")
    add("--checks", type=integer(2), default=8, metavar="N",
        help="tests in a training run; those of its second half tell the fluctuation")  # fmt: skip
    add("--tested", type=integer(1), default=300, metavar="N", help="images of a test")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")
    add("--plot", type=Path, metavar="FOLDER", help="draw into this folder; needs matplotlib")


def cell(text: str) -> str:
    """Return the name of a cell: ``trained``, ``linear`` or a positive number."""
    return text if text in (TRAINED, LINEAR) else f"{number(above=0)(text):g}"


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    if args.plot:
        plots.check(args.plot)
    torch.set_num_threads(args.threads)
    found = images.load(args.data)
    for option, count in (("batch", args.batch), ("tested", args.tested)):
        if count > len(found.test_x):
            raise InputError(f"--{option} {count}: there are {len(found.test_x)} test images")
    result = measure(args, found)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plots.draw(result, args.plot)
    return 0


def measure(args: argparse.Namespace, full: Images) -> dict[str, Any]:
    """Run the parts; print the table of each."""
    side = args.train_pixels
    small = replace(full, train_x=shrunk(full.train_x, side), test_x=shrunk(full.test_x, side))
    trained = obtain(args, small)
    result: dict[str, Any] = {
        "images": full.source,
        "batch": args.batch,
        "threads": args.threads,
        "torch": torch.__version__,
        "torchdeq": find_spec("torchdeq") is not None,
    }
    print(f"{full.source}, batch {args.batch}, {args.threads} threads, torch {torch.__version__}")
    pixels = shrunk(full.test_x[: args.batch], args.pixels)
    if "solvers" in args.parts:
        if not result["torchdeq"]:
            print("torchdeq is not installed: its column is left out (pip install torchdeq)")
        result["solvers"] = []
        for problem in problems(trained, pixels, args.cells):
            result["solvers"].append(solvers.measure(args, problem))
            report.solvers(result["solvers"][-1])
    if "mixing" in args.parts:
        with torch.no_grad():
            state = trained.stem(pixels)
        result["mixing"] = mixing.measure(args, state)
        report.mixing(result["mixing"])
    if "modes" in args.parts:
        result["modes"] = modes.measure(args, trained, pixels)
        modes.report(result["modes"])
    if "training" in args.parts:
        result["training"] = training.measure(args, trained, small)
    return result


def obtain(args: argparse.Namespace, small: Images) -> Classifier:
    """Read the trained model from its file; without one train it, and write the file if named.

    Raises
    ------
    InputError
        If the file holds something else, or cannot be written.
    """
    if args.model and args.model.exists():
        model = Classifier()
        try:
            model.load_state_dict(torch.load(args.model, weights_only=True))
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as error:
            raise InputError(f"--model {args.model}: holds no model of this benchmark") from error
        return model.eval()
    if args.model:
        check_file(args.model, "--model")
    print(f"training the cell: {args.steps} steps", flush=True)
    model = train(small.train_x, small.train_y, args.steps)
    if args.model:
        torch.save(model.state_dict(), args.model)
    return model


def shrunk(pixels: Tensor, side: int) -> Tensor:
    """Shrink images to `side` x `side` pixels by averages."""
    return avg_pool2d(pixels, images.SIZE // side)
