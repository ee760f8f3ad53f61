"""A plain eager MeZO step with zograph's noise: the reference of the numerics contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import zograph


class Reference:
    """Steps a model of its own, in place, one parameter at a time."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., torch.Tensor] | None,
        *,
        eps: float = 1e-3,
        distribution: Any = "normal",
    ) -> None:
        self.model = model.eval()
        self.loss_fn = loss_fn
        self.eps = eps
        self.distribution = distribution
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def noise(self, name: str, seed: int) -> torch.Tensor:
        shape = tuple(self.trainable[name].shape)
        z = zograph.noise(name, shape, seed, distribution=self.distribution)
        return z.to(self.trainable[name].device)

    @torch.no_grad()
    def loss(self, batch: Mapping[str, Any]) -> float:
        if self.loss_fn is not None:
            return float(self.loss_fn(self.model, **batch))
        return float(self.model(**batch).loss)

    @torch.no_grad()
    def losses(self, batch: Mapping[str, Any], seed: int) -> tuple[float, float]:
        """Return the losses at w + eps z and w - eps z; the weights are restored exactly."""
        saved = {n: p.clone() for n, p in self.trainable.items()}
        found = []
        for sign in (1, -1):
            for n, p in self.trainable.items():
                step = (torch.tensor(self.eps) * self.noise(n, seed)).to(torch.float32)
                p.copy_((saved[n].float() + sign * step).to(p.dtype))
            found.append(self.loss(batch))
        for n, p in self.trainable.items():
            p.copy_(saved[n])
        return found[0], found[1]

    @torch.no_grad()
    def update(self, seed: int, coef: float, scale: float = 1.0) -> None:
        """Apply ``w <- fl(fl(scale w) + fl(coef z))``; decay spares vectors and biases."""
        for n, p in self.trainable.items():
            spared = p.ndim <= 1 or n.endswith("bias")
            w = p.float() * torch.tensor(1.0 if spared else scale)
            p.copy_((w + torch.tensor(coef, dtype=torch.float32) * self.noise(n, seed)).to(p.dtype))
