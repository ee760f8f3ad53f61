"""Making a log: a new file that appears whole or not at all, and stays."""

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


def place(path: Path, data: bytes) -> None:
    """Write a new file, whole or not at all.

    Raises
    ------
    StoreError
        If there is such a file already, or it cannot be written.
    """
    check_absent(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(name, path)
        finally:
            os.unlink(name)
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
