"""Recycled memory for op outputs.

Filling fresh memory costs page faults, ten times the filling itself.  The pool keeps a reference to
every storage it hands out; a storage whose only reference is the pool's is dead and is handed out
again.  A tensor, view, in-place reuse by Inductor or numpy array holds its own reference, so live
memory is never recycled whatever a consumer does with it.  Under a memory budget all of them come
from one region, of which each stage may use what its plan leaves.  CPU only: CUDA's caching
allocator does the same.
"""

from __future__ import annotations

import mmap
import threading
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from zograph.stores.base import LARGE, PAGE, padded, page_aligned, pages

__all__ = ["Pool", "pool"]

SMALL = 64 * 1024
"""Below this many bytes malloc recycles without page faults, and the pool stays out of the way."""


def size_of(nbytes: int) -> int:
    """Return the bytes that the pool takes for a tensor of so many."""
    return nbytes if nbytes < SMALL else padded(nbytes)


def fresh(nbytes: int) -> torch.UntypedStorage:
    """Return memory from the system, of huge pages where there is enough of it."""
    new = page_aligned(nbytes) if nbytes >= LARGE else torch.empty(nbytes, dtype=torch.uint8)
    return new.untyped_storage()


class _Slot:
    """One storage the pool owns."""

    __slots__ = ("nbytes", "storage", "used")

    def __init__(self, nbytes: int, storage: torch.UntypedStorage) -> None:
        self.nbytes, self.storage = nbytes, storage
        self.used = time.monotonic()

    def free(self) -> bool:
        return int(torch._C._storage_Use_Count(self.storage._cdata)) == 1


class _Region:
    """One stretch of memory; a storage starts at its first gap that is large enough."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = self.limit = nbytes
        self.touched = 0
        """Where memory ends that has been in use and was not given back."""
        self._memory = pages(nbytes)
        self._taken: list[tuple[int, _Slot]] = []  # by where they start

    def take(self, need: int) -> torch.UntypedStorage | None:
        """Return a storage that nothing else uses.

        None if no gap is large enough. Then the gaps go back to the system: something else will
        take as much.
        """
        gaps = self._gaps()
        for place, (start, end) in enumerate(gaps):
            if end - start >= need:
                storage = torch.frombuffer(
                    self._memory, dtype=torch.uint8, count=need, offset=start
                ).untyped_storage()
                self._taken.insert(place, (start, _Slot(need, storage)))
                self.touched = max(self.touched, start + need)
                return storage
        for gap in gaps:
            self._give_back(*gap)
        return None

    def shorten(self, limit: int) -> None:
        """Let it end there from now on, at the latest."""
        self.limit = min(limit // PAGE * PAGE, self.nbytes)
        *_, (start, _) = self._gaps()
        self._give_back(max(start, self.limit), self.touched)

    def _gaps(self) -> list[tuple[int, int]]:
        """List the gaps in order, with the last one up to the limit; some are empty."""
        self._taken = [(at, slot) for at, slot in self._taken if not slot.free()]
        starts = [0, *(at + slot.nbytes for at, slot in self._taken)]
        return list(zip(starts, [*(at for at, _ in self._taken), self.limit], strict=True))

    def _give_back(self, start: int, end: int) -> None:
        if start < min(end, self.touched):
            with suppress(AttributeError, OSError):  # where there is no such advice, it stays
                self._memory.madvise(mmap.MADV_DONTNEED, start, min(end, self.touched) - start)
            if end >= self.touched:
                self.touched = start


class Pool:
    """Storages by size; thread-safe.

    Parameters
    ----------
    idle_seconds : float
        Free storages not handed out for this long are given back to the system.
    """

    def __init__(self, *, idle_seconds: float = 10.0) -> None:
        self.idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._region: _Region | None = None
        self._slots: dict[int, list[_Slot]] = {}
        self._sizes: list[int] = []  # the keys of _slots, sorted
        self._bytes = 0
        self._ticks = 0

    @property
    def bytes(self) -> int:
        """Bytes the pool holds, in use or free."""
        return self._bytes + (self._region.touched if self._region else 0)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised, contiguous, 64-byte aligned CPU tensor.

        Parameters
        ----------
        shape : sequence of int
        dtype : torch.dtype

        Returns
        -------
        Tensor
            Its memory returns to the pool when nothing refers to it any more.
        """
        count = 1
        for size in shape:
            count *= size
        nbytes = count * dtype.itemsize
        if nbytes < SMALL:
            return torch.empty(shape, dtype=dtype)
        strides = [1] * len(shape)
        for d in range(len(shape) - 1, 0, -1):
            strides[d - 1] = strides[d] * shape[d]
        out = torch.empty(0, dtype=dtype)
        with self._lock:
            out.set_(self._storage(size_of(nbytes)), 0, tuple(shape), tuple(strides))
        return out

    def bound(self, nbytes: int | None) -> None:
        """Hold one region of at most so many bytes from now on, and nothing else.

        What does not fit into it is not the pool's. With None, the pool holds what comes.
        """
        with self._lock:
            if nbytes != (self._region.nbytes if self._region else None):
                self._clear()
                self._region = None if nbytes is None else _Region(nbytes)

    def shorten(self, nbytes: int) -> None:
        """Let the region hold at most so many bytes from now on; what is in use stays."""
        with self._lock:
            if self._region is not None:
                self._region.shorten(nbytes)

    def clear(self) -> None:
        """Give every free storage back; a region stays as it is."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        for slot in self._idle():
            self._remove(slot)

    def _storage(self, need: int) -> torch.UntypedStorage:
        if self._region is not None:
            return self._region.take(need) or fresh(need)
        slot = self._find(need) or self._make(need)
        slot.used = time.monotonic()
        self._ticks += 1
        if self._ticks % 256 == 0:
            self._drop_idle(slot.used - self.idle_seconds)
        return slot.storage

    def _find(self, need: int) -> _Slot | None:
        """The best free fit: the smallest size of at least `need`, at most twice that."""
        for i in range(bisect_left(self._sizes, need), len(self._sizes)):
            size = self._sizes[i]
            if size > 2 * need:
                return None
            for slot in self._slots[size]:
                if slot.free():
                    return slot
        return None

    def _make(self, need: int) -> _Slot:
        slot = _Slot(need, fresh(need))
        if need not in self._slots:
            self._slots[need] = []
            insort(self._sizes, need)
        self._slots[need].append(slot)
        self._bytes += need
        return slot

    def _remove(self, slot: _Slot) -> None:
        same = self._slots[slot.nbytes]
        same.remove(slot)
        if not same:
            del self._slots[slot.nbytes]
            self._sizes.remove(slot.nbytes)
        self._bytes -= slot.nbytes

    def _idle(self) -> list[_Slot]:
        return [slot for same in self._slots.values() for slot in same if slot.free()]

    def _drop_idle(self, before: float) -> None:
        for slot in self._idle():
            if slot.used < before:
                self._remove(slot)


pool = Pool()
"""The pool the ops use."""
