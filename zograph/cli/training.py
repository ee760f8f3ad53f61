"""The run of `zograph finetune`: data, model, score, steps, score, result."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch

import zograph
from zograph.cli.batches import shuffled
from zograph.cli.data import Dataset, labelled, load_tables, unlabelled
from zograph.cli.models import CLASSIFICATION, choose_trainable, load, locate, own_classes
from zograph.cli.output import check_picture
from zograph.cli.progress import Interrupt, Progress, peak_bytes
from zograph.cli.result import describe, draw, save
from zograph.cli.resuming import (
    Beginning,
    data_of,
    find_log,
    is_result_of,
    read_beginning,
    settings_of,
)
from zograph.cli.scores import Score, change
from zograph.cli.sets import Sets, make_sets
from zograph.output import OutputFolder
from zograph.seedlog import LogFile, read_log
from zograph.seedlog.columns import mean_losses
from zograph.trajectory.control import State


def finetune(args: argparse.Namespace) -> int:
    """Run `zograph finetune` with parsed arguments.

    Returns
    -------
    int
        0, also where SIGTERM ended a run with a log; 1 if the saved model does not score as it
        did; 130 after Ctrl-C.

    Raises
    ------
    zograph.errors.ZographError
        If an input is at fault or a step fails; nothing was written then but the log.
    KeyboardInterrupt
        If it is interrupted before or behind its steps, or twice.
    """
    try:
        with ExitStack() as stack:
            return run(args, stack)
    except KeyboardInterrupt as error:
        if args.log is None or not args.log.exists():
            raise
        raise KeyboardInterrupt(f"the log is whole{goes_on(args)}") from error


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    """Run what :func:`finetune` is about; `stack` closes what was opened."""
    if args.draw:
        check_picture(args.draw)
    if args.log is not None:
        args.log = args.log.expanduser()
    logged = find_log(args)
    known = read_beginning(logged) if logged else None
    if known:
        known.check_settings(args)
    out = None
    if args.out:
        replace = args.overwrite or is_result_of(args.out, logged)
        out = stack.enter_context(OutputFolder(args.out, overwrite=replace))
    data = read_data(args)
    loaded = load(args.model, args.task, data.classes, seed=args.seed, storage=args.storage)
    sets = make_sets(args, data, loaded)
    scored = [*sets.sample, *sets.held_out]
    facts = data_of(sets.train, scored, sets.pad, sets.limit, args.seed)
    if known:
        known.check_data(args, facts)
    trained = choose_trainable(loaded.model, args.train)
    print(f"data     {len(sets.train)} to train on, {len(sets.held_out)} held out; {data.split}")
    for note in loaded.notes:
        print(f"model    {note}")
    print(f"trained  {trained}")
    if out is None:
        print(f"result   {'in the log alone' if args.log else 'not kept'}: no --out")
    step = open_step(args, loaded.model, logged)
    device = step.options.device
    stack.callback(step.close)
    first = len(logged) if logged else 0
    if args.log:
        print(f"log      {args.log}: {f'goes on after {first} steps' if first else 'begins'}")
    if known:
        before = {name: Score.from_dict(values) for name, values in known.before.items()}
    else:
        before = sets.scores(step.evaluate, device)
        if args.log:
            scores = {name: value.as_dict() for name, value in before.items()}
            Beginning(settings_of(args), facts, scores).write(args.log)
    show("before", before)
    started = time.perf_counter()
    done, history, asked = train(args, step, sets, mean_losses(logged).tolist() if logged else [])
    seconds = time.perf_counter() - started
    terminated = asked == signal.SIGTERM and done < args.steps
    after: dict[str, Score] = {}
    if done and not terminated:  # whoever sends SIGTERM waits a few seconds only
        after = sets.scores(step.evaluate, device)
        show("after", after)
        for name, score_after in after.items():
            print(f"change   {name.replace('_', '-'):<9} {change(before[name], score_after)}")
    print(f"time     {seconds:.1f} s for {done - first} steps, with compilation")
    if step.mixing is not None:
        print(f"mixing   {describe_mixing(step.mixing)}")
    if step.streamed:
        print(f"memory   {describe_plan(step.plan)}")
    good = True
    if out is not None and done:
        record = describe(args, data, before, after, history)
        record |= {"steps_done": done, "seconds": round(seconds, 2), "trained": trained}
        record |= {"peak_bytes": peak_bytes(device), "max_length": sets.limit}
        if args.log:
            record["log"] = f"{read_log(args.log, warn=False).head:016x}"
        good = save(args, out, step, loaded, sets, record)
    if args.draw and after:
        draw(step, args.draw)
    if done < args.steps:
        return tell_stop(args, done, terminated=terminated)
    return 0 if good else 1


def tell_stop(args: argparse.Namespace, done: int, *, terminated: bool) -> int:
    """Say where a run stopped and what is left of it; return its exit code."""
    how = "stopped" if terminated else "interrupted"
    if not done:
        print(f"{how} before the first step; nothing was written{goes_on(args)}", file=sys.stderr)
    else:
        kept = f"the weights so far are in {args.out}" if args.out else "nothing was kept: no --out"
        if args.log and not args.out:
            kept = "the steps so far are in the log"
        print(f"{how} after {done} of {args.steps} steps; {kept}{goes_on(args)}", file=sys.stderr)
    return 0 if terminated else 130


def goes_on(args: argparse.Namespace) -> str:
    """Say how a run with a log goes on."""
    if args.log is None:
        return ""
    return f"; the same command with --resume goes on from {args.log}"


def read_data(args: argparse.Namespace) -> Dataset:
    """Read the examples; a model that has classes already decides what labels mean."""
    locate(args.model)
    train, held_out, how = load_tables(args.data, args.eval_data)
    if args.task != CLASSIFICATION:
        return unlabelled(train, held_out, how, args.text_column)
    classes = own_classes(args.model)
    return labelled(train, held_out, how, args.text_column, args.label_column, classes=classes)


def open_step(args: argparse.Namespace, model: Any, logged: LogFile | None) -> zograph.ZOStep:
    """Compile the model with the settings of the command line, or go on with a log."""
    dtype = None if args.compute_dtype == "float32" else getattr(torch, args.compute_dtype)
    options: dict[str, Any] = {
        "lr": args.lr,
        "eps": args.eps,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "device": args.device,
        "compute_dtype": dtype,
        "directions": args.directions,
        "distribution": args.distribution,
        "backend": args.backend,
        "memory": args.memory,
        "storage": args.storage,
        "transfer_dtype": args.transfer_dtype,
        "rounding": args.rounding,
        "fsync_every": args.fsync_every,
    }
    for name in ("fold_every", "anderson"):  # where not given, they are the log's
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if logged is None:
        return zograph.compile(model, log=args.log, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = zograph.resume(model, args.log, **options)
    for warning in caught:
        print(f"log      {warning.message}")
    return step


def describe_plan(plan: zograph.Plan) -> str:
    """Say what a streamed step takes and moves."""
    moved = ", ".join(f"{n / 1e6:.1f} MB {stream}" for stream, n in plan.bytes_moved.items())
    return (
        f"{plan.device_bytes / 1e6:.1f} MB a step by plan, {plan.resident} of {plan.parameters} "
        f"tensors stay; {moved or 'nothing'} a step"
    )


def describe_mixing(state: State) -> str:
    """Say how often the gate of a mixed trajectory was open."""
    return (
        f"{state.mixed} of {state.step} steps mixed; {state.cycles} cycles, {state.closed} too "
        f"noisy, {state.rejected} rejected, {state.slow} too slow"
    )


def train(
    args: argparse.Namespace, step: zograph.ZOStep, sets: Sets, earlier: Sequence[float]
) -> tuple[int, list[tuple[int, float]], signal.Signals | None]:
    """Take the steps until done or asked to stop.

    Parameters
    ----------
    earlier
        The losses of the steps that the log holds already.

    Returns
    -------
    tuple
        The steps of the run so far, smoothed losses, and the signal that asked.
    """
    done, device = len(earlier), step.options.device
    batches = shuffled(sets.train, sets.pad, sets.limit, sets.size, args.seed, start=done)
    signals = (signal.SIGINT, signal.SIGTERM) if args.log else (signal.SIGINT,)
    with (
        Interrupt(*signals) as interrupt,
        Progress(args.steps, args.log_every, device, earlier) as progress,
    ):
        for batch in islice(batches, args.steps - done):
            if interrupt.asked:
                break
            step.lr = args.lr * (1 - done / args.steps) if args.schedule == "linear" else args.lr
            here: dict[str, Any] = {name: t.to(device) for name, t in batch.items()}
            loss = step(**here)
            done += 1
            progress.step(done, loss, step.lr)
    return done, progress.history, interrupt.asked


def show(when: str, scores: dict[str, Score]) -> None:
    """Print the scores of one moment."""
    for name, value in scores.items():
        print(f"{when:<8} {name.replace('_', '-'):<9} {value}", flush=True)
