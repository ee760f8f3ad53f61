"""Memory of the process that nothing uses any more goes back to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache


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


@cache
def _trim() -> Callable[[int], object]:
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found if found is not None else lambda _: None
