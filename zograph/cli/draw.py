"""`zograph draw`: a picture of the step that is compiled for a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zograph.cli.finetune import TASKS
from zograph.cli.inputs import integer


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "draw",
        help="draw the graph of a model's step",
        description="Compile the step of a model without running it and draw its graph.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or builtin:minilm")
    parser.add_argument("picture", type=Path, metavar="FILE", help="svg, png, pdf or dot")
    parser.add_argument("--task", choices=TASKS, default=TASKS[1])
    parser.add_argument("--classes", type=integer(2), default=2, metavar="N")
    parser.add_argument("--batch-size", type=integer(1), default=4, metavar="N")
    parser.add_argument("--length", type=integer(2), default=16, metavar="N", help="tokens a row")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    import zograph
    from zograph.cli.batches import Encoded, collate, length_limit
    from zograph.cli.models import load, own_classes
    from zograph.cli.output import check_picture

    check_picture(args.picture)
    classify = args.task == TASKS[0]
    classes = (own_classes(args.model) if classify else None) or range(args.classes)
    loaded = load(args.model, args.task, [str(c) for c in classes])
    limit = length_limit(args.length, loaded.model, loaded.tokenizer)
    rows = [Encoded([0] * limit, 0 if classify else None)] * args.batch_size
    step = zograph.compile(loaded.model, device="cpu", backend="eager")
    step.prepare(**collate(rows, 0, limit, args.batch_size))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    print(step.draw(args.picture))
    return 0
