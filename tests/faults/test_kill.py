"""A few kills; and the trial itself sees a log that is not the beginning of the whole one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import difference
from tests.zograph.seedlog import runs

ROOT = Path(__file__).parents[2]


def test_kills_change_no_bit(tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    command = [sys.executable, "-m", "tests.faults.kill", "--kills", "6", "--steps", "30"]
    done = subprocess.run(
        [*command, "--dtype", "bfloat16", "--json", str(counts)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(counts.read_text())["bfloat16"]
    assert found["kills"] == 6
    assert found["mismatches"] == 0
    assert found["values made again from the base"] == 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with runs.start(log=tmp_path / "run.zolog") as step:
        runs.take(step, range(4))
    return tmp_path / "run.zolog"


def test_another_log_is_told_from_the_beginning_of_this_one(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    assert difference(path, whole, whole=True) is None
    path.write_bytes(whole[:-58])
    assert difference(path, whole) is None
    assert "38 torn" in str(difference(path, whole, whole=True))
    with runs.start(log=tmp_path / "other") as step:
        runs.take(step, range(3))
        step(**runs.batch(9))
    newest = len(whole) - 48
    at = re.search(r"differs at byte (\d+)", str(difference(tmp_path / "other", whole)))
    assert at is not None
    assert newest + 28 <= int(at[1]) < newest + 32  # the coefficient
    longer = whole + whole[-48:]
    path.write_bytes(whole)
    assert difference(path, whole[:-48]) is not None
    assert difference(path, longer) is None
