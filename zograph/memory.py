"""Memory of the process that nothing uses any more goes back to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal


def give_back(*, collect: bool = False) -> None:
    """Return free memory of the C allocator, which keeps some 50 MB for itself, to the system.

    Does nothing where the C library is not glibc.

    Parameters
    ----------
    collect
        Collect Python's garbage first.
    """
    if collect:
        gc.collect()
    _trim()(0)


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold Python's cyclic collector back while graphs are built, in the whole process.

    Each of its passes looks through every object there is, and a graph is many objects of which
    few are garbage.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


RETURNED = 1 << 20
"""Bytes from which on a freed block goes back to the system at once, under the tightest budgets."""
SHARE = 20
"""The allocator may keep blocks of a budget divided by this."""
TIGHT, ROOMY = 256 << 20, SHARE * (32 << 20)
"""Budgets in bytes: below the first, keeping a share saves no time; from the second on,
the 32 MiB that glibc may keep by itself are no more than a share."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_little(budget: int | Literal["minimum"] | None) -> None:
    """Let the C allocator return large blocks as soon as they are freed, if a budget is tight.

    glibc raises the size from which on it does so up to 32 MiB as a process frees larger blocks,
    and then keeps what is smaller: more than a budget below `ROOMY` has room for. Returning them
    costs page faults. Holds for the whole process from then on. Does nothing where the C library
    is not glibc.
    """
    if budget is None or (budget != "minimum" and budget >= ROOMY):
        return
    kept = RETURNED if budget == "minimum" or budget < TIGHT else budget // SHARE
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, kept)
        if kept > RETURNED:
            mallopt(M_TRIM_THRESHOLD, kept)


@cache
def _trim() -> Callable[[int], object]:
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found if found is not None else lambda _: None
