"""The options of :func:`zograph.compile`, checked once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from zograph.errors import OptionError, PipelineError
from zograph.formats import ROUNDINGS
from zograph.noise import DISTRIBUTIONS
from zograph.pipeline import Pipeline
from zograph.trajectory.options import Anderson

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
    memory: int | Literal["minimum"] | None = None
    """Bytes of the device that a step may take; None: no limit."""
    storage: str | Path = "host"
    """``host``, ``disk`` or the folder of the work file."""
    fold_every: int | Literal["auto"] = 1
    """Steps from one write of a streamed weight to the next."""
    log: Path | None = None
    """Where the seed log is written."""
    fsync_every: int = 1
    """Records between two flushes of the log; 0: the operating system decides."""
    transfer_dtype: torch.dtype | None = None
    """What weights of two or more dimensions are stored and moved in; None: their own dtype."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How weights are rounded to `transfer_dtype` at their fold points."""
    anderson: Anderson | None = None
    """How the trajectory is mixed; None: it is not."""

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("distribution", self.distribution, DISTRIBUTIONS)
        one_of("backend", self.backend, BACKENDS)
        one_of("on_nan", self.on_nan, ON_NAN)
        one_of("rounding", self.rounding, ROUNDINGS)
        if self.rounding != "nearest" and self.transfer_dtype is None:
            raise OptionError(
                f"rounding={self.rounding!r} is about stored weights: pass transfer_dtype too."
            )
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise OptionError(f"eps is {self.eps}; it must be positive, usually 1e-3.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise OptionError(f"weight_decay is {self.weight_decay}; it must not be negative.")
        if self.directions < 1:
            raise OptionError(f"directions is {self.directions}; it must be at least 1.")
        if self.anderson is not None:
            check_mixing(self.anderson, self.directions, self.weight_decay)
        if self.compute_dtype is not None and not self.compute_dtype.is_floating_point:
            raise OptionError(f"compute_dtype is {self.compute_dtype}; it must be floating.")
        if not isinstance(self.passes, Pipeline):
            raise OptionError(
                "passes must be a Pipeline: zograph.default_passes().insert_after(name, MyPass())."
            )
        self.passes.validate()
        provided = {fact for p in self.passes for fact in p.contract.provides}
        if missing := [fact for fact in ("offloaded", "scheduled") if fact not in provided]:
            raise PipelineError(
                f"no pass makes the graph {missing[0]}, and a step cannot run without: start from "
                f"zograph.default_passes()."
            )
        if self.fold_every != "auto" and (type(self.fold_every) is not int or self.fold_every < 1):
            raise OptionError(
                f"fold_every is {self.fold_every!r}; it must be 1 or more steps, or 'auto'."
            )
        if isinstance(self.fsync_every, bool) or self.fsync_every < 0:
            raise OptionError(f"fsync_every is {self.fsync_every}; it must be 0 or more records.")
        if not isinstance(self.storage, (str, Path)) or not str(self.storage):
            raise OptionError(
                f"storage={self.storage!r} is unknown; use 'host', 'disk' or a folder's path."
            )


def check_mixing(anderson: object, directions: int, weight_decay: float) -> None:
    """Refuse a mixed trajectory beside options that it cannot have."""
    if not isinstance(anderson, Anderson):
        raise OptionError(f"anderson is {anderson!r}; pass zograph.Anderson(...) or None.")
    if directions != anderson.directions:
        raise OptionError(
            f"directions is {directions}, and anderson shares {anderson.directions}: leave "
            f"directions out, or give the same."
        )
    if weight_decay:
        raise OptionError(
            f"weight_decay is {weight_decay}, and a decay inside a cycle would move its origin: "
            f"use one of weight_decay and anderson."
        )


def one_of(option: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a value outside a closed list."""
    if value not in known:
        raise OptionError(f"{option}={value!r} is unknown; use one of {', '.join(known)}.")


UNITS = {"b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("b", 1000), ("ib", 1024))
}


def parse_memory(memory: int | float | str | None, whole: int) -> int | Literal["minimum"] | None:
    """Return a budget in bytes, ``minimum`` or None.

    Parameters
    ----------
    memory
        Bytes, a text such as ``8GB`` (10^9) or ``2GiB`` (2^30), ``minimum``, or a fraction of
        the device's memory between 0 and 1.
    whole
        Bytes of the device's memory.

    Raises
    ------
    OptionError
        If it is none of these, or not positive.
    """
    if memory is None or memory == "minimum":
        return memory  # type: ignore[return-value]
    advice = "pass bytes, '8GB', '2GiB', a fraction below 1 of the device's memory, or 'minimum'."
    found = (
        re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", memory) if isinstance(memory, str) else None
    )
    if found is not None:
        try:
            nbytes = float(found[1]) * UNITS[(found[2] or "b").lower()]
        except (KeyError, ValueError) as error:
            raise OptionError(f"memory={memory!r} is no size; {advice}") from error
    elif isinstance(memory, (int, float)) and not isinstance(memory, bool):
        nbytes = float(memory)
        if isinstance(memory, float) and 0 < memory < 1:
            nbytes *= whole
    else:
        raise OptionError(f"memory={memory!r} is no size; {advice}")
    if not math.isfinite(nbytes) or nbytes < 1:
        raise OptionError(f"memory={memory!r} is no budget; {advice}")
    return int(nbytes)


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory of a device; of the CPU, the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
