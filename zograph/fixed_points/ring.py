"""Small numbers of Anderson mixing, sample by sample: slots, Gram matrix, coefficients.

All tensors here are [B], [B, slots] or [B, slots, slots]; nothing is of the state's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zograph.fixed_points.options import SolveOptions
from zograph.fixed_points.safeguard import Safeguard

LARGEST = 1e6
"""Coefficients whose absolute values sum to more are taken for a singular system."""


def slots_of(options: SolveOptions) -> int:
    """Return how many past iterates a solve keeps."""
    return max(options.window, 3)  # one to write beside the anchor and the best


class Ring:
    """Where each sample's past iterates are, and how they are mixed.

    The slots of the best iterate and of the safeguard's anchor are never written over.
    """

    def __init__(self, batch: int, device: torch.device, options: SolveOptions) -> None:
        self.window, self.ridge = options.window, options.ridge
        self.slots = slots_of(options)
        self._range = torch.arange(self.slots, device=device)
        self._empty = (self._range - 10**6).expand(batch, -1)  # older than any window
        self._written = self._empty.clone()
        self._gram = torch.zeros(batch, self.slots, self.slots, dtype=torch.float64, device=device)
        self.best = torch.full((batch,), -1, device=device)
        self._safeguard = Safeguard(batch, device, options.window)

    def next_slot(self) -> Tensor:
        """Return the slot that each sample writes next: its oldest that is not held, int64[B]."""
        held = self._at(self.best) | self._at(self._safeguard.anchor)
        return torch.where(held, 2**62, self._written).argmin(dim=1)

    def record(self, k: int, slot: Tensor, active: Tensor, improved: Tensor, row: Tensor) -> None:
        """Note that iteration `k` is in `slot`, with its row of the Gram matrix, float64[B, S]."""
        at = self._at(slot) & active.unsqueeze(1)
        self._written = torch.where(at, k, self._written)
        self._gram = torch.where(at.unsqueeze(2), row.unsqueeze(1), self._gram)
        self._gram = torch.where(at.unsqueeze(1), row.unsqueeze(2), self._gram)
        self.best = torch.where(improved, slot, self.best)

    def weights(self, k: int, slot: Tensor, active: Tensor, residual: Tensor) -> Tensor:
        """Return the coefficients of the next iterate, float64[B, slots]; each row sums to 1.

        Parameters
        ----------
        residual : Tensor
            float64[B]: the norms of f(z) - z at iteration `k`.
        """
        restart, stalled = self._safeguard.judge(slot, residual)
        single = torch.where(restart, self._safeguard.anchor, slot)
        kept = self._at(single) & ~stalled.unsqueeze(1)
        dropped = torch.where(kept, k, self._empty)
        self._written = torch.where(restart.unsqueeze(1), dropped, self._written)
        solved, sound = self._solve(k)
        forward = self._safeguard.step(sound) | ~active
        alone = self._at(torch.where(active, single, self.best.clamp(min=0))).double()
        return torch.where(forward.unsqueeze(1), alone, solved)

    def best_alone(self) -> Tensor:
        """Return coefficients that pick the best iterate, float64[B, slots]."""
        return self._at(self.best.clamp(min=0)).double()

    def _at(self, slot: Tensor) -> Tensor:
        """Return a mask of one slot a sample (none if it is -1), bool[B, slots]."""
        return self._range == slot.unsqueeze(1)

    def _solve(self, k: int) -> tuple[Tensor, Tensor]:
        """Minimise the norm of the mixed residual; return coefficients, and whether to trust them.

        The residuals are scaled to length 1, ``H = D^-1/2 G D^-1/2``, so that the ridge weighs
        alike on all of them, then ``(H + ridge I) u = D^-1/2 1`` and ``weights ~ D^-1/2 u``.
        """
        usable = self._written > k - self.window
        size = self._gram.diagonal(dim1=1, dim2=2)
        scale = torch.where(usable & (size > 0), size.rsqrt(), 0.0)
        both = usable.unsqueeze(1) & usable.unsqueeze(2)  # other slots may hold anything
        scaled = torch.where(both, self._gram * scale.unsqueeze(1) * scale.unsqueeze(2), 0.0)
        diagonal = torch.where(usable, self.ridge, 1.0)
        weights = solve(scaled + torch.diag_embed(diagonal), scale) * scale
        weights = weights / weights.sum(dim=1, keepdim=True)
        sound = weights.abs().sum(dim=1) <= LARGEST  # False for NaN
        return weights, sound & (usable.sum(dim=1) > 1)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve positive definite systems, float64[B, S, S] and [B, S]; not finite if singular.

    Gauss-Jordan without pivots, S small steps of all systems at once: a library would start
    threads for them.
    """
    rows = torch.cat([matrix, right.unsqueeze(2)], dim=2)
    for i in range(matrix.shape[1]):
        row = rows[:, i] / rows[:, i, i : i + 1]
        rows = rows - rows[:, :, i : i + 1] * row.unsqueeze(1)
        rows[:, i] = row
    return rows[:, :, -1]
