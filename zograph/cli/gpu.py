"""What the benchmarks that want a GPU share: their model's options, and timed steps."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zograph.cli import shapes
from zograph.cli.inputs import integer

WARM_UP = 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a large OPT that is cut to some layers."""
    add = parser.add_argument
    sizes = [name for name in shapes.names() if name.startswith("opt-")]
    add("--shape", choices=sizes, default="opt-175b", metavar="SIZE", help="a size of OPT")
    add("--layers", type=integer(1), default=8, metavar="N")
    add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    add("--batch", type=integer(1), default=1, metavar="B", help="rows")
    add("--seq", type=integer(2), default=2048, metavar="S", help="tokens a row")
    add("--repeats", type=integer(1), default=5, metavar="N", help="timed steps")
    add("--backend", choices=("inductor", "eager"), default="inductor")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")


def timed(step: Callable[[], Any], tokens: int, repeats: int) -> dict[str, Any]:
    """Warm up, then time steps one by one, each until the device is done.

    Parameters
    ----------
    tokens
        Of a step.
    """
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(WARM_UP + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    median = statistics.median(seconds[WARM_UP:])
    return {
        "seconds": seconds,
        "losses": losses,
        "median": median,
        "tokens_per_second": tokens / median,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }
