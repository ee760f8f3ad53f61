"""`zograph log`: what a seed log holds, whether it is whole, and its numbers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zograph.cli.inputs import InputError, integer

if TYPE_CHECKING:
    from zograph.seedlog import LogFile

TORN = 1
"""Exit code of ``--check`` where a resume would cut the tail; damage is an error, as code 2."""

EPILOG = """\
--check exits with 0 if the log is whole, 1 if its tail is torn (a resume cuts it and runs those
steps again), 2 if it is damaged (the message has the byte) or no log. The log is only read, and
may be that of a run under way.
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "log",
        help="show, check and export the seed log of a run",
        description="Print what a seed log says of its run, and its newest steps.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="FILE", help="what --log wrote")
    parser.add_argument(
        "--steps",
        type=integer(0),
        default=5,
        metavar="N",
        help="print the newest N steps (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="only say whether the log is whole")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write a row for every step and direction; -: print them instead of the summary",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw loss and projected gradient, as svg, png or pdf; needs matplotlib",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from zograph.cli import log_export
    from zograph.seedlog import read_log

    path, printed = args.file.expanduser(), args.csv == Path("-")
    for option, target in (("--csv", args.csv), ("--plot", args.plot)):
        if target is not None and target.exists() and path.exists() and target.samefile(path):
            raise InputError(f"{option} {target} is the log itself; name another file")
    log = read_log(path, warn=False)
    if args.plot:
        log_export.plot(log, args.plot)
    try:
        if args.csv:
            log_export.write_csv(log, None if printed else args.csv)
        if not printed:
            print("\n".join([verdict(log)] if args.check else summary(log, args.steps)))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return TORN if args.check and log.torn else 0


def verdict(log: LogFile) -> str:
    """Say whether a log that could be read is whole."""
    if log.torn:
        return f"{log.path}: torn; {tail(log)}"
    return f"{log.path}: whole; {len(log)} steps, {log.end} bytes"


def tail(log: LogFile) -> str:
    """Say what a resume would cut."""
    return (
        f"the last {log.torn} bytes, from byte {log.end} on, are no whole record: a resume cuts "
        f"them and goes on after {len(log)} steps"
    )


def summary(log: LogFile, newest: int) -> Iterator[str]:
    """Yield the lines of what a log says of its run, and its newest steps."""
    from zograph.seedlog import columns
    from zograph.starting import recorded_choices

    header, engine = log.header, log.header.engine
    yield (
        f"log      {log.path}: {len(log)} steps of {log.table.itemsize} bytes, a header of "
        f"{log.start}, {log.end + log.torn} bytes in all"
    )
    if log.torn:
        yield f"torn     {tail(log)}"
    yield (
        f"run      zograph {header.zograph}, torch {engine['torch']}, {engine['device']}, backend "
        f"{engine['backend']}, {engine['threads']} threads"
    )
    decided = {n: f"auto, so {v}" for n, v in header.decided.items() if n in header.options}
    shown = header.options | decided
    yield f"options  {', '.join(f'{name} {value}' for name, value in sorted(shown.items()))}"
    for name, choice in recorded_choices(log).items():
        yield f"solver   {name}: auto, so {choice}"
    yield f"model    {header.model}, trained {header.trained}, base {header.base}"
    if not len(log):
        yield f"steps    none yet; lr {header.lr:g}"
        return
    rates, losses = log.table["lr"], columns.mean_losses(log)
    yield (
        f"steps    loss {losses[0]:.4f} at first, {losses[-1]:.4f} last; lr {rates[0]:g} at first, "
        f"{rates[-1]:g} last; {int(columns.skipped(log).sum())} skipped"
    )
    if newest:
        yield ""
        yield from table(log, newest)


def table(log: LogFile, newest: int) -> Iterator[str]:
    """Yield the newest steps as a table; with several directions, their means."""
    from zograph.seedlog import columns

    yield (
        f"{'step':>8} {'lr':>10} {'loss+':>12} {'loss-':>12} {'projected grad':>15} "
        f"{'first seed':>20}"
    )
    branches, grads = columns.branch_losses(log), columns.projected_grads(log)
    skipped = columns.skipped(log)
    for i in range(max(len(log) - newest, 0), len(log)):
        row, (plus, minus) = log.table[i], branches[i]
        yield (
            f"{row['step']:>8} {row['lr']:>10.3g} {plus:>12.6f} {minus:>12.6f} "
            f"{grads[i]:>15.4f} {row['each']['seed'][0]:>20}{'  skipped' if skipped[i] else ''}"
        )
