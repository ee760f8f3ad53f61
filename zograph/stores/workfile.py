"""One sparse file of page-aligned extents, with direct I/O where the file system allows it."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from pathlib import Path

import torch

from zograph.errors import StoreError
from zograph.stores.base import PAGE, page_aligned
from zograph.stores.files import bytes_of, failure, read_range, write_range

FLUSH = 64 << 20
"""Bytes written through the page cache before they are flushed and dropped from it."""


class WorkFile:
    """Positional reads and writes of whole pages from page-aligned memory.

    Parameters
    ----------
    path
        The file.
    size
        Its size in bytes; space is taken as pages are written.
    create
        Make it, instead of opening one that is there.

    Raises
    ------
    StoreError
        If it cannot be opened or made, or is shorter than `size`.
    """

    def __init__(self, path: Path, size: int, *, create: bool) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._written = 0
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            self.direct, fd = _open(path, flags)
        except OSError as e:
            raise failure(e, f"work file {path} cannot be opened") from e
        self._fd = fd
        self._end = weakref.finalize(self, os.close, fd)
        try:
            if create:
                os.ftruncate(fd, size)
            found = os.fstat(fd).st_size
        except OSError as e:
            self.close()
            path.unlink(missing_ok=True)
            raise failure(e, f"work file {path} of {size} bytes cannot be made") from e
        if found != size:
            self.close()
            raise StoreError(
                f"work file {path} has {found} bytes and should have {size}: it was cut or belongs "
                f"to another model. Delete the folder, or name another one."
            )

    def read(self, offset: int, buffer: torch.Tensor) -> int:
        """Fill a buffer of whole pages; return its size in bytes.

        Raises
        ------
        StoreError
            If the file is short, or the disk fails.
        """
        view = self._pages(offset, buffer)
        read_range(self._fd, view, offset, str(self.path))
        if not self.direct:
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)
        return len(view)

    def write(self, offset: int, buffer: torch.Tensor) -> int:
        """Write a buffer of whole pages; return its size in bytes.

        Raises
        ------
        OSError
            As the operating system says it.
        """
        view = self._pages(offset, buffer)
        try:
            write_range(self._fd, view, offset)
        except OSError as e:
            if e.errno != errno.EINVAL or not self.direct:
                raise
            self._fall_back()
            write_range(self._fd, view, offset)
        if not self.direct:
            self._drop(len(view))
        return len(view)

    def sync(self) -> None:
        """Wait until everything written would survive a loss of power.

        Raises
        ------
        StoreError
            If the disk fails.
        """
        try:
            os.fdatasync(self._fd)
        except OSError as e:
            raise failure(e, f"{self.path} cannot be flushed") from e

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._end()

    def _pages(self, offset: int, buffer: torch.Tensor) -> memoryview:
        if not self._end.alive:
            raise StoreError(f"{self.path} was closed.")
        assert offset % PAGE == 0, offset
        assert buffer.numel() % PAGE == 0, buffer.numel()
        assert not buffer.numel() or buffer.data_ptr() % PAGE == 0, "buffer is not page-aligned"
        return bytes_of(buffer)

    def _fall_back(self) -> None:
        """Go on through the page cache: the file system refuses direct writes."""
        with self._lock:
            if self.direct:
                fd = os.open(self.path, os.O_RDWR)
                os.dup2(fd, self._fd)
                os.close(fd)
                self.direct = False

    def _drop(self, count: int) -> None:
        """Keep the page cache from filling with what was written."""
        with self._lock:
            self._written += count
            if self._written < FLUSH:
                return
            self._written = 0
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _open(path: Path, flags: int) -> tuple[bool, int]:
    try:
        return True, os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    return False, os.open(path, flags & ~os.O_EXCL, 0o644)


def page(data: bytes) -> torch.Tensor:
    """Return a page-aligned copy of one page."""
    buffer = page_aligned(len(data))
    buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return buffer
