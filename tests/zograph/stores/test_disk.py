from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.zograph.stores import small
from zograph.errors import StoreError
from zograph.stores import extents, files, workfile
from zograph.stores.base import PAGE, padded
from zograph.stores.disk import WORK_FILE, DiskStore
from zograph.stores.folder import open_work_folder
from zograph.stores.source import TensorSource


class Stop(BaseException):
    """Stands for a kill."""


def write(store: object, name: str, seed: int) -> int:
    return store.write(name, small.buffer_of(name, small.value(name, seed)), seed)  # type: ignore[attr-defined]


def test_values_come_from_the_source_until_written(tmp_path: Path) -> None:
    store = small.disk_store(tmp_path / "w")
    assert all(small.same(store, name, 0) for name in small.TABLE)
    assert not store.path.exists()
    for seed in (1, 2, 3):
        for name, info in small.TABLE.items():
            assert write(store, name, seed) == padded(info.bytes) + PAGE
            assert small.same(store, name, seed)
            assert store.read(name, small.buffer_of(name)) == padded(info.bytes)
    assert store.fold_steps() == dict.fromkeys(small.TABLE, 3)
    assert store.tensor("a") is None
    store.sync()
    store.close()
    store.close()
    with pytest.raises(StoreError, match=r"closed"):
        small.read(store, "a")


def test_layout_is_aligned_and_fixed_by_the_table() -> None:
    places, size = extents.places(small.TABLE)
    starts = sorted(start for place in places.values() for start in place.extents)
    assert len(set(starts)) == 2 * len(small.TABLE)
    assert all(start % PAGE == 0 for start in starts)
    assert size == PAGE + sum(2 * (PAGE + padded(p.bytes)) for p in small.TABLE.values())
    assert extents.places(small.TABLE) == (places, size)


def test_file_is_sparse(tmp_path: Path) -> None:
    store = small.disk_store(tmp_path)
    write(store, "a", 1)
    stat = store.path.stat()
    assert stat.st_size == extents.places(small.TABLE)[1]
    assert stat.st_blocks * 512 <= 4 * PAGE
    store.close()


def test_reopening_finds_the_newest(tmp_path: Path) -> None:
    store = small.disk_store(tmp_path)
    for seed in (1, 2):
        write(store, "a", seed)
    write(store, "b", 7)
    store.close()
    store = small.disk_store(tmp_path, resume=True)
    assert store.fold_steps() == {"a": 2, "b": 7, "c": 0, "d": 0, "e": 0}
    assert small.same(store, "a", 2)
    assert small.same(store, "b", 7)
    assert small.same(store, "c", 0)
    write(store, "a", 3)
    store.close()
    store = small.disk_store(tmp_path, resume=True)
    assert small.same(store, "a", 3)
    store.close()


def test_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    store = small.disk_store(tmp_path)
    write(store, "a", 1)
    store.close()
    with pytest.raises(StoreError, match=r"earlier run.*name another folder, or delete"):
        small.disk_store(tmp_path)


def test_other_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = small.disk_store(tmp_path)
    write(store, "a", 1)
    store.close()
    monkeypatch.setattr(small, "TABLE", dict(reversed(small.TABLE.items())))
    with pytest.raises(StoreError, match=r"another model"):
        small.disk_store(tmp_path, resume=True)


@pytest.mark.parametrize("cut", [0, PAGE + 1])
def test_cut_file(tmp_path: Path, cut: int) -> None:
    store = small.disk_store(tmp_path)
    write(store, "a", 1)
    store.close()
    os.truncate(store.path, cut)
    if cut == 0:  # as a kill before the first page leaves it
        small.disk_store(tmp_path).close()
    else:
        with pytest.raises(StoreError, match=r"was cut or belongs"):
            small.disk_store(tmp_path, resume=True)


def test_foreign_file(tmp_path: Path) -> None:
    (tmp_path / WORK_FILE).write_bytes(b"x" * 3 * PAGE)
    with pytest.raises(StoreError, match=r"no work file"):
        small.disk_store(tmp_path, resume=True)


