"""The perturbation noise: a pure function of seed, parameter name and element index.

This file *is* the definition.  Every other engine (the C++ kernel, Inductor, Triton) must give the
same bits, so nothing is used here but 32- and 64-bit integer arithmetic and float32 ``+ - *``, each
rounded on its own.  ``docs/noise.md`` explains the construction and what it measures.

torch has no usable unsigned types: logical right shifts are arithmetic shifts followed by a mask,
and products rely on two's complement wrapping.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zograph import kernels

__all__ = [
    "DISTRIBUTIONS",
    "NOISE_VERSION",
    "Words",
    "check_distribution",
    "derive_seed",
    "noise",
    "noise_at",
    "parameter_key",
    "stream_words",
]

DISTRIBUTIONS = ("normal", "rademacher")
NOISE_VERSION = 1
"""Changes whenever any bit of any noise value changes; seed logs record it."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""The four 32-bit words of a stream, as 0-dim int32 tensors."""

_M64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

# Six 16-bit uniforms summed, centred, scaled to unit variance, then bent into shape.
_CENTRE = 196605
_SCALE = 2.15791860e-05
_POLY = (0.974835217, 7.32545182e-03, 3.96967982e-04, -3.05405629e-05, 3.57058025e-06)


def _signed(value: int, bits: int) -> int:
    """Reinterpret the low `bits` of `value` as a two's complement integer."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def parameter_key(name: str) -> int:
    """Return the 64-bit noise key of a parameter name.

    Parameters
    ----------
    name : str
        The first name `named_parameters()` gives the tensor.

    Returns
    -------
    int
        The 8-byte BLAKE2b digest of the UTF-8 name, little-endian, as a signed 64-bit integer.

    Examples
    --------
    >>> parameter_key("a.weight") == parameter_key("a.weight")
    True
    """
    digest = hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mix_int(h: int) -> int:
    h = ((h ^ (h >> 30)) * _MIX[0]) & _M64
    h = ((h ^ (h >> 27)) * _MIX[1]) & _M64
    return h ^ (h >> 31)


def derive_seed(seed: int, step: int, direction: int) -> int:
    """Return the noise seed of one direction of one step of a run.

    Parameters
    ----------
    seed, step, direction : int
        The run's seed, the 0-based step and the 0-based direction within the step.

    Returns
    -------
    int
        In ``[0, 2**63)``.
    """
    h = _mix_int((seed + _GOLDEN) & _M64)
    h = _mix_int((h + step * _GOLDEN + 1) & _M64)
    h = _mix_int(((h ^ _MIX[0]) + direction * _GOLDEN + 2) & _M64)
    return h >> 1


def _mix(h: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, the logical shifts done by mask."""
    h = (h ^ ((h >> 30) & ((1 << 34) - 1))) * _signed(_MIX[0], 64)
    h = (h ^ ((h >> 27) & ((1 << 37) - 1))) * _signed(_MIX[1], 64)
    return h ^ ((h >> 31) & ((1 << 33) - 1))


def stream_words(seed: Tensor, key: Tensor) -> Words:
    """Return the four 32-bit words that select the stream of (seed, key).

    Parameters
    ----------
    seed, key : Tensor
        0-dim int64, on one device.  Nothing is read back to the host.

    Returns
    -------
    tuple of 4 Tensor
        0-dim int32.
    """
    golden = _signed(_GOLDEN, 64)
    a = _mix(_mix(seed + golden) + key)
    b = _mix(_mix(key ^ golden) + a)
    return (
        a.to(torch.int32),
        (a >> 32).to(torch.int32),
        b.to(torch.int32),
        (b >> 32).to(torch.int32),
    )


def _xorshift(x: Tensor, bits: int) -> Tensor:
    return x ^ ((x >> bits) & ((1 << (32 - bits)) - 1))


def _halves(x: Tensor) -> Tensor:
    return (x & 0xFFFF) + ((x >> 16) & 0xFFFF)


