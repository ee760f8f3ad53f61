"""The window: past values f(z) and residuals f(z) - z, each stored once and read twice.

One row a sample and slot. Which slot a sample writes is its own affair (see
:mod:`zograph.fixed_points.ring`), so the window is a ring for each sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zograph.fixed_points.state import State, rows, wide


class History:
    """Values and residuals of a state of several tensors.

    Memory: ``2 slots`` states, and one row of each tensor that is never read.

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
        self.slots, self.like = slots, like
        flat = rows(like)
        batch = flat[0].shape[0]

        def room(x: Tensor, dtype: torch.dtype) -> Tensor:
            # The last row takes what must not be kept: no mask, no host. It is never read.
            return torch.zeros(batch * slots + 1, x.shape[1], dtype=dtype, device=x.device)

        self._values = [room(x, wide(x.dtype)) for x in flat]
        self._residuals = [room(x, dtype or wide(x.dtype)) for x in flat]
        self._first = torch.arange(batch, device=flat[0].device) * slots

    def store(self, slot: Tensor, keep: Tensor, value: State, residual: State) -> None:
        """Write each sample's f(z) and f(z) - z into its slot, where `keep` holds.

        Parameters
        ----------
        slot : Tensor
            int64[B].
        keep : Tensor
            bool[B].
        value, residual : tuple of Tensor
            One row a sample.
        """
        trash = len(self._first) * self.slots
        where = torch.where(keep, self._first + slot, trash)
        for room, x in zip(self._values + self._residuals, value + residual, strict=True):
            room.index_copy_(0, where, x.to(room.dtype))

    def products(self, residual: State) -> Tensor:
        """Return the products of the residuals in all slots with this one, float64[B, slots]."""
        parts = [
            _dots(self._window(room), x).double()
            for room, x in zip(self._residuals, residual, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    def mix(self, weights: Tensor, damping: float) -> State:
        """Return the sum over slots of weight times ``f(z) + damping (f(z) - z)``, a new state.

        Parameters
        ----------
        weights : Tensor
            float64[B, slots].
        damping : float
            ``beta - 1``; -1 gives z itself.
        """
        mixed = []
        for values, residuals, x in zip(self._values, self._residuals, self.like, strict=True):
            row = weights.to(values.dtype).unsqueeze(1)
            total = torch.bmm(row, self._window(values))
            if damping:
                past = self._window(residuals).to(values.dtype)
                total = torch.baddbmm(total, row, past, alpha=damping)
            mixed.append(total.view(x.shape).to(x.dtype))
        return tuple(mixed)

    def _window(self, room: Tensor) -> Tensor:
        """View the rows of all samples, [B, slots, row]."""
        return room[:-1].view(len(self._first), self.slots, room.shape[1])


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
