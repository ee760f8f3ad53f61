"""The host tier: the model's own tensors, where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch

from zograph.ir import ParamInfo
from zograph.stores.base import Store, padded, page_aligned
from zograph.stores.pinned import PinnedSlab
from zograph.stores.source import as_tensor

CHUNK = 1 << 30
"""Bytes registered at a time; a larger parameter is registered as a whole."""


class HostStore(Store):
    """The model's parameters in host memory. They are looked up at every access.

    Parameters
    ----------
    tensors
        Gives a parameter by its name in the model.
    table
        The model's parameters, in its order; some in pieces.
    pinned
        Move the parameters into one slab of pinned memory of exactly their size (each rounded
        up to whole pages), for copies to a GPU that run beside its work.
    cudart
        The CUDA runtime to pin with, by default torch's.

    Raises
    ------
    StoreError
        If the memory cannot be pinned.
    """

    tier: ClassVar[Literal["host", "disk"]] = "host"

    def __init__(
        self,
        tensors: Callable[[str], torch.Tensor],
        table: Mapping[str, ParamInfo],
        *,
        pinned: bool = False,
        cudart: Any = None,
    ) -> None:
        self._tensors = tensors
        self._table = dict(table)
        self._steps = dict.fromkeys(table, 0)
        self._pinned: PinnedSlab | None = None
        if pinned:
            self._pinned = self._pin(cudart)

    def tensor(self, name: str) -> torch.Tensor:
        info = self._table[name]
        return info.view(self._tensors(info.parameter).detach())

    def read(self, name: str, buffer: torch.Tensor) -> int:
        info = self._table[name]
        as_tensor(info, buffer).copy_(self.tensor(name))
        return info.bytes

    def read_rows(self, name: str, rows: torch.Tensor, out: torch.Tensor) -> int:
        torch.index_select(self.tensor(name), 0, rows, out=out)
        return out.nbytes

    def write(self, name: str, buffer: torch.Tensor, step: int, lineage: int = 0) -> int:
        info = self._table[name]
        self.tensor(name).copy_(as_tensor(info, buffer))
        self._steps[name] = step
        return info.bytes

    def fold_steps(self) -> Mapping[str, int]:
        return dict(self._steps)

    def close(self) -> None:
        if self._pinned is not None:
            self._pinned.close()

    def _pin(self, cudart: Any) -> PinnedSlab:
        """Move one parameter after the other into a slab, then pin it.

        In this order the model and the slab are never both in memory as a whole.
        """
        parameters = {i.parameter: self._tensors(i.parameter) for i in self._table.values()}
        slab = page_aligned(sum(padded(p.nbytes) for p in parameters.values()))
        start, ranges = 0, [0]
        for parameter in parameters.values():
            place = slab[start : start + parameter.nbytes].view(parameter.dtype)
            place = place.view(parameter.shape)
            place.copy_(parameter.detach())
            parameter.data = place
            start += padded(parameter.nbytes)
            if start - ranges[-1] >= CHUNK:
                ranges.append(start)
        cuts = [*ranges, slab.numel()]
        pieces = [slab[a:b] for a, b in pairwise(cuts) if b > a]
        return PinnedSlab(pieces, cudart)
