"""How fast the disk under a folder reads and writes, alone and both at once.

A file of random bytes is written whole, so that its blocks are allocated; then pieces of it are
overwritten, read, and overwritten and read at once by two threads, as a store does in a step.
Requests are 8 MiB from page-aligned memory, past the page cache where the file system allows it;
elsewhere every written piece is synchronised and dropped from the cache. Medians over pieces.
What a hypervisor or the drive itself caches cannot be told apart.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from zograph.errors import StoreError

REQUEST = 8 << 20
PIECES = 8
"""In the file; each is timed as one."""
LIMIT = 1.0
"""Seconds after which a measurement takes no further piece, once it has three."""


def disk(folder: Path, nbytes: int) -> tuple[float, float, float]:
    """Return bytes/s read alone, written alone, and in total when as much is read as written.

    Parameters
    ----------
    folder
        On the disk to be measured; a file without a name lives there for the time.
    nbytes
        Size of the file, a multiple of 32 KiB.

    Raises
    ------
    StoreError
        If the folder is missing, read-only or full, or the disk fails.
    """
    piece = nbytes // PIECES
    try:
        if shutil.disk_usage(folder).free < 2 * nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with DirectFile(folder) as file, ThreadPoolExecutor(2) as workers:
            out, back = pages(piece), pages(piece)
            np.frombuffer(out, np.uint8)[:] = np.frombuffer(random_bytes(piece), np.uint8)

            def write(i: int) -> None:
                file.write(out, i % PIECES * piece)

            def read(i: int) -> None:
                file.read(back, i % PIECES * piece)

            def both(i: int) -> None:
                pair = workers.submit(write, i), workers.submit(read, i + PIECES // 2)
                for future in pair:
                    future.result()

            for i in range(PIECES):
                write(i)
            return (
                piece / _median(read),
                piece / _median(write),
                2 * piece / _median(both),
            )
    except OSError as error:
        raise StoreError(f"{folder}: {_advice(error, nbytes)}") from error


def takes_file(folder: Path, nbytes: int) -> bool:
    """Return whether a file of that size can be measured there."""
    try:
        return os.access(folder, os.W_OK | os.X_OK) and (
            shutil.disk_usage(folder).free >= 2 * nbytes
        )
    except OSError:
        return False


def _advice(error: OSError, nbytes: int) -> str:
    """Say what is wrong and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: to measure it, {2 * nbytes / 1e6:.0f} MB must be free; make "
            "space or name a folder on another disk."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write there ({error.strerror}); name a folder that can be written."
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "is not a folder; create it or name another."
    return f"the disk fails: {error.strerror or error}; name a folder on another disk."


def _median(run: Callable[[int], None]) -> float:
    """Return the median seconds of a piece."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 2 * PIECES and sum(times) < LIMIT):
        began = time.perf_counter()
        run(len(times))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def pages(nbytes: int) -> memoryview:
    """Return page-aligned memory."""
    return memoryview(mmap.mmap(-1, nbytes))


def random_bytes(nbytes: int) -> bytes:
    """Return the same random bytes every time, which nothing compresses."""
    return np.random.default_rng(0).bytes(nbytes)


class DirectFile:
    """A file whose name is gone at once, so that no end of the process leaves it behind."""

    def __init__(self, folder: Path) -> None:
        self._fd, path = tempfile.mkstemp(prefix=".zograph-measure-", dir=folder)
        os.unlink(path)
        self._direct = self._set_direct(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data`; when this returns, it has left for the disk."""
        at = 0
        while at < len(data):
            try:
                at += os.pwrite(self._fd, data[at : at + REQUEST], offset + at)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._set_direct(False)
        if not self._direct:
            os.fsync(self._fd)
            self._forget(offset, len(data))

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from the disk."""
        at = 0
        while at < len(into):
            done = os.preadv(self._fd, [into[at : at + REQUEST]], offset + at)
            if not done:
                raise OSError(errno.EIO, "a read came back short")
            at += done
        if not self._direct:
            self._forget(offset, len(into))

    def _forget(self, offset: int, nbytes: int) -> None:
        os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _set_direct(self, on: bool) -> bool:
        """Switch direct I/O; return whether it is on now."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
        except OSError:  # the file system refuses it
            return False
        return on
