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
"""Bytes from which on a freed block goes back to the system at once, under a tight budget."""
TIGHT = 640 << 20
"""Budget in bytes of which the 32 MiB that glibc may keep are a twentieth."""
M_MMAP_THRESHOLD = -3


def keep_little(budget: int | Literal["minimum"] | None) -> None:
    """Let the C allocator return large blocks as soon as they are freed, if a budget is tight.

    glibc raises the size from which on it does so up to 32 MiB as a process frees larger blocks,
    and then keeps what is smaller: more than a budget below `TIGHT` has room for. Returning them
    costs page faults. Holds for the whole process from then on. Does nothing where the C library
    is not glibc.
    """
    if budget == "minimum" or (budget is not None and budget < TIGHT):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, RETURNED)


@cache
def _trim() -> Callable[[int], object]:
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found if found is not None else lambda _: None
