"""What a store is: where weights live when they are not on the device.

A store holds the newest folded value of every parameter of a model under the parameter's first
name. It knows nothing of stages, budgets or schedules, so that any plan can run on it.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar, Literal

import torch

PAGE = 4096
"""Alignment in bytes of buffers that stores fill and of extents in a work file."""
LARGE = 4 << 20
"""Bytes from which on a buffer is worth huge pages, commonly of 2 MiB."""


def padded(nbytes: int) -> int:
    """Round a size up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def pages(nbytes: int) -> mmap.mmap:
    """Return memory that is taken as it is first touched.

    It is given back when nothing views it any more. Large ones are of huge pages where
    the system has them: fewer faults, and less work for direct I/O, which holds every page.
    """
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= LARGE:
        with suppress(AttributeError, OSError):  # not Linux, or built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def page_aligned(nbytes: int) -> torch.Tensor:
    """Return a uint8 buffer that starts on a page; see :func:`pages`."""
    return torch.frombuffer(pages(nbytes), dtype=torch.uint8)[:nbytes]


class Store(ABC):
    """The newest value of every parameter, by first name.

    `read` and `write` of different parameters may run at the same time on different threads;
    of one parameter they never do. Buffers are 1-dim uint8 tensors in host memory, page-aligned,
    of ``padded(parameter's stored bytes)`` bytes; the padding holds anything. What a parameter with
    a format has there are the bytes that :func:`zograph.codec.encode` made.
    """

    tier: ClassVar[Literal["host", "disk"]]
    """``host`` or ``disk``."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor | None:
        """Return the stored tensor itself where it is in host memory, else None.

        Of a parameter with a format: its stored bytes, uint8 [stored bytes].
        """

    @abstractmethod
    def read(self, name: str, buffer: torch.Tensor) -> int:
        """Fill `buffer` with the parameter's newest value; return the bytes read from the tier.

        Raises
        ------
        StoreError
            If the data is missing, short or damaged, or the tier fails.
        """

    @abstractmethod
    def read_rows(self, name: str, rows: torch.Tensor, out: torch.Tensor) -> int:
        """Fill `out` with rows of a parameter; return the bytes read from the tier.

        Parameters
        ----------
        rows
            int64 or int32 [n], in host memory, within the parameter's first dimension.
        out
            [n, ...], of the parameter's dtype, contiguous.

        Raises
        ------
        StoreError
            As `read` does.
        """

    @abstractmethod
    def write(self, name: str, buffer: torch.Tensor, step: int, lineage: int = 0) -> int:
        """Make `buffer` the parameter's value, with every update before `step` in it.

        Parameters
        ----------
        lineage
            64 bits that stand for these updates; kept with the value where it outlives the run.

        Returns the bytes written to the tier. Until it returns, the old value stays the stored
        one, also through a kill.

        Raises
        ------
        StoreError
            If the tier is full, read-only or fails; the old value is still there.
        """

    @abstractmethod
    def fold_steps(self) -> Mapping[str, int]:
        """For each parameter, the number of steps whose updates are in the stored value."""

    @abstractmethod
    def close(self) -> None:
        """Give back files, locks and memory; calling it twice is fine."""
