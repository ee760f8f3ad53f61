"""`zograph bench accuracy`: what streaming, elision and low-bit transfers cost in accuracy.

The same task, examples and steps for each way, with several seeds; beside them a plain MeZO loop
with noise of its own (arXiv 2305.17333, algorithm 1).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from zograph.cli import finetune
from zograph.cli.inputs import integer
from zograph.cli.output import check_file
from zograph.cli.scores import Score

STREAMED = {"memory": "minimum", "storage": "disk"}
WAYS: dict[str, dict[str, Any] | None] = {
    "plain MeZO": None,
    "resident": {},
    "streamed": STREAMED,
    "elided": STREAMED | {"fold_every": 8},
    "int8": STREAMED | {"fold_every": 8, "transfer_dtype": "int8"},
    "fp8": STREAMED | {"fold_every": 8, "transfer_dtype": "float8_e4m3fn"},
    "int8, each step": STREAMED | {"transfer_dtype": "int8"},
}
"""Options of each way to train; None: without zograph's step."""


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "accuracy",
        help="held-out scores of plain MeZO and of every way to store and move weights",
        description="Train a model as finetune does, with several seeds, by a plain MeZO loop and "
        "by the compiled step with its weights resident, streamed from a disk, with write-backs "
        "left out, and stored in low-bit formats. Takes finetune's options.",
    )
    finetune.add_arguments(parser)
    parser.set_defaults(run=run)
    parser.add_argument("--seeds", type=integer(0), nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    result: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for seed in args.seeds:
        for way in args.ways:
            given = argparse.Namespace(**vars(args) | {"seed": seed} | (WAYS[way] or {}))
            found = trained(given, plain=WAYS[way] is None)
            result[way].append(found | {"seed": seed})
            after = Score.from_dict(found["after"])
            print(f"seed {seed}, {way}: held out {after}", flush=True)
    report(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def trained(args: argparse.Namespace, *, plain: bool) -> dict[str, Any]:
    """Train one model; return its held-out scores before and after."""
    from zograph.cli.models import choose_trainable, load
    from zograph.cli.sets import make_sets
    from zograph.cli.training import open_step, read_data, train

    with tempfile.TemporaryDirectory(prefix="zograph-accuracy-") as work:
        data = read_data(args)
        if args.storage == "disk":
            args.storage = work
        loaded = load(args.model, args.task, data.classes, seed=args.seed, storage=args.storage)
        sets = make_sets(args, data, loaded)
        choose_trainable(loaded.model, args.train)
        if plain:
            model = loaded.model.eval()
            device = next(model.parameters()).device
            before = sets.scores(model, device)
            mezo(args, model, sets)
            after = sets.scores(model, device)
        else:
            with open_step(args, loaded.model, None) as step:
                before = sets.scores(step.evaluate, step.options.device)
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(io.StringIO()),
                ):
                    train(args, step, sets, [])
                after = sets.scores(step.evaluate, step.options.device)
    return {"before": before["held_out"].as_dict(), "after": after["held_out"].as_dict()}


@torch.no_grad()
def mezo(args: argparse.Namespace, model: torch.nn.Module, sets: Any) -> None:
    """Train as MeZO does: noise is drawn anew from a seed for each of four passes."""
    from zograph.cli.batches import shuffled

    trainable = [p for p in model.parameters() if p.requires_grad]

    def shift(seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in trainable:
            if args.distribution == "rademacher":
                z = torch.randint(0, 2, p.shape, generator=generator).to(p.dtype) * 2 - 1
            else:
                z = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(z, alpha=scale)

    batches = shuffled(sets.train, sets.pad, sets.limit, sets.size, args.seed)
    for i, batch in enumerate(islice(batches, args.steps)):
        lr = args.lr * (1 - i / args.steps) if args.schedule == "linear" else args.lr
        seed = args.seed * args.steps + i
        shift(seed, args.eps)
        plus = float(model(**batch).loss)
        shift(seed, -2 * args.eps)
        minus = float(model(**batch).loss)
        shift(seed, args.eps)
        shift(seed, -lr * (plus - minus) / (2 * args.eps))


def report(result: dict[str, list[dict[str, Any]]]) -> None:
    """Print means and the spread over the seeds."""
    print(f"\n{'':<18}{'held-out loss':>22}{'accuracy':>22}")
    for way, runs in result.items():
        columns = []
        for key in ("loss", "accuracy"):
            values = [r["after"][key] for r in runs if r["after"].get(key) is not None]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            columns.append(f"{statistics.mean(values):.4f} +- {spread:.4f}" if values else "")
        print(f"{way:<18}{columns[0]:>22}{columns[1]:>22}")
