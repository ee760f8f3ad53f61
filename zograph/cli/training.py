"""The run of `zograph finetune`: data, model, score, steps, score, result."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import zograph
from zograph.cli.batches import Encoded, encode, in_order, length_limit, shuffled
from zograph.cli.data import Dataset, labelled, load_tables, unlabelled
from zograph.cli.inputs import InputError
from zograph.cli.models import CLASSIFICATION, Loaded, choose_trainable, load, locate, own_classes
from zograph.cli.output import OutputFolder, check_picture
from zograph.cli.progress import Interrupt, Progress, peak_bytes
from zograph.cli.scores import Run, Score, change, score

SAME = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""How far the loss of the reloaded float32 model may be from the step's, by compute dtype."""


@dataclass(frozen=True)
class Sets:
    """The encoded examples and how they are batched."""

    train: list[Encoded]
    sample: list[Encoded]
    held_out: list[Encoded]
    pad: int
    limit: int
    size: int

    def scores(self, run: Run, device: torch.device) -> dict[str, Score]:
        """Score a model on the training sample and on the held-out examples."""
        sets = {"train": self.sample, "held_out": self.held_out}
        return {
            name: score(run, in_order(rows, self.pad, self.limit, self.size), device)
            for name, rows in sets.items()
        }


def finetune(args: argparse.Namespace) -> int:
    """Run `zograph finetune` with parsed arguments.

    Returns
    -------
    int
        0; 1 if the saved model does not score as it did; 130 after Ctrl-C.

    Raises
    ------
    zograph.errors.ZographError
        If an input is at fault or a step fails; nothing was written then.
    """
    with ExitStack() as stack:
        if args.draw:
            check_picture(args.draw)
        out = None
        if args.out:
            out = stack.enter_context(OutputFolder(args.out, overwrite=args.overwrite))
        data = read_data(args)
        loaded = load(args.model, args.task, data.classes, seed=args.seed, storage=args.storage)
        sets = make_sets(args, data, loaded)
        trained = choose_trainable(loaded.model, args.train)
        print(
            f"data     {len(sets.train)} to train on, {len(sets.held_out)} held out; {data.split}"
        )
        for note in loaded.notes:
            print(f"model    {note}")
        print(f"trained  {trained}")
        if out is None:
            print("result   not kept: no --out")
        step = compile_step(args, loaded.model)
        device = step.options.device
        stack.callback(step.close)
        before = sets.scores(step.evaluate, device)
        show("before", before)
        started = time.perf_counter()
        done, history = train(args, step, sets, device)
        seconds = time.perf_counter() - started
        if done == 0:
            print("interrupted before the first step; nothing was written", file=sys.stderr)
            return 130
        after = sets.scores(step.evaluate, device)
        show("after", after)
        for name, score_before in before.items():
            print(f"change   {name.replace('_', '-'):<9} {change(score_before, after[name])}")
        print(f"time     {seconds:.1f} s for {done} steps, with compilation")
        if step.streamed:
            print(f"memory   {describe_plan(step.plan)}")
        good = True
        if out is not None:
            record = describe(args, data, before, after, history)
            record |= {"steps_done": done, "seconds": round(seconds, 2), "trained": trained}
            record |= {"peak_bytes": peak_bytes(device), "max_length": sets.limit}
            good = save(args, out, step, loaded, sets, record)
        if args.draw:
            draw(step, args.draw)
        if done < args.steps:
            kept = f"the weights so far are in {args.out}" if out else "nothing was kept: no --out"
            print(f"interrupted after {done} of {args.steps} steps; {kept}", file=sys.stderr)
            return 130
        return 0 if good else 1


def read_data(args: argparse.Namespace) -> Dataset:
    """Read the examples; a model that has classes already decides what labels mean."""
    locate(args.model)
    train, held_out, how = load_tables(args.data, args.eval_data)
    if args.task != CLASSIFICATION:
        return unlabelled(train, held_out, how, args.text_column)
    classes = own_classes(args.model)
    return labelled(train, held_out, how, args.text_column, args.label_column, classes=classes)


def make_sets(args: argparse.Namespace, data: Dataset, loaded: Loaded) -> Sets:
    """Tokenise; the training sample to score is the training rows nearest the front."""
    limit = length_limit(args.max_length, loaded.model, loaded.tokenizer)
    labels = args.task == CLASSIFICATION
    train = encode(data.train, loaded.tokenizer, limit, labels=labels)
    held_out = encode(data.held_out, loaded.tokenizer, limit, labels=labels)
    sample = spread(train, args.eval_size)
    held_out = spread(held_out, args.eval_size)
    pad = int(loaded.tokenizer.pad_token_id)
    return Sets(train, sample, held_out, pad, limit, args.batch_size)


