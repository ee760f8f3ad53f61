"""The folder that a run keeps its work file in: locked while in use, removed if nobody named it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from zograph.errors import StoreError
from zograph.stores.files import failure

LOCK = "lock"


class WorkFolder:
    """A folder in use by this run and no other. Made by `open_work_folder`.

    Attributes
    ----------
    path : Path
        The folder, absolute.
    kept : bool
        Whether the folder stays when the run ends.
    """

    def __init__(self, path: Path, kept: bool) -> None:
        self.path = path
        self.kept = kept
        self._lock = _lock(path)
        _OPEN.add(self)
        self._end = weakref.finalize(self, _end, self._lock, None if kept else path, os.getpid())

    @property
    def closed(self) -> bool:
        """Whether the folder was given back."""
        return not self._end.alive

    def close(self) -> None:
        """Release the lock, and remove the folder if it is not to be kept; twice is fine."""
        self._end()

    def _forget(self) -> None:
        """In a forked child: let go, so that the lock ends with the process that took it."""
        if self._end.detach():
            os.close(self._lock)


_OPEN: weakref.WeakSet[WorkFolder] = weakref.WeakSet()


def _forget_all() -> None:
    for folder in list(_OPEN):
        folder._forget()


os.register_at_fork(after_in_child=_forget_all)


def open_work_folder(folder: Path | None) -> WorkFolder:
    """Open the work folder of a run.

    Parameters
    ----------
    folder
        Made if missing, and kept. None: a fresh ``zograph-work-XXXXXX`` in the current
        directory, removed when the run closes it or ends.

    Raises
    ------
    StoreError
        If the folder cannot be made or written, or another run uses it.
    """
    try:
        if folder is None:
            return WorkFolder(Path(tempfile.mkdtemp(prefix="zograph-work-", dir=Path.cwd())), False)
        folder = folder.expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return WorkFolder(folder, True)
    except StoreError:
        raise
    except OSError as e:
        where = folder or Path.cwd()
        raise failure(e, f"no work folder can be made at {where}") from e


def _lock(path: Path) -> int:
    """Lock the folder. The lock ends with this process, however it ends."""
    fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise StoreError(
            e.errno,
            f"another run uses the work folder {path}. Wait until it has ended, or name another "
            f"folder.",
        ) from e
    return fd


def _end(lock: int, remove: Path | None, owner: int) -> None:
    if os.getpid() != owner:
        return
    if remove is not None:
        shutil.rmtree(remove, ignore_errors=True)
    os.close(lock)
