"""`zograph replay`: a run's weights after any of its steps, from its base and its seed log."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from zograph.cli.inputs import integer


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "replay",
        help="rebuild the weights of a run from its base and its seed log",
        description="Write the model that a run had reached after some of its steps, bit for bit, "
        "from the model that it started from and its seed log. No forward pass is run.",
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
        "--train", metavar="REGEX", help="as the run had it: names of trained parameters"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    import zograph
    from zograph.cli.models import choose_trainable, locate
    from zograph.replaying import check_until, load_base
    from zograph.seedlog import read_log

    logged = read_log(args.log, warn=False)
    steps = check_until(logged, args.until)
    model = load_base(locate(args.base), logged.header)
    choose_trainable(model, args.train)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        zograph.replay(model, args.log, out=args.out, until=args.until, overwrite=args.overwrite)
    for warning in caught:
        print(f"warning  {warning.message}")
    print(f"replayed {steps} of {len(logged)} steps in {time.perf_counter() - started:.1f} s")
    print(f"saved    {args.out}")
    return 0
