"""What a solve tells the host: read at once on a CPU, one iteration late on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Flag:
    """A few integers that the host reads after each iteration.

    On a GPU they are copied to pinned memory behind the iteration's kernels, and the host looks
    at those of the iteration before: it waits for an event that the device has left behind while
    the next iteration is queued already, so that the device never idles.

    Parameters
    ----------
    late : bool
        Whether to read one iteration late.
    count : int
        How many integers.
    cuda
        The module that makes events: ``torch.cuda``.
    """

    def __init__(self, late: bool, count: int, cuda: Any = torch.cuda) -> None:
        self._late, self._cuda, self._sent = late, cuda, 0
        if late:
            pinned = torch.cuda.is_available()
            self._host = torch.empty(2, count, dtype=torch.int64, pin_memory=pinned)
            self._events = [cuda.Event(), cuda.Event()]
        else:
            self._host = torch.empty(1, count, dtype=torch.int64)

    def send(self, values: Tensor) -> list[int] | None:
        """Take int64[count] of this iteration in; return the newest that can be had, if any."""
        if not self._late:
            self._host[0] = values
            return self.newest()
        at = self._sent % 2
        self._host[at].copy_(values, non_blocking=True)
        self._events[at].record(self._cuda.current_stream(values.device))
        self._sent += 1
        return None if self._sent == 1 else self._read(1 - at)

    def newest(self) -> list[int]:
        """Return what was sent last; on a GPU, wait for it."""
        return self._read((self._sent - 1) % 2 if self._late else 0)

    def _read(self, at: int) -> list[int]:
        if self._late:
            self._events[at].synchronize()
        return [int(x) for x in self._host[at].tolist()]