@contextmanager
def stop_after(calls: int, monkeypatch: pytest.MonkeyPatch, torn: bool) -> Iterator[None]:
    """Let `calls` writes through; the next one stops, after half of its bytes if `torn`."""
    real, left = os.pwritev, [calls]

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        if left[0] == 0:
            if torn:
                real(fd, [views[0][: len(views[0]) // 2 // PAGE * PAGE]], offset)
            raise Stop
        left[0] -= 1
        return real(fd, views, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", pwritev)
        yield


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("calls", range(14))
def test_a_kill_after_any_write_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, torn: bool
) -> None:
    names = ["a", "b", "e"]
    now = dict.fromkeys(names, 0)
    store = small.disk_store(tmp_path)
    stopped = None
    with stop_after(calls, monkeypatch, torn):
        try:
            for seed in (1, 2):
                for name in names:
                    stopped = (name, seed)
                    write(store, name, seed)
                    now[name], stopped = seed, None
        except Stop:
            pass
    store.close()
    again = small.disk_store(tmp_path, resume=True)
    for name in names:
        old_or_new = {now[name]} | ({stopped[1]} if stopped and stopped[0] == name else set())
        step = again.fold_steps()[name]
        assert step in old_or_new
        assert small.same(again, name, step)
    write(again, "a", 9)
    assert small.same(again, "a", 9)
    again.close()


def test_byte_flips_are_found(tmp_path: Path) -> None:
    places, _ = extents.places(small.TABLE)
    place = places["b"]
    store = small.disk_store(tmp_path)
    for seed in (1, 2):
        write(store, "b", seed)
    store.close()
    whole = store.path.read_bytes()
    newest, older = place.extents[1], place.extents[0]
    for at in (newest + 3, newest + 40, newest + 88, newest + PAGE, newest + PAGE + 9999):
        store.path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        again = small.disk_store(tmp_path, resume=True)
        assert again.fold_steps()["b"] == 1
        assert small.same(again, "b", 1)
        again.close()
    for at in (newest + PAGE, older + PAGE):
        whole = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
    store.path.write_bytes(whole)
    with pytest.warns(UserWarning, match=r"no good value of 1 parameters \('b'.*made again"):
        again = small.disk_store(tmp_path, resume=True)
    assert again.fold_steps()["b"] == 0
    assert small.same(again, "b", 0)
    again.close()


def test_values_of_another_run_are_left_out(tmp_path: Path) -> None:
    store = small.disk_store(tmp_path)
    for step, lineage in ((1, 11), (2, 12)):
        store.write("a", small.buffer_of("a", small.value("a", step)), step, lineage)
    store.close()
    work, source = open_work_folder(tmp_path), TensorSource(lambda name: small.value(name, 0))
    again = DiskStore(work, small.TABLE, source, resume=lambda step, lineage: lineage == 11)
    assert again.fold_steps()["a"] == 1
    assert small.same(again, "a", 1)
    again.close()


CHILD = """
    import sys
    from pathlib import Path
    from tests.zograph.stores import small
    store = small.disk_store(Path(sys.argv[1]))
    print("ready", flush=True)
    seed = 1
    while True:
        for name in small.TABLE:
            store.write(name, small.buffer_of(name, small.value(name, seed)), seed)
        seed += 1
"""


def child(code: str, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_real_kill_and_lock(tmp_path: Path) -> None:
    process = child(CHILD, str(tmp_path))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(StoreError, match=r"another run uses the work folder"):
            open_work_folder(tmp_path)
        threading.Event().wait(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    store = small.disk_store(tmp_path, resume=True)
    steps = store.fold_steps()
    assert max(steps.values()) > 0
    assert max(steps.values()) - min(steps.values()) <= 1
    assert all(small.same(store, name, step) for name, step in steps.items())
    store.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = small.disk_store(tmp_path)
    write(store, "a", 1)
    real = os.pwritev

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    for name, seed in (("a", 1), ("b", 0)):
        monkeypatch.setattr(os, "pwritev", pwritev)
        with pytest.raises(StoreError, match=f"'{name}'.*value from before is still") as caught:
            write(store, name, 2)
        assert caught.value.errno == code
        monkeypatch.setattr(os, "pwritev", real)
        assert small.same(store, name, seed)
        write(store, name, 2)
        assert small.same(store, name, 2)
    store.close()


def test_first_write_to_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = small.disk_store(tmp_path)

    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        with pytest.raises(StoreError, match=r"Make space") as caught:
            write(store, "a", 1)
    assert caught.value.errno == errno.ENOSPC
    assert not store.path.exists()
    write(store, "a", 1)
    assert small.same(store, "a", 1)
    store.close()


def test_real_full_disk(tmp_path: Path) -> None:
    mount = tmp_path / "full"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs can only be mounted as root")
    try:
        filler = mount / "filler"
        filler.write_bytes(b"x" * 72 * 1024)
        store = small.disk_store(mount / "w")
        write(store, "a", 1)
        with pytest.raises(StoreError, match=r"Make space") as caught:
            write(store, "b", 1)
        assert caught.value.errno == errno.ENOSPC
        assert small.same(store, "a", 1)
        assert small.same(store, "b", 0)
        filler.unlink()
        write(store, "b", 1)
        assert small.same(store, "b", 1)
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_short_reads_and_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST", PAGE)
    store = small.disk_store(tmp_path)
    write(store, "b", 1)
    assert small.same(store, "b", 1)
    store.close()


def test_file_cut_while_in_use(tmp_path: Path) -> None:
    store = small.disk_store(tmp_path)
    write(store, "e", 1)
    os.truncate(store.path, PAGE)
    with pytest.raises(StoreError, match=r"was cut while in use"):
        small.read(store, "e")
    store.close()


@pytest.mark.parametrize("at_open", [True, False])
def test_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_open: bool) -> None:
    real_open, real_write = os.open, os.pwritev

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_open(path, flags, mode)

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        store_file = store._file
        if store_file is None or store_file.direct:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real_write(fd, views, offset)

    if at_open:
        monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(workfile, "FLUSH", 3 * PAGE)
    store = small.disk_store(tmp_path)
    if not at_open:
        write(store, "a", 1)
        monkeypatch.setattr(os, "pwritev", pwritev)
    for name in small.TABLE:
        write(store, name, 2)
        assert small.same(store, name, 2)
    assert store._file is not None
    assert not store._file.direct
    store.close()


def test_threads_on_different_parameters(tmp_path: Path) -> None:
    store = small.disk_store(tmp_path)
    wrong: list[str] = []

    def work(name: str) -> None:
        for seed in range(1, 20):
            write(store, name, seed)
            if not small.same(store, name, seed):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in small.TABLE]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(store.fold_steps().values()) == {19}
    store.close()


def test_padding_of_buffers_is_not_checked(tmp_path: Path) -> None:
    store = small.disk_store(tmp_path)
    buffer = small.buffer_of("a", small.value("a", 1))
    buffer[small.TABLE["a"].bytes :] = 7
    store.write("a", buffer, 1)
    store.close()
    store = small.disk_store(tmp_path, resume=True)
    assert store.fold_steps()["a"] == 1
    assert torch.equal(small.read(store, "a"), small.value("a", 1))
    store.close()
