"""The command line: one module per subcommand.

A module of a subcommand has ``add_parser(subparsers)``, which sets ``run`` as the default of
its parser, a function from the parsed arguments to the exit code. Such a module imports
transformers inside functions only, so that ``--help`` does not wait for it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from zograph.cli import bench, doctor, draw, finetune, log, plan, replay
from zograph.errors import ZographError

#: The subcommands, in the order in which ``--help`` lists them; a new one is added here.
COMMANDS = (finetune, log, replay, draw, plan, bench, doctor)

USER_ERROR = 2
"""Exit code when an input is at fault; nothing was written."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``zograph`` with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="zograph", description="Zeroth-order fine-tuning of PyTorch models on their graphs."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        The arguments, ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        0; 1 if a result could not be confirmed; 2 after one message if an input is at fault;
        130 if interrupted.
    """
    args = build_parser().parse_args(argv)
    # A request to end is as Ctrl-C: unfinished files are cleared away.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(args.run(args))
    except ZographError as error:
        print(f"zograph {args.command}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as error:
        left = error.args[0] if error.args else "nothing was written"
        print(f"zograph {args.command}: interrupted; {left}", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
