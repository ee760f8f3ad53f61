"""Which kernels serve a tensor: of the noise, of stored formats, of Anderson mixing.

Those of the noise and of formats give the same bits on every device.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zograph import kernels
from zograph.formats import Format
from zograph.kernels import Terms, codec, mixing, tiles


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


class Codec(Protocol):
    """What stores weights in formats: `zograph.kernels.codec` (C++), `.triton_codec`.

    Tensors are contiguous and on one device.
    """

    def encode(self, weight: Tensor, form: Format, stored: Tensor) -> Tensor:
        """Write a weight into its stored bytes; return how many elements were clipped and NaN."""

    def decode(
        self,
        stored: Tensor,
        form: Format,
        out: Tensor,
        terms: Terms,
        key: int,
        ends: Tensor,
        *,
        salt: int,
        stochastic: bool,
        distribution: str,
        first: int,
    ) -> Tensor:
        """Write a stored weight with its terms into `out`; return counts as `encode` does.

        Parameters
        ----------
        ends : Tensor
            bool[r], on the CPU: the terms behind which the weight is rounded to its format.
        salt : int
            What tells the stream of rounding from that of the noise.
        first : int
            Noise index of the first element.
        """


class Mixing(Protocol):
    """What keeps the window of Anderson mixing: `zograph.kernels.mixing` (C++), `.triton_mixing`.

    B samples, S slots, D numbers a sample; tensors are contiguous and on one device.
    """

    def observe(
        self,
        value: Tensor,
        z: Tensor,
        values: Tensor,
        residuals: Tensor,
        slot: Tensor,
        active: Tensor,
    ) -> Tensor:
        """Store f(z) and f(z) - z in the slots of the active samples; return the sums.

        Parameters
        ----------
        value, z : Tensor
            [B, D], of the state's dtype.
        values, residuals : Tensor
            float32[B, S, D]; float32 or bfloat16[B, S, D].
        slot, active : Tensor
            int64[B], bool[B].

        Returns
        -------
        Tensor
            float64[B, S + 2]: the products of f(z) - z with the residuals in all slots, its square
            and that of f(z); 0 for samples that are not active.
        """

    def norms(self, value: Tensor, z: Tensor) -> Tensor:
        """Return the squares of each row's f(z) - z and f(z), float64[B, 2], of [B, D]."""

    def mix(
        self, weights: Tensor, damping: float, values: Tensor, residuals: Tensor, out: Tensor
    ) -> None:
        """Write the sum over slots of weight times (value + damping residual) into `out`, [B, D].

        Weights are float64[B, S]; a slot of weight 0 is not read.
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


def codec_for(weight: Tensor) -> Codec | None:
    """Return what converts weights like this one, None if only the definition does."""
    if weight.is_cuda and has_triton():
        from zograph.kernels import triton_codec  # only there

        return triton_codec
    return codec if codec.serves(weight) else None


def mixing_for(state: Tensor, history: torch.dtype = torch.float32) -> Mixing | None:
    """Return what mixes states like this one; None if only torch's operators do."""
    if isinstance(state, FakeTensor) or history not in (torch.float32, torch.bfloat16):
        return None
    if state.is_cuda and has_triton() and state.dtype in kernels.DTYPES:
        from zograph.kernels import triton_mixing  # only there

        return triton_mixing
    return mixing if mixing.serves(state) else None
