"""The seed log of `zograph finetune`: when a run may go on with it, and with which batches.

A log tells which weights a run started from and what each step did to them, not which texts were
in its batches. So that a run does not go on with others, a file beside the log, named as it with
``.batches.json`` behind, says what they came from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zograph.cli.batches import Encoded
from zograph.cli.inputs import InputError
from zograph.cli.output import check_file
from zograph.seedlog import LogFile, read_log

BATCHES = ".batches.json"

ADVICE = {
    "batch_size": "give the same --batch-size",
    "max_length": "give the same --max-length",
    "examples": "give the same data, columns, model and tokenizer",
}
"""What the batches come from, and what to do where that differs."""


def rate(args: argparse.Namespace, done: int) -> float:
    """Return the learning rate of the step behind `done` steps."""
    if args.schedule == "linear":
        return float(args.lr * (1 - done / args.steps))
    return float(args.lr)


def find_log(args: argparse.Namespace) -> LogFile | None:
    """Return the log to go on with; None if the run starts at the model's values.

    Raises
    ------
    InputError
        If the log is there and not to be gone on with, or its steps are not those asked for.
    LogError
        If it is damaged.
    StoreError
        If it cannot be read.
    """
    if args.log is None:
        if args.resume:
            raise InputError("--resume needs --log FILE, the log to go on with")
        return None
    check_file(args.log, "--log")
    if not args.log.exists():
        return None
    if not args.resume:
        raise InputError(
            f"--log {args.log}: there is such a file already. Go on with it (--resume), name "
            f"another, or delete it"
        )
    log = read_log(args.log, warn=False)
    if len(log) > args.steps:
        raise InputError(
            f"{args.log} has {len(log)} steps already: give as many or more with --steps"
        )
    for step, lr in enumerate(log.table["lr"].tolist()):
        if lr != rate(args, step):
            raise InputError(
                f"{args.log}: step {step} was made with a learning rate of {lr:.6g}, and this "
                f"command line has {rate(args, step):.6g}: give the same --lr and --schedule"
                + (", and --steps" if args.schedule == "linear" else "")
            )
    return log


def check_batches(
    args: argparse.Namespace, rows: Sequence[Encoded], limit: int, log: LogFile | None
) -> str | None:
    """See that a run goes on with the batches of its log; of a new run, note what they are.

    Parameters
    ----------
    rows, limit
        The examples to train on, and the most tokens of one.
    log
        The log to go on with, None for a new run.

    Returns
    -------
    str or None
        What could not be seen.

    Raises
    ------
    InputError
        If they differ, or cannot be noted.
    """
    now = {"batch_size": args.batch_size, "max_length": limit, "examples": digest(rows)}
    path = args.log.with_name(args.log.name + BATCHES)
    try:
        if log is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
            return None
        then: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"whether the batches are the same is not known: {path} is missing"
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    for name, advice in ADVICE.items():
        if then.get(name) != now[name]:
            raise InputError(
                f"{args.log} was written with {name}={then.get(name)!r}, and the run would go on "
                f"with {now[name]!r}: {advice}"
            )
    return None


def digest(rows: Sequence[Encoded]) -> str:
    """Return a hash of the token ids and classes of examples, in order."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        label = -1 if row.label is None else row.label
        found.update(np.array([len(row.ids), label, *row.ids], dtype="<i8").tobytes())
    return found.hexdigest()


def losses(log: LogFile) -> list[float]:
    """Return the loss of every step: the mean over directions and branches."""
    found: list[float] = log.table["each"]["losses"].astype(float).mean(axis=(1, 2)).tolist()
    return found


def what_stays(path: Path | None) -> str:
    """Say what a run that is interrupted at once leaves behind."""
    if path is None or not path.exists():
        return "nothing was written"
    return f"the steps so far are in {path}: go on with --resume"
