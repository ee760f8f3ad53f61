"""The folder that a run keeps its work file in: locked while in use, removed if nobody named it."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from zograph.errors import StoreError
from zograph.stores.files import failure
from zograph.stores.lock import FileLock

LOCK = "lock"
WORK = ".work"


def work_folder(log: Path) -> Path:
    """Return the work folder of a run with this log whose weights live on the disk."""
    return log.with_name(log.name + WORK)


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
        lock = FileLock(
            path / LOCK,
            f"another run uses the work folder {path}. Wait until it has ended, or name another "
            f"folder.",
        )
        self._end = weakref.finalize(self, _end, lock, None if kept else path, os.getpid())

    @property
    def closed(self) -> bool:
        """Whether the folder was given back."""
        return not self._end.alive

    def close(self) -> None:
        """Release the lock, and remove the folder if it is not to be kept; twice is fine."""
        self._end()


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


def _end(lock: FileLock, remove: Path | None, owner: int) -> None:
    if os.getpid() != owner:
        return
    if remove is not None:
        shutil.rmtree(remove, ignore_errors=True)
    lock.release()
