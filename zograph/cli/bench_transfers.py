"""`zograph bench transfers`: what formats of stored weights and fold periods move, and how fast."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from zograph.cli.inputs import integer
from zograph.cli.output import check_file
from zograph.elision import PERIODS
from zograph.formats import FORMATS

Way = tuple[str | None, int | str]
"""A format and a fold period."""


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "transfers",
        help="bytes and seconds of a streamed step over formats and fold periods",
        description="Stream a float32 model of random weights from a disk at the least budget, in "
        "each format of stored weights and with each fold period; all alternating in one run.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", default="opt-125m", help="a published size such as opt-125m, or a folder")
    add("--batch", type=integer(1), default=1, metavar="B", help="rows")
    add("--seq", type=integer(2), default=32, metavar="S", help="tokens a row")
    add("--threads", type=integer(1), default=2, metavar="N")
    add("--rounds", type=integer(1), default=3, metavar="N")
    add("--formats", nargs="*", choices=FORMATS, default=list(FORMATS), metavar="FORMAT",
        help="beside float32")  # fmt: skip
    add("--backend", choices=("inductor", "eager"), default="inductor")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")


def ways(formats: Sequence[str]) -> list[Way]:
    """List what is measured: every period without a format, two periods of every format."""
    plain: list[Way] = [(None, period) for period in (*PERIODS, "auto")]
    return plain + [(name, period) for name in formats for period in (1, 4)]


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        result = measure(args, Path(folder))
    print(f"{args.model}, float32, {args.batch} x {args.seq} tokens, {args.threads} threads, "
          f"from a disk at the least budget")  # fmt: skip
    print("stored as          K   read MB  written MB  seconds   of K=1  first loss differs by")
    first = result["ways"][0]["median"]
    for row in result["ways"]:
        period = row["period"] if row["asked"] == row["period"] else f"auto: {row['period']}"
        print(
            f"{row['format'] or 'float32':14}{period!s:>8}{row['read'] / 1e6:9.0f}"
            f"{row['written'] / 1e6:12.0f}{row['median']:9.3f}{row['median'] / first:9.3f}"
            f"{row['loss']:12.1e}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the model once, warm every way up for the longest period, then take turns."""
    import torch

    from zograph.cli.bench import build

    torch.set_num_threads(args.threads)
    build(args.model).save_pretrained(folder / "base")
    tokens = torch.randint(0, 1000, (args.batch, args.seq))
    batch = {"input_ids": tokens, "labels": tokens}
    with ExitStack() as stack:
        found = [Measured(args, way, folder, i, stack) for i, way in enumerate(ways(args.formats))]
        for one in found:
            tell(f"warming up: {one.format or 'float32'}, K = {one.asked}")
            one.take(batch, max(PERIODS) + 1)
            one.begin()
        for i in range(args.rounds):
            tell(f"measuring: round {i + 1} of {args.rounds}")
            for one in found:
                one.take(batch, 1)
                one.seconds += one.take(batch, max(PERIODS) // 2)
        rows = [one.row(found[0].loss) for one in found]
    return {"model": args.model, "threads": args.threads, "torch": torch.__version__, "ways": rows}


def tell(what: str) -> None:
    """Say on stderr what is under way: all of it takes minutes."""
    print(what, file=sys.stderr, flush=True)


class Measured:
    """A step with one format and period, and what it has taken."""

    def __init__(
        self, args: argparse.Namespace, way: Way, folder: Path, number: int, stack: ExitStack
    ) -> None:
        import zograph

        self.format, self.asked = way
        self.step = stack.enter_context(
            zograph.compile(
                zograph.from_pretrained(folder / "base"),
                device="cpu",
                memory="minimum",
                storage=folder / f"work{number}",
                transfer_dtype=self.format,
                fold_every=self.asked,  # type: ignore[arg-type]
                backend=args.backend,
            )
        )
        self.seconds: list[float] = []
        self.loss, self.taken = 0.0, 0
        self.before: dict[str, int] = {}

    def take(self, batch: dict[str, Any], count: int) -> list[float]:
        """Run steps; return the seconds of each."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.step(**batch)
            seconds.append(time.perf_counter() - start)
            if self.loss == 0.0 and self.step.last is not None:
                self.loss = self.step.last.loss_plus
        self.taken += count
        return seconds

    def begin(self) -> None:
        """Count what is moved from here on."""
        self.before, self.taken = self.step.moved_bytes, 0

    def row(self, plain: float) -> dict[str, Any]:
        """Return what was found, bytes by step."""
        now = self.step.moved_bytes
        moved = {s: (now[s] - self.before[s]) / self.taken for s in ("read", "write")}
        return {
            "format": self.format,
            "asked": self.asked,
            "period": self.step.fold_every,
            "read": moved["read"],
            "written": moved["write"],
            "median": statistics.median(self.seconds),
            "seconds": self.seconds,
            "loss": abs(self.loss / plain - 1),
        }
