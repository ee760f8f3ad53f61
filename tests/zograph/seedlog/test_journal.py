"""Writing the log: whole records, a lock, flushes, and a disk that fills."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zograph.seedlog import runs
from zograph.errors import LossError, OptionError, StoreError
from zograph.seedlog import read_log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zolog"


def test_a_log_that_is_there_is_not_overwritten(path: Path) -> None:
    path.write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"is there already. Go on with it \(zograph.resume\)"):
        runs.start(log=path)
    assert path.read_bytes() == b"mine"
    assert [p.name for p in path.parent.iterdir()] == ["run.zolog"]


def test_a_folder_that_cannot_be_made(path: Path) -> None:
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be made"):
        runs.start(log=path / "below" / "run.zolog")


def test_one_run_writes_a_log(path: Path) -> None:
    with runs.start(log=path) as step:
        runs.take(step, range(2))
        with pytest.raises(StoreError, match="another run writes the log"):
            runs.resume(path)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        runs.take(step, range(2, 3))
    with runs.resume(path) as step:
        assert step.last is not None
        assert step.last.step == 2


@pytest.mark.parametrize(("every", "flushes"), [(0, 0), (1, 6), (3, 2)])
def test_flushes(path: Path, monkeypatch: pytest.MonkeyPatch, every: int, flushes: int) -> None:
    count, real = [0], os.fdatasync

    def counted(fd: int) -> None:
        count[0] += 1
        real(fd)

    step = runs.start(log=path, fsync_every=every)
    monkeypatch.setattr(os, "fdatasync", counted)
    runs.take(step, range(6))
    assert step._log is not None
    assert step._log.journal is not None
    step._log.journal._await_flush()
    assert count[0] == flushes
    step.close()
    assert count[0] == flushes + 1


def test_no_number_of_records(path: Path) -> None:
    with pytest.raises(OptionError, match="fsync_every is -1"):
        runs.start(log=path, fsync_every=-1)


@pytest.mark.parametrize("part", [0, 20])
def test_a_full_disk_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    plain = runs.start()
    expected = runs.take(plain, range(4))
    step = runs.start(log=path)
    found = runs.take(step, range(2))
    before, real = path.read_bytes(), os.pwritev

    def full(fd: int, views: Any, offset: int) -> int:
        if part and len(views[0]) == 48:
            return real(fd, [views[0][:part]], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(StoreError, match="Make space on the disk and run the step again"):
            step(**runs.batch(2))
    assert path.read_bytes() == before
    found += runs.take(step, range(2, 4))
    assert found == expected
    expected_values = runs.values(plain)
    assert all(torch.equal(t, expected_values[n]) for n, t in runs.values(step).items())
    step.close()
    assert len(read_log(path)) == 4


def test_losses_that_are_not_finite(path: Path) -> None:
    bad = runs.batch(0) | {"x": torch.full((5, 8), float("nan"))}
    with runs.start(log=path) as step:
        step(**runs.batch(0))
        with pytest.raises(LossError):
            step(**bad)
    assert len(read_log(path)) == 1
    other = path.with_name("skip")
    with runs.start(log=other, on_nan="skip") as step:
        step(**runs.batch(0))
        step(**bad)
        step(**runs.batch(1))
        expected = runs.values(step)
    found = read_log(other)
    assert found.table["flags"].tolist() == [0, 1, 0]
    with runs.resume(other) as step:
        assert all(torch.equal(t, expected[n]) for n, t in runs.values(step).items())


def test_save_writes_the_log_so_far(path: Path) -> None:
    with runs.start(log=path) as step:
        runs.take(step, range(3))
        step.save(path.with_name("copy"))
        runs.take(step, range(3, 4))
        with pytest.raises(StoreError, match="is there already"):
            step.save(path.with_name("copy"))
    assert len(read_log(path.with_name("copy"))) == 3
    with pytest.raises(RuntimeError, match="pass log=path"):
        runs.start().save(path.with_name("none"))
