"""`zograph bench replay`: a replay against eager noise and against one kernel pass a step."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zograph.cli.inputs import integer
from zograph.cli.output import check_file

REPLAY, PASSES, EAGER = "zograph.replay", "one-term kernel passes", "zograph.noise and add"


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "replay",
        help="a replay against eager noise and against one kernel pass a step",
        description="Train MiniLM's shape (22.7 million random float32 weights) with a log, then "
        "rebuild its last weights in three ways, alternating in one run: zograph.replay from "
        "folder to folder; in memory, one pass of the kernel per weight and step; in memory, "
        "zograph.noise and an addition per weight and step.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--steps", type=integer(1), default=1000, metavar="N", help="of the run")
    add("--layers", type=integer(1), default=6, metavar="N", help="of the model")
    add("--threads", type=integer(1), default=2, metavar="N")
    add("--repeats", type=integer(1), default=3, metavar="N", help="of each")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print(f"{result['weights']:,} float32 weights, {args.steps} steps, {args.threads} threads")
    print(f"{'':24}{'median s':>10}{'of replay':>11}{'bits':>8}")
    for name, row in result["contestants"].items():
        bits = "equal" if row["equal"] else "OTHER"
        print(f"{name:24}{row['median']:10.3f}{row['ratio']:11.2f}{bits:>8}")
    print(f"replay: {result['noise_per_second'] / 1e6:.0f} million noise values a second")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["equal"] for row in result["contestants"].values()) else 1


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, then time the contestants; compare their weights with the run's."""
    import torch
    from safetensors.torch import load_file

    import zograph
    from zograph.seedlog import read_log

    torch.set_num_threads(args.threads)
    base, log, out = folder / "base", folder / "run.zolog", folder / "out"
    model = build(args.layers)
    model.save_pretrained(base)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = train(model, log, args.steps)
    logged = read_log(log)
    ways: dict[str, Callable[[], Any]] = {
        REPLAY: lambda: zograph.replay(base, log, out=out, overwrite=True),
        PASSES: lambda: one_by_one(first, logged, one_pass),
        EAGER: lambda: one_by_one(first, logged, noise_and_add),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    equal = dict.fromkeys(ways, True)
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            found = way()
            seconds[name].append(time.perf_counter() - start)
            found = load_file(out / "model.safetensors") if name == REPLAY else found
            equal[name] &= all(torch.equal(t, expected[n]) for n, t in found.items())
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    weights = sum(t.numel() for t in first.values())
    return {
        "weights": weights,
        "steps": args.steps,
        "threads": args.threads,
        "torch": torch.__version__,
        "noise_per_second": weights * args.steps / median[REPLAY],
        "contestants": {
            name: {
                "median": median[name],
                "ratio": median[name] / median[REPLAY],
                "seconds": seconds[name],
                "equal": equal[name],
            }
            for name in ways
        },
    }


def build(layers: int) -> Any:
    """Build a classifier of MiniLM's shape with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536
    )
    model: Any = transformers.BertForSequenceClassification(config)
    return model.eval()


def train(model: Any, log: Path, steps: int) -> dict[str, Any]:
    """Take steps on a small random batch; return the weights behind them."""
    import torch

    import zograph

    ids = torch.randint(0, model.config.vocab_size, (2, 8))
    labels = torch.tensor([0, 1])
    with zograph.compile(
        model, lr=1e-5, log=log, fsync_every=0, device="cpu", backend="eager"
    ) as step:
        for _ in range(steps):
            step(input_ids=ids, labels=labels)
        return {name: t.clone() for name, t in step.state_dict().items()}


def one_by_one(
    first: dict[str, Any], logged: Any, apply: Callable[[str, Any, int, float], None]
) -> dict[str, Any]:
    """Apply one update after the other, as the run did, to copies of the first weights."""
    weights = {name: t.clone() for name, t in first.items()}
    terms, _ = logged.terms()
    for seed, coef in zip(terms.seeds.tolist(), terms.coefs.tolist(), strict=True):
        for name, weight in weights.items():
            apply(name, weight, seed, coef)
    return weights


def one_pass(name: str, weight: Any, seed: int, coef: float) -> None:
    """Apply one update by the kernel, in one pass."""
    import torch

    from zograph.noise import parameter_key
    from zograph.ops import fold_

    one = torch.tensor([coef])
    fold_(weight, torch.tensor([seed]), one, one, parameter_key(name), decay=False)


def noise_and_add(name: str, weight: Any, seed: int, coef: float) -> None:
    """Apply one update by torch's own operations on the noise."""
    import zograph

    weight.add_(coef * zograph.noise(name, weight.shape, seed))
