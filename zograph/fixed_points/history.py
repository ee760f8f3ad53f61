"""The window: past values f(z) and residuals f(z) - z, each stored once and read once.

One row a sample and slot. Which slot a sample writes is its own affair (see
:mod:`zograph.fixed_points.ring`), so the window is a ring for each sample. Kernels read everything
once (:func:`zograph.kernels.engine.mixing_for`); what they do not know is left to a few operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zograph.fixed_points.state import State, minus, rows, square, wide
from zograph.kernels.engine import mixing_for
from zograph.pool import pool


@dataclass(frozen=True)
class Seen:
    """What an iteration's f(z) and z have told.

    Attributes
    ----------
    products : Tensor
        float64[B, slots]: the residual times those in all slots, its own among them.
    residual, value : Tensor
        float64[B]: the norms of f(z) - z and of f(z).
    """

    products: Tensor
    residual: Tensor
    value: Tensor


class History:
    """Values and residuals of a state of several tensors.

    Memory: ``2 slots`` states.

    Parameters
    ----------
    like : tuple of Tensor
        The state.
    slots : int
        How many past iterates are kept.
    dtype : torch.dtype, optional
        Of the residuals.
    """

    def __init__(self, like: State, slots: int, dtype: torch.dtype | None) -> None:
        self._parts = [_Part(x, slots, dtype or wide(x.dtype)) for x in like]

    def observe(self, slot: Tensor, active: Tensor, value: State, z: State) -> Seen:
        """Store each active sample's f(z) and f(z) - z in its slot, and compare with the others.

        Parameters
        ----------
        slot : Tensor
            int64[B].
        active : Tensor
            bool[B]; what is seen of other samples has no meaning.
        """
        triples = zip(self._parts, rows(value), rows(z), strict=True)
        sums = torch.stack([part.observe(slot, active, a, b) for part, a, b in triples]).sum(dim=0)
        return Seen(sums[:, :-2], sums[:, -2].sqrt(), sums[:, -1].sqrt())

    def mix(self, weights: Tensor, damping: float) -> State:
        """Return the sum over slots of weight times ``f(z) + damping (f(z) - z)``, a new state.

        A slot of weight 0 has no part in it, whatever it holds.

        Parameters
        ----------
        weights : Tensor
            float64[B, slots].
        damping : float
            ``beta - 1``; -1 gives z itself.
        """
        return tuple(part.mix(weights, damping) for part in self._parts)


class _Part:
    """The window of one tensor of the state."""

    def __init__(self, like: Tensor, slots: int, dtype: torch.dtype) -> None:
        self._like, self._slots = like, slots
        self._batch, self._width = like.shape[0], math.prod(like.shape[1:])
        self._kernels = mixing_for(like, dtype)
        self._values, self._residuals = (self._room(kind) for kind in (wide(like.dtype), dtype))
        self._first = torch.arange(self._batch, device=like.device) * slots

    def observe(self, slot: Tensor, active: Tensor, value: Tensor, z: Tensor) -> Tensor:
        """Store a row; return the products, then the squares of f(z) - z and f(z)."""
        past = self._window(self._residuals)
        if self._kernels is not None:
            pair = value.contiguous(), z.contiguous()
            return self._kernels.observe(*pair, self._window(self._values), past, slot, active)
        residual = minus(value, z)
        own = torch.stack([square(residual), square(value)], dim=1)
        keep = active & own.isfinite().all(dim=1)
        # The last row takes what must not be kept, without a mask or the host. It is never read.
        where = torch.where(keep, self._first + slot, self._batch * self._slots)
        for room, x in ((self._values, value), (self._residuals, residual)):
            room.index_copy_(0, where, x.to(room.dtype))
        return torch.cat([_dots(past, residual).double(), own], dim=1)

    def mix(self, weights: Tensor, damping: float) -> Tensor:
        """Return the mixture of the rows, shaped like the state."""
        values, residuals = self._window(self._values), self._window(self._residuals)
        if self._kernels is not None:
            out = self._fresh(self._like.shape, self._like.dtype)
            self._kernels.mix(weights.contiguous(), damping, values, residuals, out)
            return out
        row = weights.to(values.dtype).unsqueeze(1)
        total = torch.bmm(row, values)
        if damping:
            total = torch.baddbmm(total, row, residuals.to(values.dtype), alpha=damping)
        return total.view(self._like.shape).to(self._like.dtype)

    def _room(self, dtype: torch.dtype) -> Tensor:
        shape = (self._batch * self._slots + 1, self._width)
        if self._kernels is not None:
            return self._fresh(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self._like.device)

    def _fresh(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._like.is_cpu:
            return pool.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self._like.device)

    def _window(self, room: Tensor) -> Tensor:
        """View the rows of all samples, [B, slots, row]."""
        return room[:-1].view(self._batch, self._slots, self._width)


def _dots(past: Tensor, new: Tensor) -> Tensor:
    """Multiply [B, S, D] by [B, D] to [B, S], summing narrow numbers in float32."""
    row = new.to(past.dtype).unsqueeze(1)
    if past.dtype == wide(past.dtype):
        return torch.bmm(row, past.transpose(1, 2)).squeeze(1)
    if past.device.type == "cuda":
        out = torch.bmm(row, past.transpose(1, 2), out_dtype=torch.float32)
        return out.squeeze(1)
    wide_row = row.float()
    slots = [torch.bmm(wide_row, past[:, s : s + 1].float().mT) for s in range(past.shape[1])]
    return torch.cat(slots, dim=2).squeeze(1)
