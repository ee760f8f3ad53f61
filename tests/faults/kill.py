"""Kill a run from a disk at random moments, again and again: its end must have the same bits.

::

    python -m tests.faults.kill --kills 100 --dtype float32 bfloat16 [--seed 0] [--json FILE]

This process imports everything and computes nothing, so that a child forked off it starts at once.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import zograph
from tests.faults import LOG, difference, folder_digest, known_machine, show, tensors_digest
from zograph.errors import ZographError
from zograph.seedlog import read_log
from zograph.stores import extents
from zograph.stores.base import PAGE
from zograph.stores.disk import WORK_FILE

BASE, END, TABLE, OUTPUT = "base", "end.json", "table.pickle", "output.txt"
VOCABULARY = 1024


@dataclass(frozen=True)
class Run:
    """One run: where it is, and of what kind."""

    folder: Path
    base: Path
    dtype: str
    steps: int
    fold_every: int | None


def write_base(folder: Path) -> None:
    """Write a checkpoint of some megabytes."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=256, word_embed_proj_dim=256, num_hidden_layers=2,
        num_attention_heads=4, ffn_dim=1024, max_position_embeddings=64,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(folder)


def batch(i: int) -> dict[str, torch.Tensor]:
    """Make the batch of a step."""
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(4, VOCABULARY, (2, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train(run: Run) -> None:
    """Begin the run or go on with it, and write down how it ended."""
    os.chdir(run.folder)
    model = zograph.from_pretrained(run.base, dtype=getattr(torch, run.dtype))
    where: dict[str, Any] = {"memory": "minimum", "storage": "disk", "device": "cpu"}
    if Path(LOG).exists():
        step = zograph.resume(model, LOG, **where)
    else:
        fold = {} if run.fold_every is None else {"fold_every": run.fold_every}
        step = zograph.compile(
            model, lr=1e-3, weight_decay=0.1, backend="eager", log=LOG, **where, **fold
        )
    for i in range(0 if step.last is None else step.last.step + 1, run.steps):
        step(**batch(i))
    Path(TABLE).write_bytes(pickle.dumps(step._weights.table))
    state = step.state_dict()
    digest = tensors_digest({name: state[name] for name in state})
    step.close()
    Path(END).write_text(json.dumps(digest))


def fork(work: Callable[[], None], output: Path) -> int:
    """Do something in a child; return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        torch.set_num_threads(1)
        known_machine()
        work()
        code = 0
    except BaseException:  # noqa: BLE001  (a child must never return)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float | None = None) -> int | None:
    """Wait for a child and return its exit status; kill it when the time is over: None."""
    if seconds is not None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def torn_extents(work: Path, table: dict[str, Any]) -> int:
    """Count the extents that a kill left half-written."""
    data, count = memoryview(work.read_bytes()), 0
    places, size = extents.places(table)
    if len(data) < size:
        return 1
    for place in places.values():
        for which in (0, 1):
            page = bytes(data[place.extents[which] :][:PAGE])
            payload = data[place.payload(which) :][: place.nbytes]
            header = extents.parse_extent_header(page)
            if header is None:
                count += any(page) or any(payload)
            else:
                count += header.checksum != extents.checksum(payload)
    return count


class Trial:
    """Runs of one dtype, killed and started again, against one that is left alone."""

    def __init__(self, top: Path, dtype: str, steps: int, fold_every: int | None) -> None:
        self.top, self.dtype, self.steps, self.fold_every = top, dtype, steps, fold_every
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        started = time.perf_counter()
        whole = self.new("whole")
        if wait(fork(lambda: train(whole), whole.folder / OUTPUT)) != 0:
            raise SystemExit((whole.folder / OUTPUT).read_text())
        self.seconds = time.perf_counter() - started
        self.log = (whole.folder / LOG).read_bytes()
        self.end = (whole.folder / END).read_text()
        self.table = pickle.loads((whole.folder / TABLE).read_bytes())

    def new(self, name: str) -> Run:
        """Make a folder for a run."""
        folder = self.top / f"{self.dtype}-{name}"
        folder.mkdir()
        return Run(folder, self.top / BASE, self.dtype, self.steps, self.fold_every)

    def kill(self, kills: int, rng: random.Random) -> None:
        """Start runs until so many were killed and the last one has ended."""
        while self.counts["kills"] < kills and not self.faults:
            run = self.new(f"run{self.counts['runs']}")
            self.counts["runs"] += 1
            while True:
                self.counts["resumes"] += (run.folder / LOG).exists()
                left = self.counts["kills"] < kills
                child = fork(lambda run=run: train(run), run.folder / OUTPUT)  # type: ignore[misc]
                status = wait(child, rng.uniform(0, self.seconds) if left else None)
                if status is not None:
                    break
                self.counts["kills"] += 1
                self.look(run)
            self.check_end(run, status)

    def look(self, run: Run) -> None:
        """See what a kill has left."""
        log, work = run.folder / LOG, run.folder / f"{LOG}.work" / WORK_FILE
        if not log.exists():
            self.counts["kills before there was a log"] += 1
            return
        try:
            found, fault = read_log(log, warn=False), difference(log, self.log)
        except ZographError as e:
            self.faults.append(f"{log}: {e}")
            return
        self.faults += [fault] if fault else []
        self.counts["kills behind step 0"] += len(found) > 0
        self.counts["torn tails cut"] += found.torn > 0
        if work.exists() and (torn := torn_extents(work, self.table)):
            self.counts["kills inside a write-back"] += 1
            self.counts["half-written values"] += torn

    def check_end(self, run: Run, status: int) -> None:
        """Compare a run that has ended with the one that was left alone."""
        text = (run.folder / OUTPUT).read_text()
        self.counts["values made again from the base"] += text.count("holds no good value")
        if status:
            self.faults.append(f"{run.folder} ended with status {status}:\n{text}")
            return
        fault = difference(run.folder / LOG, self.log, whole=True)
        self.faults += [fault] if fault else []
        if (run.folder / END).read_text() != self.end:
            self.faults.append(f"{run.folder} has other weights in the end")


def main(args: list[str] | None = None) -> int:
    """Run the trials; return 1 if a run came to another end."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="for each dtype")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=120, help="of a run")
    parser.add_argument("--fold-every", type=int, help="passed to zograph.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts there")
    asked = parser.parse_args(args)
    os.environ.setdefault("ZOGRAPH_VERIFY", "0")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="zograph-kill-") as name:
        top = Path(name)
        if wait(fork(lambda: write_base(top / BASE), top / OUTPUT)) != 0:
            raise SystemExit((top / OUTPUT).read_text())
        before, rng = folder_digest(top / BASE), random.Random(asked.seed)
        for dtype in asked.dtype:
            trial = Trial(top, dtype, asked.steps, asked.fold_every)
            trial.kill(asked.kills, rng)
            if folder_digest(top / BASE) != before:
                trial.faults.append("the checkpoint's files have changed")
            trial.counts["mismatches"] = len(trial.faults)
            found[dtype] = dict(trial.counts)
            print(f"{dtype}, {trial.seconds:.1f} s a run\n{show(trial.counts)}", flush=True)
            for fault in trial.faults:
                print(fault, file=sys.stderr)
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1))
    return int(any(counts["mismatches"] for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
