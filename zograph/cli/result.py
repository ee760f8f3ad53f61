"""The result of `zograph finetune`: the model, what is said of it, and its picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import zograph
from zograph.cli.batches import in_order
from zograph.cli.data import Dataset
from zograph.cli.inputs import InputError
from zograph.cli.models import Loaded, choose_trainable, load
from zograph.cli.scores import Score, score
from zograph.cli.sets import Sets
from zograph.output import OutputFolder

SAME = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""How far the loss of the reloaded float32 model may be from the step's, by compute dtype."""


def describe(
    args: argparse.Namespace,
    data: Dataset,
    before: dict[str, Score],
    after: dict[str, Score],
    history: list[tuple[int, float]],
) -> dict[str, Any]:
    """Return what `zograph.json` says of a run."""
    left_out = ("run", "command", "out", "overwrite", "draw", "resume")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    return {
        "zograph": zograph.__version__,
        "settings": settings,
        "classes": data.classes,
        "split": data.split,
        "before": {name: value.as_dict() for name, value in before.items()},
        "after": {name: value.as_dict() for name, value in after.items()},
        "loss": history,
    }


def save(
    args: argparse.Namespace,
    out: OutputFolder,
    step: zograph.ZOStep,
    loaded: Loaded,
    sets: Sets,
    record: dict[str, Any],
) -> bool:
    """Write the result, read it back, score it, and put the folder in its place.

    Without scores in ``record["after"]`` it is only written.

    Returns
    -------
    bool
        Whether the model read back scores as the step did.
    """
    try:
        step.save_pretrained(out.staging)
        loaded.tokenizer.save_pretrained(out.staging)
        if record["after"]:
            reloaded = score_again(args, out, step, sets, record["classes"])
            record["reloaded"] = {"held_out": reloaded.as_dict()}
        text = json.dumps(record, indent=1, default=str) + "\n"
        (out.staging / "zograph.json").write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--out {args.out}: cannot be written: {reason}") from error
    out.commit()
    print(f"saved    {args.out}")
    if not record["after"]:
        return True
    expected = Score.from_dict(record["after"]["held_out"])
    good = reloaded.agrees(expected, SAME[args.compute_dtype])
    print(f"reloaded held-out  {reloaded}", "" if good else "\n         NOT the score above")
    return good


def score_again(
    args: argparse.Namespace,
    out: OutputFolder,
    step: zograph.ZOStep,
    sets: Sets,
    classes: list[str],
) -> Score:
    """Read back the model that was written, and score it on the held-out examples."""
    storage = "host" if args.storage == "host" else "disk"
    again = load(str(out.staging), args.task, classes, storage=storage).model
    device = step.options.device
    held_out = in_order(sets.held_out, sets.pad, sets.limit, sets.size)
    if storage == "host":
        return score(again.to(device), held_out, device)
    choose_trainable(again, args.train)  # what is frozen is not fetched whole
    with zograph.compile(again, memory=args.memory, device=device) as check:
        return score(check.evaluate, held_out, device)


def draw(step: zograph.ZOStep, path: Path) -> None:
    """Draw the step's graph; a failure is told, the result stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"drawn    {step.draw(path)}")
    except OSError as error:
        print(f"drawn    not: {error}", file=sys.stderr)
