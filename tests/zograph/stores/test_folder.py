from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zograph.errors import StoreError
from zograph.stores.folder import open_work_folder


def test_fresh_folder_is_removed_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work = open_work_folder(None)
    assert work.path.parent == tmp_path
    assert work.path.name.startswith("zograph-work-")
    (work.path / "weights.zo").write_bytes(b"x")
    work.close()
    work.close()
    assert work.closed
    assert list(tmp_path.iterdir()) == []


def test_fresh_folder_is_removed_when_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    work = open_work_folder(None)
    assert work.path.exists()
    del work
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_fresh_folder_is_removed_at_exit(tmp_path: Path) -> None:
    code = "from zograph.stores.folder import open_work_folder as o; w = o(None); print(w.path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, PYTHONPATH=os.getcwd()),
    )
    assert "zograph-work-" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_named_folder_is_made_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "one" / "two"
    work = open_work_folder(path)
    with pytest.raises(StoreError, match=r"another run uses") as caught:
        open_work_folder(path)
    assert caught.value.errno in (errno.EWOULDBLOCK, errno.EACCES)
    work.close()
    assert path.is_dir()
    open_work_folder(path).close()


def test_lock_is_not_held_by_forked_children(tmp_path: Path) -> None:
    work = open_work_folder(tmp_path / "w")
    (held, hold), (started, start) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:  # lives on after the parent has let go
        os.close(hold)
        os.write(start, b"x")
        os.read(held, 1)
        os._exit(0)
    os.read(started, 1)
    work.close()
    open_work_folder(tmp_path / "w").close()
    os.close(hold)
    os.waitpid(pid, 0)
    for fd in (held, started, start):
        os.close(fd)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=r"use another folder") as caught:
        open_work_folder(tmp_path / "w")
    assert caught.value.errno == code


def test_real_read_only_place(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match=r"use another folder"):
        open_work_folder(tmp_path / "w")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("x")
    with pytest.raises(StoreError, match=r"no work folder can be made"):
        open_work_folder(tmp_path / "w")
