"""Positional reads and writes of whole ranges, and errors that say what failed."""

from __future__ import annotations

import errno
import os
from typing import Any

import torch

from zograph.errors import StoreError

MOST = 1 << 30
"""Bytes that one call moves at most; a multiple of every alignment."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_range(fd: int, view: memoryview, offset: int, where: str) -> None:
    """Fill `view` from `offset` on, through short reads.

    Raises
    ------
    StoreError
        If the file ends before, or the disk fails.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done : done + MOST]], offset + done)
        except OSError as e:
            raise failure(e, f"{where} cannot be read at byte {offset + done}") from e
        if count == 0:
            raise StoreError(
                errno.EIO,
                f"{where} ends at byte {offset + done}, before the {len(view)} bytes at {offset} "
                f"that it should hold: it was cut while in use. Restore the file.",
            )
        done += count


def write_range(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` from `offset` on, through short writes.

    Raises
    ------
    OSError
        As the operating system says it.
    """
    done = 0
    while done < len(view):
        count = os.pwritev(fd, [view[done : done + MOST]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count


ADVICE = {
    errno.ENOSPC: "Make space on the disk and run the step again.",
    errno.EDQUOT: "Make space within the disk quota and run the step again.",
    errno.EFBIG: "The file system or `ulimit -f` forbids files of this size: use another folder.",
    errno.EROFS: "The file system is read-only: use another folder.",
    errno.EACCES: "Give this user the right to, or use another folder.",
    errno.EPERM: "Give this user the right to, or use another folder.",
    errno.EIO: "The disk may be failing: see the system's log (dmesg), then run again.",
    errno.ENOENT: "Do not move or delete it while it is in use.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
}


def failure(error: OSError, what: str) -> StoreError:
    """Turn an operating system's error into one that says what to do; the errno is kept."""
    code = error.errno if error.errno is not None else errno.EIO
    advice = ADVICE.get(code, "Mend this and run again.")
    return StoreError(code, f"{what}: {os.strerror(code)}. {advice}")
