"""A lock on a file that ends with the process that took it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from pathlib import Path

from zograph.errors import StoreError


class FileLock:
    """An exclusive lock, held from the start. Children that are forked do not keep it alive.

    Parameters
    ----------
    path
        The file; made if missing.
    refusal
        What to say where another process has the lock.

    Raises
    ------
    StoreError
        If another process has it.
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: Path, refusal: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._fd)
            if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise StoreError(e.errno, refusal) from e
        _HELD.add(self)
        self._end = weakref.finalize(self, os.close, self._fd)

    def release(self) -> None:
        """Let go; twice is fine."""
        self._end()


_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    """In a forked child: close what holds the parent's locks."""
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_forget_all)
