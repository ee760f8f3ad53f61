"""Steps whose loss is not finite: skipped or raised, a resumed run has the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zograph.seedlog import runs
from zograph.errors import LossError, StoreError
from zograph.seedlog import read_log

WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "host": {"memory": "minimum"},
    "disk": {"memory": "minimum", "storage": "disk"},
}
BAD = (1, 2, 6)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def take(step: Any, steps: range, dtype: torch.dtype) -> list[str]:
    """Run steps, some of them on a batch that has no loss; a NaN is not equal to itself."""
    found = []
    for i in steps:
        batch = runs.batch(i, dtype)
        if i in BAD:
            batch["x"] = torch.full_like(batch["x"], float("nan"))
        step(**batch)
        found.append(repr(step.last))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_skipped_steps_stay_skipped(way: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"on_nan": "skip", "fold_every": 3, "directions": 2}
    whole = runs.start(dtype, **options)
    expected = take(whole, range(9), dtype)
    with runs.start(dtype, log="run.zolog", **options, **WAYS[way]) as step:
        found = take(step, range(3), dtype)
    with runs.resume("run.zolog", dtype, on_nan="skip", **WAYS[way]) as step:
        assert repr(step.last) == expected[2]
        assert step.last.skipped
        found += take(step, range(3, 7), dtype)
    step = runs.resume("run.zolog", dtype, on_nan="skip", **WAYS[way])
    found += take(step, range(7, 9), dtype)
    assert found == expected
    state, last = runs.values(whole), runs.values(step)
    assert all(torch.equal(last[n], t) and t.isfinite().all() for n, t in state.items())
    step.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_raised_leaves_no_trace(way: str, tmp_path: Path) -> None:
    whole, path = runs.start(), tmp_path / "run.zolog"
    expected = runs.take(whole, range(4))
    step = runs.start(log=path, **WAYS[way])
    found = runs.take(step, range(2))
    before, last = path.read_bytes(), step.last
    for _ in range(2):
        with pytest.raises(LossError, match="step 2"):
            step(**runs.batch(2) | {"x": torch.full((5, 8), float("inf"))})
        assert path.read_bytes() == before
        assert step.last == last
    step.close()
    with runs.resume(path, **WAYS[way]) as step:
        found += runs.take(step, range(2, 4))
        assert found == expected
        state = runs.values(whole)
        assert all(torch.equal(t, state[n]) for n, t in runs.values(step).items())


def test_a_copy_of_a_log_that_is_there_is_refused(tmp_path: Path) -> None:
    with runs.start(log="run.zolog") as step:
        runs.take(step, range(1))
    (tmp_path / "other.zolog").write_bytes(b"mine")
    with pytest.raises(StoreError, match="is there already"):
        runs.resume("run.zolog", log="other.zolog")
    assert (tmp_path / "other.zolog").read_bytes() == b"mine"
    assert len(read_log("run.zolog")) == 1
