"""`zograph bench noise`: how fast perturbed weights are made and updates applied on the CPU."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zograph.cli.inputs import integer
from zograph.cli.output import check_file


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "noise",
        help="elements a second of noise, perturbed weights and updates",
        description="Time the noise, the perturbed copies of a weight and its updates on the CPU, "
        "on random float32 and bfloat16 weights, one operation after the other in every round.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    sizes = [589_824, 2_359_296, 16_777_216, 38_597_376]
    add("--elements", nargs="+", type=integer(1), default=sizes, metavar="N")
    add("--threads", nargs="+", type=integer(1), default=[1, 2], metavar="N")
    add("--repeats", type=integer(1), default=11, metavar="N", help="of each")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    import torch

    from zograph import kernels

    if args.json:
        check_file(args.json, "--json")
    kernels.available(warn=True)
    rows = []
    print("million elements (times terms, of a fold) a second, medians")
    for elements in args.elements:
        ways = operations(elements)
        for threads in args.threads:
            torch.set_num_threads(threads)
            rates = measure(ways, elements, args.repeats)
            rows.append({"elements": elements, "threads": threads, "per_second": rates})
            shown = ", ".join(f"{name} {rate / 1e6:.0f}" for name, rate in rates.items())
            print(f"{elements:,} elements, {threads} threads: {shown}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def operations(elements: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return what is timed by name, with how many values of noise an element takes."""
    import torch

    import zograph
    from zograph.ops import fold_

    torch.manual_seed(0)
    wide = torch.randn(elements) * 0.02
    narrow, folded = wide.bfloat16(), wide.clone()
    seeds, coefs = torch.randint(1 << 62, (32,)), torch.randn(32) * 1e-5
    scales, keys = torch.ones(32), torch.tensor([[77, 0]])
    seed, eps = torch.tensor(5), torch.tensor(1e-3)
    pair, one = torch.ops.zograph.materialize, torch.ops.zograph.materialize_one

    def perturbed(op: Any, w: torch.Tensor, count: int, *sign: int) -> object:
        terms = (seeds[:count], coefs[:count], scales[:count])
        return op(w, *terms, keys, 0, seed, eps, w.dtype, "normal", False, *sign)

    def fold(count: int) -> None:
        fold_(folded, seeds[:count], coefs[:count], scales[:count], 77, decay=False)

    return {
        "noise": (1, lambda: zograph.noise("w", elements, 5)),
        "pair": (1, lambda: perturbed(pair, wide, 0)),
        "pair of 1 term": (1, lambda: perturbed(pair, wide, 1)),
        "one branch": (1, lambda: perturbed(one, wide, 0, 1)),
        "pair, bfloat16": (1, lambda: perturbed(pair, narrow, 0)),
        "fold of 1 term": (1, lambda: fold(1)),
        "fold of 8": (8, lambda: fold(8)),
        "fold of 32": (32, lambda: fold(32)),
    }


def measure(
    ways: dict[str, tuple[int, Callable[[], object]]], elements: int, repeats: int
) -> dict[str, float]:
    """Return the elements a second of each, by the median of its times."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 2):
        for name, (_, way) in ways.items():
            start = time.perf_counter()
            way()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: elements * ways[name][0] / statistics.median(taken) for name, taken in seconds.items()
    }