def spread(rows: list[Encoded], most: int) -> list[Encoded]:
    """Return at most `most` rows (0: all), evenly spaced."""
    if not most or len(rows) <= most:
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


def compile_step(args: argparse.Namespace, model: Any) -> zograph.ZOStep:
    """Compile the model with the settings of the command line."""
    dtype = None if args.compute_dtype == "float32" else getattr(torch, args.compute_dtype)
    return zograph.compile(
        model,
        lr=args.lr,
        eps=args.eps,
        weight_decay=args.weight_decay,
        seed=args.seed,
        device=args.device,
        compute_dtype=dtype,
        directions=args.directions,
        distribution=args.distribution,
        backend=args.backend,
        memory=args.memory,
        storage=args.storage,
        transfer_dtype=args.transfer_dtype,
        rounding=args.rounding,
        fold_every=args.fold_every,
    )


def describe_plan(plan: zograph.Plan) -> str:
    """Say what a streamed step takes and moves."""
    moved = ", ".join(f"{n / 1e6:.1f} MB {stream}" for stream, n in plan.bytes_moved.items())
    return (
        f"{plan.device_bytes / 1e6:.1f} MB a step by plan, {plan.resident} of {plan.parameters} "
        f"tensors stay; {moved or 'nothing'} a step"
    )


def train(
    args: argparse.Namespace, step: zograph.ZOStep, sets: Sets, device: torch.device
) -> tuple[int, list[tuple[int, float]]]:
    """Take the steps until done or interrupted; return their number and smoothed losses."""
    batches = shuffled(sets.train, sets.pad, sets.limit, sets.size, args.seed)
    done = 0
    with Interrupt() as interrupt, Progress(args.steps, args.log_every, device) as progress:
        for batch in islice(batches, args.steps):
            if interrupt.asked:
                break
            if args.schedule == "linear":
                step.lr = args.lr * (1 - done / args.steps)
            here: dict[str, Any] = {name: t.to(device) for name, t in batch.items()}
            loss = step(**here)
            done += 1
            progress.step(done, loss, step.lr)
    return done, progress.history


def show(when: str, scores: dict[str, Score]) -> None:
    """Print the scores of one moment."""
    for name, value in scores.items():
        print(f"{when:<8} {name.replace('_', '-'):<9} {value}", flush=True)


def describe(
    args: argparse.Namespace,
    data: Dataset,
    before: dict[str, Score],
    after: dict[str, Score],
    history: list[tuple[int, float]],
) -> dict[str, Any]:
    """Return what `zograph.json` says of a run."""
    left_out = ("run", "command", "out", "overwrite", "draw")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    return {
        "zograph": zograph.__version__,
        "settings": settings,
        "classes": data.classes,
        "split": data.split,
        "before": {name: value.as_dict() for name, value in before.items()},
        "after": {name: value.as_dict() for name, value in after.items()},
        "loss": history,
    }


def save(
    args: argparse.Namespace,
    out: OutputFolder,
    step: zograph.ZOStep,
    loaded: Loaded,
    sets: Sets,
    record: dict[str, Any],
) -> bool:
    """Write the result, read it back, score it, and put the folder in its place.

    Returns
    -------
    bool
        Whether the model read back scores as the step did.
    """
    try:
        step.save_pretrained(out.staging)
        loaded.tokenizer.save_pretrained(out.staging)
        storage = "host" if args.storage == "host" else "disk"
        again = load(str(out.staging), args.task, record["classes"], storage=storage).model
        device = step.options.device
        held_out = in_order(sets.held_out, sets.pad, sets.limit, sets.size)
        if storage == "host":
            reloaded = score(again.to(device), held_out, device)
        else:
            choose_trainable(again, args.train)  # what is frozen is not fetched whole
            with zograph.compile(again, memory=args.memory, device=device) as check:
                reloaded = score(check.evaluate, held_out, device)
        record["reloaded"] = {"held_out": reloaded.as_dict()}
        text = json.dumps(record, indent=1) + "\n"
        (out.staging / "zograph.json").write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--out {args.out}: cannot be written: {reason}") from error
    out.commit()
    last = record["after"]["held_out"]
    expected = Score(last["loss"], last["accuracy"], last["count"])
    good = reloaded.agrees(expected, SAME[args.compute_dtype])
    print(f"saved    {args.out}")
    print(f"reloaded held-out  {reloaded}", "" if good else "\n         NOT the score above")
    return good


def draw(step: zograph.ZOStep, path: Path) -> None:
    """Draw the step's graph; a failure is told, the result stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"drawn    {step.draw(path)}")
    except OSError as error:
        print(f"drawn    not: {error}", file=sys.stderr)
