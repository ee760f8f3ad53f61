"""What a step measured: on the device until somebody looks at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from zograph.errors import LossError
from zograph.history import Terms


@dataclass(frozen=True)
class Direction:
    """What one seeded direction of a step measured."""

    seed: int
    loss_plus: float
    loss_minus: float
    projected_grad: float
    """(loss_plus - loss_minus) / (2 eps), in float64."""


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    With several directions `loss_plus`, `loss_minus` and `projected_grad` are their means
    and `seed` is the first direction's; `directions` holds each one.
    """

    step: int
    seed: int
    loss_plus: float
    loss_minus: float
    projected_grad: float
    lr: float
    skipped: bool
    directions: tuple[Direction, ...]


class Outcome:
    """The losses of one step and what follows from them; nothing here waits for a GPU but `record`.

    Parameters
    ----------
    step, seeds
        Which step, and the seeds of its directions.
    losses
        float32 [directions, 2]: loss+ and loss- of each direction.
    lr, eps, decay
        Learning rate, perturbation and weight decay of the step.
    """

    def __init__(
        self,
        step: int,
        seeds: Sequence[int],
        losses: torch.Tensor,
        *,
        lr: float,
        eps: float,
        decay: float,
    ) -> None:
        self.step, self.seeds, self.losses = step, tuple(seeds), losses
        self.lr, self.eps, self.decay = lr, eps, decay
        self.moved: Sequence[float] | None = None
        """Coefficients that others have decided; None: those of plain ZO-SGD."""
        self.finite = losses.isfinite().all()
        self._host, self._event = losses, None
        if losses.device.type == "cuda":
            self._host = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=True)
            self._host.copy_(losses, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def lazy(self) -> bool:
        """Whether nothing is known of the losses yet, as far as the run goes: they are a GPU's."""
        return self._event is not None

    def ready(self) -> bool:
        """Whether the losses can be read without waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def loss(self) -> torch.Tensor:
        """Return the mean of all branch losses: 0-dim float32, on the losses' device."""
        plus, minus = (self._mean(column) for column in self.losses.double().unbind(1))
        return ((plus.double() + minus.double()) / 2).float()

    def _here(self) -> torch.Tensor:
        """Return the losses in host memory; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def terms(self) -> Terms:
        """Return the step's update; it moves nothing where a loss is not finite."""
        seeds = torch.tensor(self.seeds, dtype=torch.int64)
        coefs, scales = self._terms(self.losses)
        return Terms(
            seeds.to(self.losses.device, non_blocking=True),
            torch.where(self.finite, coefs, 0.0),
            torch.where(self.finite, scales, 1.0),
        )

    def _terms(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return coefficients and scales: the same bits on every device."""
        coefs = _divided(-self.lr * self._grads(losses.double()), len(self.seeds)).float()
        scales = torch.ones_like(coefs)
        if self.moved is not None:
            return torch.tensor(self.moved, dtype=coefs.dtype, device=coefs.device), scales
        scales[:1].fill_(1 - self.lr * self.decay)  # to set one element waits for a GPU
        return coefs, scales

    @cached_property
    def record(self) -> StepRecord:
        """The losses as numbers; waits for the device."""
        losses = self._here().double()
        grads = self._grads(losses).tolist()
        directions = tuple(
            Direction(seed, plus, minus, grad)
            for seed, (plus, minus), grad in zip(self.seeds, losses.tolist(), grads, strict=True)
        )
        plus, minus = (float(self._mean(column)) for column in losses.unbind(1))
        finite = all(math.isfinite(x) for pair in losses.tolist() for x in pair)
        mean = sum(grads) / len(grads)
        return StepRecord(
            self.step, self.seeds[0], plus, minus, mean, self.lr, not finite, directions
        )

    def applied(self) -> list[tuple[int, float, float, float, float]]:
        """Seed, scale, coefficient, loss+ and loss- of each direction; waits for the device."""
        losses = self._here()
        coefs, scales = self._terms(losses)
        if self.record.skipped:
            coefs, scales = torch.zeros_like(coefs), torch.ones_like(scales)
        columns = (c.tolist() for c in (scales, coefs, *losses.unbind(1)))
        return list(zip(self.seeds, *columns, strict=True))

    def check(self) -> None:
        """See that every loss is finite.

        Raises
        ------
        LossError
            If one is not.
        """
        if self.record.skipped:
            losses = [(d.loss_plus, d.loss_minus) for d in self.record.directions]
            raise LossError(
                f"step {self.step}: loss+ and loss- are {losses}. The weights are as before the "
                f"step. Lower lr or eps, check the batch, or pass on_nan='skip'."
            )

    def _grads(self, losses: torch.Tensor) -> torch.Tensor:
        return _divided(losses[:, 0] - losses[:, 1], 2 * self.eps)

    def _mean(self, column: torch.Tensor) -> torch.Tensor:
        """Return the float32 mean, added up in order."""
        total = column[0]
        for value in column[1:]:
            total = total + value
        return _divided(total, len(self.seeds)).float()


def _divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """Divide; by a number, CUDA would multiply with the inverse, and other bits come out."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)
