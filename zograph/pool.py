"""Recycled memory for op outputs.

Filling fresh memory costs page faults, ten times the filling itself.  The pool keeps a reference to
every storage it hands out; a storage whose only reference is the pool's is dead and is handed out
again.  A tensor, view, in-place reuse by Inductor or numpy array holds its own reference, so live
memory is never recycled whatever a consumer does with it.  CPU only: CUDA's caching allocator does
the same.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Pool", "pool"]

PAGE = 4096
SMALL = 64 * 1024
"""Below this many bytes malloc recycles without page faults, and the pool stays out of the way."""


class _Slot:
    """One storage the pool owns."""

    __slots__ = ("nbytes", "storage", "used")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        # torch's CPU allocator aligns to 64 bytes.
        self.storage = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        self.used = time.monotonic()

    def free(self) -> bool:
        return int(torch._C._storage_Use_Count(self.storage._cdata)) == 1


class Pool:
    """Storages by size; thread-safe.

    Parameters
    ----------
    idle_seconds : float
        Free storages not handed out for this long are given back to the system.
    limit : int, optional
        The most bytes that the pool holds.  Free storages are given back before a new one would
        exceed it, the longest idle first; memory that exceeds it all the same is not the pool's.
    """

    def __init__(self, *, idle_seconds: float = 10.0, limit: int | None = None) -> None:
        self.idle_seconds = idle_seconds
        self.limit = limit
        self._lock = threading.Lock()
        self._slots: dict[int, list[_Slot]] = {}
        self._sizes: list[int] = []  # the keys of _slots, sorted
        self._bytes = 0
        self._peak = 0
        self._ticks = 0

    @property
    def bytes(self) -> int:
        """Bytes the pool holds, in use or free."""
        return self._bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes the pool ever held."""
        return self._peak

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
        need = -(-nbytes // PAGE) * PAGE
        if nbytes < SMALL:
            return torch.empty(shape, dtype=dtype)
        strides = [1] * len(shape)
        for d in range(len(shape) - 1, 0, -1):
            strides[d - 1] = strides[d] * shape[d]
        out = torch.empty(0, dtype=dtype)
        with self._lock:
            slot = self._find(need) or self._make(need)
            if slot is None:
                return torch.empty(shape, dtype=dtype)
            slot.used = time.monotonic()
            out.set_(slot.storage, 0, tuple(shape), tuple(strides))
            self._ticks += 1
            if self._ticks % 256 == 0:
                self._drop_idle(slot.used - self.idle_seconds)
        return out

    def bound(self, limit: int | None) -> None:
        """Set `limit`, and give free storages back until it is kept."""
        with self._lock:
            self.limit = limit
            if limit is not None:
                self._evict(limit)

    def trim(self, nbytes: int = 0) -> None:
        """Give free storages back, the longest idle first, until at most `nbytes` are held."""
        with self._lock:
            self._evict(nbytes)

    def clear(self) -> None:
        """Give every free storage back."""
        self.trim(0)

    def _find(self, need: int) -> _Slot | None:
        """The best free fit: the smallest size of at least `need`, at most twice that.

        Under a limit no larger one will do: what a plan counts on is what it gets.
        """
        most = 2 * need if self.limit is None else need
        for i in range(bisect_left(self._sizes, need), len(self._sizes)):
            size = self._sizes[i]
            if size > most:
                return None
            for slot in self._slots[size]:
                if slot.free():
                    return slot
        return None

    def _make(self, need: int) -> _Slot | None:
        """Make a storage; None if the limit leaves no room to keep it."""
        if self.limit is not None and self._bytes + need > self.limit:
            self._evict(max(0, self.limit - need))
            if self._bytes + need > self.limit:
                return None
        slot = _Slot(need)
        if need not in self._slots:
            self._slots[need] = []
            insort(self._sizes, need)
        self._slots[need].append(slot)
        self._bytes += need
        self._peak = max(self._peak, self._bytes)
        return slot

    def _remove(self, slot: _Slot) -> None:
        same = self._slots[slot.nbytes]
        same.remove(slot)
        if not same:
            del self._slots[slot.nbytes]
            self._sizes.remove(slot.nbytes)
        self._bytes -= slot.nbytes

    def _idle(self) -> list[_Slot]:
        free = [slot for same in self._slots.values() for slot in same if slot.free()]
        return sorted(free, key=lambda slot: slot.used)

    def _evict(self, nbytes: int) -> None:
        for slot in self._idle():
            if self._bytes <= nbytes:
                return
            self._remove(slot)

    def _drop_idle(self, before: float) -> None:
        for slot in self._idle():
            if slot.used < before:
                self._remove(slot)


pool = Pool()
"""The pool the ops use."""
