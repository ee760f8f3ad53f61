"""`zograph finetune --log --resume`: whether the command is that of the run in the log.

The log itself holds the seeds and losses of a run, and refuses another model, other values to
start from and other options of the step. A file beside it, ``run.zolog.batches.json``, holds what
the batches and the learning rate follow from, and how the model scored before the first step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from zograph.cli.batches import Encoded
from zograph.cli.inputs import InputError
from zograph.cli.output import check_file
from zograph.seedlog import LogFile, read_log
from zograph.seedlog.placing import place

SETTINGS = (
    "task",
    "train",
    "batch_size",
    "lr",
    "schedule",
    "eps",
    "weight_decay",
    "directions",
    "distribution",
    "seed",
    "compute_dtype",
    "backend",
)
"""Arguments that change the weights of a run."""

AGAIN = "Give the same as then, or begin another run with another --log."


@dataclass(frozen=True)
class Beginning:
    """What a run began with, beside the model.

    Attributes
    ----------
    settings
        The arguments in `SETTINGS`, and ``steps``.
    data
        From :func:`data_of`.
    before
        The scores before the first step.
    """

    settings: dict[str, Any]
    data: dict[str, str | int]
    before: dict[str, dict[str, Any]]

    def check_settings(self, args: argparse.Namespace) -> None:
        """Refuse other arguments.

        Raises
        ------
        InputError
            If one changes the weights.
        """
        names = SETTINGS if args.schedule == "constant" else (*SETTINGS, "steps")
        for name in names:
            then, now = self.settings.get(name), getattr(args, name)
            if then != now:
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"{option} {_shown(now)}: the run of {args.log} began with {option} "
                    f"{_shown(then)}. {AGAIN}"
                )

    def check_data(self, args: argparse.Namespace, data: dict[str, str | int]) -> None:
        """Refuse other batches, or scores of other examples.

        Raises
        ------
        InputError
            If data, tokenizer or numpy differ.
        """
        reasons = {
            "train": f"--data {args.data}: the texts, labels, tokens or their order are not those",
            "max_length": f"--max-length {data['max_length']}: texts were cut to another length",
            "pad": "the tokenizer's padding token is not the one",
            "order": f"numpy {np.__version__} draws another order of batches than the one",
            "scored": "--eval-data or --eval-size: the examples to score on are not those",
        }
        for name, reason in reasons.items():
            if self.data.get(name) != data[name]:
                raise InputError(f"{reason} that the run of {args.log} began with. {AGAIN}")

    def write(self, log: Path) -> None:
        """Write the file beside a log that has no step yet, whole or not at all.

        Raises
        ------
        StoreError
            If it cannot be written.
        """
        path = beside(log)
        path.unlink(missing_ok=True)
        place(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def beside(log: Path) -> Path:
    """Return the path of the file beside a log."""
    return log.with_name(log.name + ".batches.json")


def find_log(args: argparse.Namespace) -> LogFile | None:
    """Read the log that the run goes on with; None: it starts anew, with or without a log.

    Raises
    ------
    InputError
        If there is a log and no ``--resume``, or it holds more steps than are asked for.
    LogError
        If it is damaged or no log.
    """
    if args.log is None:
        if args.resume:
            raise InputError("--resume needs --log FILE, the log to go on with")
        return None
    if not args.log.exists():
        check_file(args.log, "--log")
        return None
    if not args.resume:
        raise InputError(
            f"--log {args.log} is there already and is not overwritten. Add --resume to go on "
            f"with its run, name another file, or delete it."
        )
    found = read_log(args.log, warn=False)
    if len(found) > args.steps:
        raise InputError(f"--steps {args.steps}: {args.log} holds {len(found)} steps already")
    return found


def read_beginning(log: LogFile) -> Beginning | None:
    """Read the file beside a log; None for a log without steps, which any batches may follow.

    Raises
    ------
    InputError
        If the file is missing or damaged.
    """
    if not len(log):
        return None
    path = beside(log.path)
    advice = f"Restore it from a copy; or go on in Python (zograph.resume); or move {log.path} away"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Beginning(found["settings"], found["data"], found["before"])
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing, so that nothing says which batches come next. {advice}."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or cannot be read. {advice}.") from error


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that a resumed run is compared in."""
    return {name: getattr(args, name) for name in (*SETTINGS, "steps")}


def data_of(
    train: Sequence[Encoded], scored: Sequence[Encoded], pad: int, limit: int, seed: int
) -> dict[str, str | int]:
    """Return what the batches follow from, with hashes in place of examples."""
    order = np.random.default_rng(seed).permutation(len(train))
    return {
        "train": _digest(train),
        "max_length": limit,
        "pad": pad,
        "order": xxhash.xxh3_128_hexdigest(order.astype("<i8").tobytes()),
        "scored": _digest(scored),
    }


def is_result_of(folder: Path | None, log: LogFile | None) -> bool:
    """Whether a folder holds the result of an earlier stop of the run of this log."""
    if folder is None or log is None:
        return False
    try:
        found = json.loads((folder / "zograph.json").read_text(encoding="utf-8"))
        return bool(found["log"] == f"{log.head:016x}")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(examples: Sequence[Encoded]) -> str:
    found = xxhash.xxh3_128()
    for each in examples:
        label = -1 if each.label is None else each.label
        found.update(np.array([len(each.ids), label, *each.ids], dtype="<i8").tobytes())
    return str(found.hexdigest())


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)
