"""Disks that fail, locks, files that change: the log is as before, and nothing else is written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zograph.seedlog import runs
from zograph.errors import StoreError
from zograph.seedlog import Journal, read_log
from zograph.stores.lock import FileLock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zolog"


def failing(code: int, real: Callable[..., Any], times: int = 1) -> Callable[..., Any]:
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return call


def check_same(step: Any, steps: int) -> None:
    whole = runs.start()
    runs.take(whole, range(steps))
    expected = runs.values(whole)
    assert step.last == whole.last
    assert all(torch.equal(t, expected[n]) for n, t in runs.values(step).items())


@pytest.mark.parametrize("every", [1, 2])
def test_a_flush_that_fails_leaves_the_step_undone(
    path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    step = runs.start(log=path, fsync_every=every)
    monkeypatch.setattr(os, "fdatasync", failing(errno.EIO, os.fdatasync))
    done = 2 * every - 1
    runs.take(step, range(done))  # the flush behind the first of these fails
    size = path.stat().st_size
    with pytest.raises(StoreError, match=r"cannot be flushed.*may be failing") as caught:
        step(**runs.batch(done))
    assert caught.value.errno == errno.EIO
    assert path.stat().st_size == size
    assert step.last is not None
    assert step.last.step == done - 1
    runs.take(step, range(done, 5))
    check_same(step, 5)
    step.close()
    assert len(read_log(path)) == 5


def test_a_disk_that_does_not_even_cut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = runs.start(log=path)
    runs.take(step, range(2))
    real = os.pwritev
    writes = [lambda fd, views, offset: real(fd, [views[0][:20]], offset)]

    def half(fd: int, views: Any, offset: int) -> int:
        if writes:
            return writes.pop()(fd, views, offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", half)
        patch.setattr(os, "ftruncate", failing(errno.EIO, os.ftruncate))
        with pytest.raises(StoreError, match="may be failing"):
            step(**runs.batch(2))
    with pytest.warns(UserWarning, match="last 20 bytes"):
        assert len(read_log(path)) == 2
    runs.take(step, range(2, 4))
    check_same(step, 4)
    step.close()
    assert read_log(path).torn == 0


def test_nothing_is_written_after_the_end(path: Path, tmp_path: Path) -> None:
    step = runs.start(log=path)
    runs.take(step, range(2))
    step.close()
    before = path.read_bytes()
    other = [os.open(tmp_path / f"other{i}", os.O_RDWR | os.O_CREAT) for i in range(20)]
    try:
        with pytest.raises(StoreError, match=r"was closed. Go on with it in a new step"):
            step(**runs.batch(2))
        check_same(step, 2)
        step.close()
        assert path.read_bytes() == before
        assert not any(os.fstat(fd).st_size for fd in other)
    finally:
        for fd in other:
            os.close(fd)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", failing(code, tempfile.mkstemp))
        with pytest.raises(StoreError, match=r"cannot be made.*use another folder") as caught:
            runs.start(log=path)
    assert caught.value.errno == code
    assert not list(path.parent.iterdir())
    runs.start(log=path).close()


def test_a_log_that_is_made_on_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.ENOSPC, os.fsync))
        with pytest.raises(StoreError, match="Make space"):
            runs.start(log=path)
    assert not list(path.parent.iterdir())
    runs.start(log=path).close()


def test_a_child_does_not_keep_the_lock(path: Path) -> None:
    step = runs.start(log=path)
    runs.take(step, range(1))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until the parent has closed its end
        os._exit(0)
    os.close(read)
    try:
        with pytest.raises(StoreError, match="another run writes the log"):
            runs.resume(path)
        step.close()
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        runs.resume(path).close()
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_another_process_is_refused(path: Path) -> None:
    with runs.start(log=path) as step:
        runs.take(step, range(1))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                FileLock(path, "refused")
            except StoreError as error:
                code = 7 if str(error).endswith("refused") else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_log_that_changed_meanwhile(path: Path) -> None:
    with runs.start(log=path) as step:
        runs.take(step, range(1))
    found = read_log(path)
    with runs.resume(path) as step:
        runs.take(step, range(1, 2))
    with pytest.raises(StoreError, match="was written by another run meanwhile: try again") as e:
        Journal.go_on(found, path, 1)
    assert e.value is not None  # what holds the traceback does not hold the lock
    Journal.go_on(read_log(path), path, 1).close()


def test_a_home_folder_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    with runs.start(log="~/run.zolog") as step:
        runs.take(step, range(1))
    with runs.resume("~/run.zolog") as step:
        runs.take(step, range(1, 2))
    assert len(read_log(path)) == 2
