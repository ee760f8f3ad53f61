"""The host tier: the model's own tensors, where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch

from zograph.clipping import Clipped
from zograph.codec import encode
from zograph.ir import ParamInfo
from zograph.stores.base import Store, padded, page_aligned
from zograph.stores.pinned import PinnedSlab
from zograph.stores.source import as_stored

CHUNK = 1 << 30
"""Bytes registered at a time; a larger parameter is registered as a whole."""


class HostStore(Store):
    """The model's parameters in host memory. They are looked up at every access.

    Those with a format are not: they are encoded once, at the start, into memory beside the model.

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
    clipped
        Counts what formats cannot hold.

    Raises
    ------
    StoreError
        If the memory cannot be pinned.
    ModelError
        If a parameter with a format has NaNs.
    """

    tier: ClassVar[Literal["host", "disk"]] = "host"

    def __init__(
        self,
        tensors: Callable[[str], torch.Tensor],
        table: Mapping[str, ParamInfo],
        *,
        pinned: bool = False,
        cudart: Any = None,
        clipped: Clipped | None = None,
    ) -> None:
        self._tensors = tensors
        self._table = dict(table)
        self._steps = dict.fromkeys(table, 0)
        self._encoded: dict[str, torch.Tensor] = {}
        self._clipped = Clipped() if clipped is None else clipped
        self._pinned: PinnedSlab | None = None
        if pinned:
            self._pinned = self._pin(cudart)
        for info in table.values():
            if info.format is not None and not pinned:
                device = self._given(info).device
                where = torch.empty(info.stored_bytes, dtype=torch.uint8, device=device)
                self._encode(info, where)

    def tensor(self, name: str) -> torch.Tensor:
        info, encoded = self._table[name], self._encoded.get(name)
        return self._given(info) if encoded is None else encoded

    def read(self, name: str, buffer: torch.Tensor) -> int:
        info = self._table[name]
        as_stored(info, buffer).copy_(self.tensor(name))
        return info.stored_bytes

    def read_rows(self, name: str, rows: torch.Tensor, out: torch.Tensor) -> int:
        torch.index_select(self.tensor(name), 0, rows, out=out)
        return out.nbytes

    def write(self, name: str, buffer: torch.Tensor, step: int, lineage: int = 0) -> int:
        info = self._table[name]
        self.tensor(name).copy_(as_stored(info, buffer))
        self._steps[name] = step
        return info.stored_bytes

    def fold_steps(self) -> Mapping[str, int]:
        return dict(self._steps)

    def close(self) -> None:
        if self._pinned is not None:
            self._pinned.close()

    def _given(self, info: ParamInfo) -> torch.Tensor:
        """Return what the model holds of an entry."""
        return info.view(self._tensors(info.parameter).detach())

    def _encode(self, info: ParamInfo, place: torch.Tensor) -> None:
        """Store a parameter's first value in its format."""
        assert info.format is not None
        weight = self._given(info).contiguous()
        self._clipped.add(info.name, encode(weight, info.format, place))
        self._encoded[info.name] = place

    def _pin(self, cudart: Any) -> PinnedSlab:
        """Move one parameter after the other into a slab, then pin it.

        In this order the model and the slab are never both in memory as a whole.
        """
        parts: dict[str, list[ParamInfo]] = {}
        for info in self._table.values():
            parts.setdefault(info.parameter, []).append(info)
        sizes = [self._tensors(n).nbytes if i[0].format is None else 0 for n, i in parts.items()]
        sizes += [info.stored_bytes for info in self._table.values() if info.format is not None]
        slab = page_aligned(sum(map(padded, sizes)))
        start, ranges = 0, [0]
        for name, infos in parts.items():
            parameter = self._tensors(name)
            if infos[0].format is None:
                place = slab[start : start + parameter.nbytes].view(parameter.dtype)
                place = place.view(parameter.shape)
                place.copy_(parameter.detach())
                parameter.data = place
                start += padded(parameter.nbytes)
            for info in infos if infos[0].format is not None else ():
                self._encode(info, as_stored(info, slab[start:]))
                start += padded(info.stored_bytes)
            if start - ranges[-1] >= CHUNK:
                ranges.append(start)
        cuts = [*ranges, slab.numel()]
        pieces = [slab[a:b] for a, b in pairwise(cuts) if b > a]
        return PinnedSlab(pieces, cudart)
