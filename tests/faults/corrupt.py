"""Flip bytes of a log and of a work file, and cut them: the same bits follow, or an error.

::

    python -m tests.faults.corrupt --count 1000 [--seed 0] [--onward 25] [--json FILE]

Every damage is tried by a resume, whose weights must be those of the step that the log then ends
with. Every so many times the run goes on to its end, which must have the bits of the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zograph
from tests.faults import LOG, difference, known_machine, show, tensors_digest
from zograph.errors import ZographError
from zograph.stores.disk import WORK_FILE

DONE, END = 8, 12
WHERE: dict[str, Any] = {"memory": "minimum", "storage": "disk", "device": "cpu"}
ADVICE = re.compile(r"Restore|restore|Delete|Update|Load|Leave|name another")


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def batch(i: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Make the batch of a step."""
    return {"x": torch.randn(3, 32, generator=torch.Generator().manual_seed(i)).to(dtype)}


@dataclass
class Whole:
    """A run that was left alone: its files behind step DONE, and what it came to."""

    dtype: torch.dtype
    folder: Path
    log: bytes
    digests: list[str]
    """Of the weights before each step and in the end."""
    versions: dict[str, int]
    """The steps that are in each stored value, behind step DONE."""

    @property
    def work(self) -> Path:
        return self.folder / f"{LOG}.work" / WORK_FILE

    def model(self) -> nn.Module:
        """Make the model that every run starts from: each weight fills its pages."""
        torch.manual_seed(0)
        layers = [nn.Linear(32, 32 * wide, bias=False) for wide in (1, 2)]
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Linear(64, 32))
        return model.to(self.dtype)

    def resume(self, folder: Path) -> zograph.ZOStep:
        """Go on with the run in a folder."""
        return zograph.resume(self.model(), folder / LOG, loss_fn=loss, **WHERE)


def whole_run(folder: Path, dtype: torch.dtype, fold_every: int) -> Whole:
    """Run once without damage."""
    found = Whole(dtype, folder, b"", [], {})
    first = zograph.compile(
        found.model(), loss_fn=loss, lr=0.05, weight_decay=0.1, backend="eager",
        fold_every=fold_every, log=folder / LOG, **WHERE,
    )  # fmt: skip
    for i in range(DONE):
        first(**batch(i, dtype))
    first.close()
    found.versions = dict(first._weights.store.fold_steps())
    resident = zograph.compile(
        found.model(), loss_fn=loss, lr=0.05, weight_decay=0.1, backend="eager",
        fold_every=fold_every, log=folder / "whole.zolog", device="cpu",
    )  # fmt: skip
    for i in range(END):
        found.digests.append(tensors_digest(resident.state_dict()))
        resident(**batch(i, dtype))
    found.digests.append(tensors_digest(resident.state_dict()))
    resident.close()
    found.log = (folder / "whole.zolog").read_bytes()
    return found


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


Damage = Callable[[bytes, random.Random], bytes]
DAMAGES: dict[str, Damage] = {"flip": flip, "cut": cut}
FILES = ("log", "work file")


def outcome(whole: Whole, folder: Path, *, onward: bool) -> tuple[str, str | None]:
    """Resume what stands in a folder.

    Returns
    -------
    what happened, and what is wrong with that
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            step = whole.resume(folder)
        except ZographError as error:
            advice = ADVICE.search(str(error))
            return f"reported: {type(error).__name__}", None if advice else f"no advice: {error}"
        except Exception as error:  # noqa: BLE001  (any other exception is what is looked for)
            return "another exception", f"{type(error).__name__}: {error}"
    said = " ".join(str(w.message) for w in caught)
    try:
        steps = 0 if step.last is None else step.last.step + 1
        versions = step._weights.store.fold_steps()
        fault = None
        if steps > DONE or tensors_digest(step.state_dict()) != whole.digests[steps]:
            fault = f"wrong weights behind step {steps}"
        elif onward:
            for i in range(steps, END):
                step(**batch(i, whole.dtype))
            if tensors_digest(step.state_dict()) != whole.digests[END]:
                fault = "wrong weights in the end"
            fault = fault or difference(folder / LOG, whole.log, whole=True)
    finally:
        step.close()
    return kind(said, steps, versions != whole.versions), fault


def kind(said: str, steps: int, other: bool) -> str:
    """Name what a resume did."""
    if "no whole record" in said:
        return "recovered: torn tail cut, with a warning"
    if steps < DONE:
        return "recovered: shorter log, cut between records"
    if "no good value" in said:
        return "recovered: made again from base and log, with a warning"
    return "recovered: other extent, or base, used" if other else "recovered: nothing was needed"


def attempt(
    wholes: list[Whole], file: str, damage: Damage, count: int, rng: random.Random, onward: int
) -> tuple[Counter[str], list[str]]:
    """Damage a file so many times; count what happened, and list what is wrong."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    for i in range(count):
        whole = wholes[i % len(wholes)]
        folder = whole.folder.with_name("damaged")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole.folder, folder)
        path = folder / (LOG if file == "log" else whole.work.relative_to(whole.folder))
        path.write_bytes(damage(path.read_bytes(), rng))
        found, fault = outcome(whole, folder, onward=onward > 0 and i % onward < len(wholes))
        counts[found] += 1
        if fault:
            faults.append(f"{damage.__name__} of a {file}, {whole.dtype}, {i}: {found}: {fault}")
    return counts, faults


def runs(top: Path) -> list[Whole]:
    """Run once for each kind of weights."""
    kinds = ((torch.float32, 1), (torch.bfloat16, 3))
    return [whole_run(top / str(dtype), dtype, fold_every) for dtype, fold_every in kinds]


def main(args: list[str] | None = None) -> int:
    """Try every damage; return 1 if a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.corrupt")
    parser.add_argument("--count", type=int, default=1000, help="of each kind, of each file")
    parser.add_argument(
        "--onward", type=int, default=25, help="go on to the end so often; 0: never"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts there")
    asked = parser.parse_args(args)
    os.environ.setdefault("ZOGRAPH_VERIFY", "0")
    torch.set_num_threads(1)
    known_machine()
    found, wrong = {}, []
    with tempfile.TemporaryDirectory(prefix="zograph-corrupt-") as name:
        wholes, rng = runs(Path(name)), random.Random(asked.seed)
        for file in FILES:
            for damage in DAMAGES.values():
                counts, faults = attempt(wholes, file, damage, asked.count, rng, asked.onward)
                counts["wrong"] = len(faults)
                found[f"{damage.__name__} of a {file}"] = dict(counts)
                print(f"{damage.__name__} of a {file}\n{show(counts)}", flush=True)
                wrong += faults
    for fault in wrong:
        print(fault, file=sys.stderr)
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
