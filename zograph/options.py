"""The options of :func:`zograph.compile`, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zograph.errors import OptionError
from zograph.noise import DISTRIBUTIONS
from zograph.pipeline import Pipeline

METHODS = ("zo-sgd",)
BACKENDS = ("inductor", "eager")
ON_NAN = ("raise", "skip")


@dataclass(frozen=True)
class Options:
    """Everything that :func:`zograph.compile` takes beside the model and the learning rate."""

    loss_fn: Callable[..., Any] | None
    eps: float
    weight_decay: float
    seed: int
    device: torch.device
    compute_dtype: torch.dtype | None
    method: Literal["zo-sgd"]
    directions: int
    distribution: Literal["normal", "rademacher"]
    passes: Pipeline
    on_nan: Literal["raise", "skip"]
    dynamic: bool
    backend: Literal["inductor", "eager"]

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("distribution", self.distribution, DISTRIBUTIONS)
        one_of("backend", self.backend, BACKENDS)
        one_of("on_nan", self.on_nan, ON_NAN)
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise OptionError(f"eps is {self.eps}; it must be positive, usually 1e-3.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise OptionError(f"weight_decay is {self.weight_decay}; it must not be negative.")
        if self.directions < 1:
            raise OptionError(f"directions is {self.directions}; it must be at least 1.")
        if self.compute_dtype is not None and not self.compute_dtype.is_floating_point:
            raise OptionError(f"compute_dtype is {self.compute_dtype}; it must be floating.")
        if not isinstance(self.passes, Pipeline):
            raise OptionError(
                "passes must be a Pipeline: zograph.default_passes().insert_after(name, MyPass())."
            )
        self.passes.validate()


def one_of(option: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a value outside a closed list."""
    if value not in known:
        raise OptionError(f"{option}={value!r} is unknown; use one of {', '.join(known)}.")


def check_lr(lr: float) -> float:
    """Return the learning rate as a float; refuse what is no step size."""
    if not math.isfinite(lr) or lr < 0:
        raise OptionError(f"lr is {lr}; it must be a finite number, not negative.")
    return float(lr)


def pick_device(device: str | torch.device | None) -> torch.device:
    """Return the asked device, CUDA if there is one by default, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device={device!r} is unknown; use 'cpu' or 'cuda'.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise OptionError(f"device={device!r} is not supported; use 'cpu' or 'cuda'.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device={device!r} is not there: {torch.cuda.device_count()} CUDA devices."
        )
    return chosen
