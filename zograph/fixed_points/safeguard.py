"""When Anderson mixing steps back to forward iteration, sample by sample.

All tensors here are [B]. Residuals are norms of ``f(z) - z``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Safeguard:
    """Judges every evaluation of a sample.

    A sample's *anchor* is the iterate with the smallest residual since its last forward step. A
    mixed iterate must beat it, and `window` mixed iterates together must gain as much as the last
    forward step did alone. Otherwise the sample restarts: it takes a forward step from its anchor.
    A restart that finds no smaller residual than the one before takes twice as many forward
    steps as that one did before it mixes again, another half as many: mixing may be caught where
    the residual is smallest nearby, forward iteration is not.

    Attributes
    ----------
    anchor : Tensor
        int64[B]: the anchor's slot, -1 before the first evaluation.
    """

    def __init__(self, batch: int, device: torch.device, window: int) -> None:
        self._window = window
        self.anchor = torch.full((batch,), -1, device=device)
        self._least = torch.full((batch,), math.inf, dtype=torch.float64, device=device)
        self._gain = torch.ones_like(self._least)  # what the last forward step left of a residual
        self._mark = self._least.clone()  # where the count of idle evaluations began
        self._lowest = self._least.clone()  # of all evaluations
        self._before = self._least.clone()  # the lowest at the last restart
        self._idle = torch.zeros(batch, dtype=torch.int64, device=device)
        self._burst = torch.ones_like(self._idle)  # forward steps of the last restart
        self._left = torch.zeros_like(self._idle)  # of them, still to take
        self._forward = torch.ones(batch, dtype=torch.bool, device=device)

    def judge(self, slot: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Take the evaluation in `slot` in.

        Returns
        -------
        restart : Tensor
            bool[B]: samples that go back to their anchor.
        stalled : Tensor
            bool[B]: those of them that have gained nothing since the restart before.
        """
        better = self._forward | (residual < self._least)
        gain = (residual / self._least).clamp(max=1.0)
        self._gain = torch.where(self._forward, gain, self._gain)
        self.anchor = torch.where(better, slot, self.anchor)
        self._least = torch.where(better, residual, self._least)
        self._lowest = torch.minimum(self._lowest, residual)
        ahead = self._forward | (residual <= self._gain * self._mark)
        self._mark = torch.where(ahead, residual, self._mark)
        self._idle = torch.where(ahead, 0, self._idle + 1)
        restart = ~better | (self._idle >= self._window)
        stalled = restart & (self._lowest >= self._before)
        self._before = torch.where(restart, self._lowest, self._before)
        longer = torch.where(stalled, 2 * self._burst, (self._burst // 2).clamp(min=1))
        self._burst = torch.where(restart, longer, self._burst)
        self._left = torch.where(restart, self._burst, self._left - 1).clamp(min=0)
        return restart, stalled

    def step(self, sound: Tensor) -> Tensor:
        """Return which samples take a forward step next: also those whose mixing is not sound."""
        self._forward = (self._left > 0) | ~sound
        return self._forward
