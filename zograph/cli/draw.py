"""`zograph draw`: pictures of the step that is compiled for a model, and of its timeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zograph.cli.finetune import TASKS
from zograph.cli.inputs import FORMATS, InputError, integer


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "draw",
        help="draw the graph of a model's step",
        description="Compile the step of a model without running it and draw its graph; under a "
        "memory budget also when transfers and stages run.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or builtin:minilm")
    parser.add_argument("picture", type=Path, metavar="FILE", help="svg, png, pdf or dot")
    parser.add_argument("--task", choices=TASKS, default=TASKS[1])
    parser.add_argument("--classes", type=integer(2), default=2, metavar="N")
    parser.add_argument("--batch-size", type=integer(1), default=4, metavar="N")
    parser.add_argument("--length", type=integer(2), default=16, metavar="N", help="tokens a row")
    parser.add_argument(
        "--memory", metavar="M", help="stream weights: 1GB, 512MiB, 0.5 (of the RAM) or minimum"
    )
    parser.add_argument(
        "--storage", default="host", metavar="S", help="host, disk or a folder: where weights live"
    )
    parser.add_argument(
        "--transfer-dtype", choices=FORMATS, help="format in which weights are stored and moved"
    )
    parser.add_argument(
        "--timeline", type=Path, metavar="SVG", help="draw the timeline of the streams; --memory"
    )
    parser.add_argument(
        "--measured", action="store_true", help="run two steps and add the second to the timeline"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    import zograph
    from zograph.cli.batches import Encoded, collate, length_limit
    from zograph.cli.models import load, own_classes
    from zograph.cli.output import check_file, check_picture
    from zograph.cli.plan import budget

    check_picture(args.picture)
    if args.timeline:
        if args.memory is None:
            raise InputError("--timeline needs --memory: without it nothing is transferred")
        if args.timeline.suffix != ".svg":
            raise InputError(f"--timeline {args.timeline}: the ending must be .svg")
        check_file(args.timeline, "--timeline")
    elif args.measured:
        raise InputError("--measured needs --timeline")
    memory = None if args.memory is None else budget(args.memory)
    classify = args.task == TASKS[0]
    classes = (own_classes(args.model) if classify else None) or range(args.classes)
    loaded = load(args.model, args.task, [str(c) for c in classes])
    limit = length_limit(args.length, loaded.model, loaded.tokenizer)
    rows = [Encoded([0] * limit, 0 if classify else None)] * args.batch_size
    step = zograph.compile(
        loaded.model,
        device="cpu",
        backend="eager",
        memory=memory,
        storage=args.storage,
        transfer_dtype=args.transfer_dtype,
    )
    batch = collate(rows, 0, limit, args.batch_size)
    step.prepare(**batch)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    print(step.draw(args.picture))
    if args.timeline:
        measured = run_twice(step, batch) if args.measured else None
        args.timeline.parent.mkdir(parents=True, exist_ok=True)
        print(step.schedule.draw(args.timeline, measured))
    return 0


def run_twice(step: Any, batch: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return when the tasks of a second step ran; the first has no update to fold.

    Tasks that are issued ahead ran with the first.
    """
    spans: list[dict[str, tuple[float, float]]] = []
    for _ in range(2):
        step(**batch)
        runner = step._last_compiled().runner
        runner.drain()
        spans.append(runner.measured)
    ahead = step.schedule.ahead
    step.synchronize()
    return spans[1] | {name: spans[0][name] for name in ahead}
