"""A run that is resumed has the bits of one that never ended."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zograph
from tests.zograph.seedlog import runs
from zograph.errors import LogError, OptionError
from zograph.stores.disk import WORK_FILE

WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "host": {"memory": "minimum"},
    "disk": {"memory": "minimum", "storage": "disk"},
    "disk, held": {"storage": "disk"},
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check_end(step: zograph.ZOStep, whole: zograph.ZOStep) -> None:
    expected = runs.values(whole)
    assert step.last == whole.last
    assert all(torch.equal(t, expected[n]) for n, t in runs.values(step).items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fold_every", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_same_bits_on_any_way(way: str, fold_every: int, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"directions": 2, "fold_every": fold_every}
    whole = runs.start(dtype, **options)
    expected = runs.take(whole, range(12), dtype)
    step = runs.start(dtype, log="run.zolog", **options, **WAYS[way])
    found = runs.take(step, range(5), dtype)
    step.close()
    for first, other in ((5, way), (7, "host"), (9, "disk")):
        step = runs.resume("run.zolog", dtype, **WAYS[other])
        assert step.last is not None
        assert step.last.step == first - 1
        found += runs.take(step, range(first, first + 2 if first < 9 else 12), dtype)
        if first < 9:
            step.close()
    assert found == expected
    check_end(step, whole)
    step.close()


def test_an_empty_log_starts_at_step_0() -> None:
    runs.start(log="run.zolog").close()
    with runs.resume("run.zolog") as step:
        before = step.last
        assert before is None
        assert step.lr == 0.05
        runs.take(step, range(1))
        assert step.last.step == 0


def test_the_learning_rate_is_that_of_the_last_step() -> None:
    with runs.start(log="run.zolog") as step:
        step.lr = 0.01
        runs.take(step, range(1))
    with runs.resume("run.zolog") as step:
        assert step.lr == 0.01
    with runs.resume("run.zolog", lr=0.02) as step:
        assert step.lr == 0.02


def test_a_copy_leaves_the_first_log_alone(tmp_path: Path) -> None:
    with runs.start(log="run.zolog", **WAYS["disk"]) as step:
        runs.take(step, range(3))
    before = (tmp_path / "run.zolog").read_bytes()
    with runs.resume("run.zolog", log="other.zolog", **WAYS["disk"]) as step:
        runs.take(step, range(3, 5))
        whole = runs.start()
        runs.take(whole, range(5))
        check_end(step, whole)
    assert (tmp_path / "run.zolog").read_bytes() == before
    assert (tmp_path / "other.zolog").read_bytes()[: len(before)] == before


REFUSED: dict[str, dict[str, Any]] = {
    "eps": {"eps": 1e-2},
    "seed": {"seed": 1},
    "directions": {"directions": 2},
    "distribution": {"distribution": "rademacher"},
    "weight_decay": {"weight_decay": 0.0},
    "compute_dtype": {"compute_dtype": torch.bfloat16},
    "backend": {"backend": "inductor"},
}


@pytest.mark.parametrize("option", REFUSED)
def test_other_options_are_refused(option: str, tmp_path: Path) -> None:
    with runs.start(log="run.zolog") as step:
        runs.take(step, range(1))
    before = (tmp_path / "run.zolog").read_bytes()
    with pytest.raises(LogError, match=f"written with {option}="):
        runs.resume("run.zolog", **REFUSED[option])
    assert (tmp_path / "run.zolog").read_bytes() == before
    with pytest.raises(OptionError, match="'epsilon' is no option"):
        runs.resume("run.zolog", epsilon=1)


def test_other_weights_are_refused() -> None:
    with runs.start(log="run.zolog") as step:
        runs.take(step, range(2))
        moved = step.model
    with pytest.raises(LogError, match="starts from other values"):
        zograph.resume(moved, "run.zolog", loss_fn=runs.loss)
    frozen = runs.model()
    frozen[0].requires_grad_(False)
    with pytest.raises(LogError, match="trained other parameters"):
        zograph.resume(frozen, "run.zolog", loss_fn=runs.loss)
    with pytest.raises(LogError, match="another model"):
        zograph.resume(nn.Linear(8, 4), "run.zolog", loss_fn=runs.loss)


def test_a_work_file_of_a_longer_or_another_run_does_no_harm(tmp_path: Path) -> None:
    whole = runs.start()
    runs.take(whole, range(8))
    log, work = tmp_path / "run.zolog", tmp_path / "run.zolog.work" / WORK_FILE
    with runs.start(log=log, **WAYS["disk"]) as step:
        runs.take(step, range(6))
    log.write_bytes(log.read_bytes()[: -3 * 48])  # as a loss of power leaves it
    with pytest.warns(UserWarning, match="no good value"):
        step = runs.resume(log, **WAYS["disk"])
    runs.take(step, range(3, 8))
    check_end(step, whole)
    step.close()
    other = tmp_path / "other.zolog"
    with runs.start(log=other, seed=5, **WAYS["disk"]) as step:
        runs.take(step, range(8))
    shutil.copy(tmp_path / "other.zolog.work" / WORK_FILE, work)
    with pytest.warns(UserWarning, match="no good value"):
        step = runs.resume(log, **WAYS["disk"])
    check_end(step, whole)
    step.close()


def test_a_damaged_work_file_is_made_again(tmp_path: Path) -> None:
    whole, rng = runs.start(), random.Random(0)
    runs.take(whole, range(6))
    log, work = tmp_path / "run.zolog", tmp_path / "run.zolog.work" / WORK_FILE
    with runs.start(log=log, **WAYS["disk"]) as step:
        runs.take(step, range(6))
        step.synchronize()
    good = work.read_bytes()
    for _ in range(12):
        bad = bytearray(good)
        for _ in range(200):
            bad[rng.randrange(4096, len(bad))] ^= 1 << rng.randrange(8)
        work.write_bytes(bad)
        with pytest.warns(UserWarning, match="no good value"):
            step = runs.resume(log, **WAYS["disk"])
        check_end(step, whole)
        step.close()


CHILD = """
    import sys, warnings
    from pathlib import Path
    import torch
    from tests.zograph.seedlog import runs
    warnings.simplefilter("ignore")
    dtype = getattr(torch, sys.argv[1])
    path = Path("run.zolog")
    way = {"memory": "minimum", "storage": "disk"}
    if path.exists():
        step = runs.resume(path, dtype, **way)
    else:
        step = runs.start(dtype, log=path, fold_every=3, **way)
    first = 0 if step.last is None else step.last.step + 1
    runs.take(step, range(first, first + 1), dtype)
    print("ready", flush=True)
    runs.take(step, range(first + 1, 4000), dtype)
    step.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_that_is_killed_again_and_again(dtype: torch.dtype) -> None:
    name, rng = str(dtype).removeprefix("torch."), random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), name],
            env={"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            process.wait(rng.uniform(0.05, 0.6))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    step = runs.resume("run.zolog", dtype, memory="minimum", storage="disk")
    assert step.last is not None
    done = step.last.step + 1
    whole = runs.start(dtype, fold_every=3)
    assert done > 3
    runs.take(whole, range(done + 3), dtype)
    runs.take(step, range(done, done + 3), dtype)
    check_end(step, whole)
    step.close()
