"""The formats in which streamed weights are stored and moved (`transfer_dtype`).

A format is about one entry of the parameter table at a time: :func:`with_format` says which
entries are stored in it, and `ParamInfo.format` carries it from there on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from zograph.errors import OptionError

if TYPE_CHECKING:
    from zograph.ir import ParamInfo

BLOCK = 128
"""Consecutive elements of a stored int8 weight that share a scale; the last may be shorter."""


@dataclass(frozen=True)
class Format:
    """A format of stored weights narrower than the weights' own dtypes."""

    dtype: torch.dtype
    largest: float
    """The largest magnitude; of int8, in units of the scale."""
    mantissa: int = 0
    """Bits of the significand, without the leading one."""
    lowest: int = 0
    """Exponent of the smallest normal number."""

    @property
    def name(self) -> str:
        """The dtype's name, as users write it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def scaled(self) -> bool:
        """Whether blocks have a scale: float32, all of them ahead of the elements."""
        return self.dtype is torch.int8

    @property
    def code(self) -> int:
        """What codec.cpp calls it."""
        return list(FORMATS).index(self.name)

    def scales(self, numel: int) -> int:
        """Return how many scales a weight of so many elements has."""
        return -(-numel // BLOCK) if self.scaled else 0

    def nbytes(self, numel: int) -> int:
        """Return the size of a stored weight of so many elements."""
        return 4 * self.scales(numel) + numel * self.dtype.itemsize

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a stored weight has in a graph: with scales it is flat."""
        return (self.nbytes(math.prod(shape)),) if self.scaled else shape

    def parts(self, raw: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """View stored bytes as scales, of which a floating format has none, and elements."""
        head = 4 * self.scales(numel)
        return raw[:head].view(torch.float32), raw[head : self.nbytes(numel)].view(self.dtype)

    def empty(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Return a tensor for a stored weight, as it is in a graph."""
        return torch.empty(self.shape(shape), dtype=self.dtype, device=device)


FORMATS = {
    f.name: f
    for f in (
        Format(torch.bfloat16, torch.finfo(torch.bfloat16).max, 7, -126),
        Format(torch.float16, 65504.0, 10, -14),
        Format(torch.float8_e4m3fn, 448.0, 3, -6),
        Format(torch.float8_e5m2, 57344.0, 2, -14),
        Format(torch.int8, 127.0),
    )
}
"""By name."""

ROUNDINGS = ("nearest", "stochastic")


def with_format(table: Mapping[str, ParamInfo], dtype: torch.dtype | None) -> dict[str, ParamInfo]:
    """Say which entries of a table are stored in a format.

    Those are floating, of two or more dimensions and wider than the format.
    """
    if dtype is None:
        return dict(table)
    form = FORMATS[str(dtype).removeprefix("torch.")]
    return {
        name: replace(p, format=form)
        if p.dtype.is_floating_point and len(p.shape) > 1 and p.dtype.itemsize > dtype.itemsize
        else p
        for name, p in table.items()
    }


def parse_transfer_dtype(
    value: torch.dtype | str | None, device: torch.device
) -> torch.dtype | None:
    """Return the dtype that a user names, None for none.

    Raises
    ------
    OptionError
        If it is no format of stored weights, or this device cannot convert it.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name in FORMATS and converts(FORMATS[name].dtype, device):
        return FORMATS[name].dtype
    where = "is unknown" if name not in FORMATS else f"is not supported on {device.type}"
    known = [n for n, f in FORMATS.items() if converts(f.dtype, device)]
    raise OptionError(f"transfer_dtype={name!r} {where}; use one of {', '.join(known)}, or None.")


def converts(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device converts numbers to a dtype and back."""
    try:
        one = torch.ones(1, device=device).to(dtype).to(torch.float32)
    except (RuntimeError, TypeError):
        return False
    return bool(one == 1)
