"""Making a log: a file that appears whole or not at all, and stays."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from zograph.errors import StoreError
from zograph.stores.files import failure


def check_absent(path: Path) -> None:
    """See that there is no such file.

    Raises
    ------
    StoreError
        If there is.
    """
    if path.exists():
        raise StoreError(
            errno.EEXIST,
            f"{path} is there already. Go on with it (zograph.resume), name another file, or "
            f"delete it.",
        )


def place(path: Path, data: bytes, *, over: bool = False) -> None:
    """Write a new file, whole or not at all.

    Parameters
    ----------
    over
        Whether it takes the place of one that is there.

    Raises
    ------
    StoreError
        If there is such a file already, unless `over`, or it cannot be written.
    """
    if not over:
        check_absent(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if over:
                os.rename(name, path)
            else:
                os.link(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as e:
        raise failure(e, f"the log {path} cannot be made") from e


def _sync_folder(folder: Path) -> None:
    """Make a new file's name survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # the file system has no such flush
            raise
    finally:
        os.close(fd)