def noise_at(index: Tensor, words: Words, distribution: str) -> Tensor:
    """Return the noise of the elements `index` of one stream: the definition.

    Parameters
    ----------
    index : Tensor
        int64, any shape; the row-major index of each element in its parameter, 0 to 2**63 - 1.
    words : tuple of 4 Tensor
        From `stream_words`, on the same device.
    distribution : {"normal", "rademacher"}

    Returns
    -------
    Tensor
        float32, the shape of `index`.
    """
    k0, k1, k2, k3 = words
    lo = index.to(torch.int32)
    hi = _xorshift((index >> 32).to(torch.int32) * _signed(0x9E3779B1, 32), 16)
    x = _xorshift((lo ^ k0) * _signed(0x9E3779B1, 32), 16)
    x = _xorshift((x + (k1 ^ hi)) * _signed(0x85EBCA6B, 32), 15)
    x = _xorshift(x * _signed(0xC2B2AE35, 32), 16)
    y = _xorshift((x + k2) * 0x7FEB352D, 15)
    y = _xorshift((y ^ (k3 + hi)) * _signed(0x846CA68B, 32), 16)
    if distribution == "rademacher":
        return (1 - ((y >> 30) & 2)).to(torch.float32)
    v = _xorshift((y + k1) * 0x31848BAB, 14)
    v = _xorshift((v ^ x) * 0x2C1B3C6D, 17)
    total = _halves(x) + _halves(y) + _halves(v) - _CENTRE
    t = total.to(torch.float32) * _SCALE
    q = t * t
    poly = q * _POLY[4]
    for c in (_POLY[3], _POLY[2], _POLY[1]):
        poly = (poly + c) * q
    return (poly + _POLY[0]) * t


def check_distribution(distribution: str) -> None:
    """Raise ValueError, listing the valid names, unless `distribution` is one of them."""
    if distribution not in DISTRIBUTIONS:
        valid = ", ".join(repr(d) for d in DISTRIBUTIONS)
        raise ValueError(f"unknown distribution {distribution!r}; valid distributions: {valid}")


def noise(
    name: str,
    shape: int | Sequence[int],
    seed: int,
    *,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the noise z that `seed` gives the parameter `name`.

    Parameters
    ----------
    name : str
        The parameter's name, as in `model.named_parameters()`.
    shape : int or sequence of int
        The parameter's shape.  A value depends on its row-major index alone, so the noise of a
        smaller tensor is a prefix of that of a larger one.
    seed : int
        64-bit signed, as `StepRecord.seed` holds it.
    distribution : {"normal", "rademacher"}
        N(0, 1), or +1 and -1 with equal probability.
    dtype : torch.dtype
        A floating dtype; values are made in float32 and rounded to it.
    device : torch.device or str, optional
        Default: the CPU.  The bits are the same on every device.

    Returns
    -------
    Tensor
        Of `shape`, `dtype`, contiguous.

    Raises
    ------
    ValueError
        For an unknown distribution, a dtype that is not floating, a seed outside 64 signed bits.

    Examples
    --------
    >>> z = noise("layers.0.weight", (2, 3), seed=1)
    >>> z.shape, z.dtype
    (torch.Size([2, 3]), torch.float32)
    >>> torch.equal(z.flatten()[:4], noise("layers.0.weight", 4, seed=1))
    True
    """
    check_distribution(distribution)
    if not dtype.is_floating_point:
        raise ValueError(f"noise needs a floating dtype, got {dtype}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed {seed} does not fit a signed 64-bit integer")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    where = torch.device("cpu" if device is None else device)
    key = parameter_key(name)
    out = torch.empty(sizes, dtype=dtype, device=where)
    if where.type == "cpu" and dtype in kernels.DTYPES and kernels.available():
        kernels.fill(out, seed, key, distribution)
        return out
    return _fill(out, seed, key, distribution)


def _fill(out: Tensor, seed: int, key: int, distribution: str, tile: int = 1 << 17) -> Tensor:
    """Fill `out` (contiguous) from the definition, a bounded number of elements at a time."""
    where = out.device
    words = stream_words(torch.tensor(seed, device=where), torch.tensor(key, device=where))
    flat = out.view(-1)
    for a in range(0, math.prod(out.shape), tile):
        b = min(a + tile, flat.numel())
        flat[a:b] = noise_at(torch.arange(a, b, device=where), words, distribution)
    return out
