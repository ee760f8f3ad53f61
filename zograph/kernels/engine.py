"""Which of the noise engines serves a tensor; all give the same bits."""

from __future__ import annotations

import functools
import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from zograph import kernels
from zograph.kernels import Terms, tiles


class Engine(Protocol):
    """What perturbs and folds: `zograph.kernels` (C++), `.triton_noise`, `.tiles` (torch).

    Tensors are contiguous and on one device. ``terms`` are seeds int64[r], coefs float32[r] and
    scales float32[r], or None for no decay.
    """

    def perturb(
        self,
        base: Tensor,
        index: Tensor | None,
        plus: Tensor | None,
        minus: Tensor | None,
        terms: Terms,
        keys: Tensor,
        slot: int,
        seed: Tensor,
        eps: Tensor,
        distribution: str,
    ) -> None:
        """Write base + terms +/- eps z into `plus` and `minus` (one of them may be None).

        Parameters
        ----------
        index : Tensor or None
            int64 or int32: the rows of `base` to do; None: all of it.
        keys, slot
            int64[P, 2] and the row of it that is `base`'s: its key, and the index of its first
            element.

        Raises
        ------
        IndexError
            On the CPU, if a row index is out of range; nothing is written. On a GPU such rows
            are NaN.
        """

    def fold(
        self,
        base: Tensor,
        terms: Terms,
        key: int,
        distribution: str,
        ends: Tensor | None = None,
        first: int = 0,
    ) -> None:
        """Apply the terms to `base` in place.

        Parameters
        ----------
        ends : Tensor or None
            bool[r], on the CPU: terms behind which `base` is rounded; always behind the last.
        first : int
            Index of `base`'s first element.
        """


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def engine_for(base: Tensor, dtype: torch.dtype) -> Engine:
    """Return what serves a base and outputs of a dtype."""
    if base.is_cuda and has_triton():
        from zograph.kernels import triton_noise  # only there

        return triton_noise
    known = base.is_cpu and base.dtype in kernels.DTYPES and dtype in kernels.DTYPES
    return kernels if known and kernels.available() else tiles
