"""`zograph replay`: a run's weights after any of its steps, from its base and its seed log."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from zograph.cli.inputs import integer

EPILOG = """\
Of a run of zograph finetune, --task, --train and the seed of a new head are found in the file
beside its log; name the --classes of a new head in their order. Other runs are replayed with the
class that config.json names, or one of transformers' auto classes, whichever fits the log.
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "replay",
        help="rebuild the weights of a run from its base and its seed log",
        description="Write the model that a run had reached after some of its steps, bit for bit, "
        "from the model that it started from and its seed log. No forward pass is run.",
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("base", metavar="BASE", help="a folder, a hub id or builtin:minilm")
    parser.add_argument("log", type=Path, metavar="LOG", help="of the run; it is not changed")
    parser.add_argument(
        "--until", type=integer(0), metavar="N", help="steps to apply, 0: none (default: all)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the model")
    parser.add_argument("--overwrite", action="store_true", help="replace what DIR holds")
    parser.add_argument(
        "--train", metavar="REGEX", help="which parameters the run trained (default: as found)"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="of a new classifier")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from zograph.cli.models import choose_trainable, load, locate, own_classes
    from zograph.cli.resuming import beside, read_beginning
    from zograph.replaying import check_until, load_base, rebuild, torn
    from zograph.seedlog import read_log

    logged = read_log(args.log, warn=False)
    if logged.torn:
        print(f"warning  {torn(logged)}")
    steps = check_until(logged, args.until)
    begun = read_beginning(logged) if beside(logged.path).exists() else None
    if begun is None:
        model, tokenizer, train = load_base(locate(args.base), logged.header), None, args.train
    else:
        classes = args.classes or own_classes(args.base) or ["0", "1"]
        task, seed = begun.settings["task"], begun.settings["seed"]
        loaded = load(args.base, task, classes, seed=seed, storage="disk")
        model, tokenizer = loaded.model, loaded.tokenizer
        train = begun.settings["train"] if args.train is None else args.train
    choose_trainable(model, train)
    started = time.perf_counter()
    rebuild(model, logged, steps, args.out, overwrite=args.overwrite, tokenizer=tokenizer)
    print(f"replayed {steps} of {len(logged)} steps in {time.perf_counter() - started:.1f} s")
    print(f"saved    {args.out}")
    return 0
