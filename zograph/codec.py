"""How a weight is stored in a format, and read again with its pending terms: the definition.

This file *is* the definition; the C++ and Triton kernels give the same bits. A weight is computed
in float32 whatever its dtype; a number of a format is exact in it and in every wider dtype, so that
storing what was rounded to the format changes nothing.

**Floating formats.** A magnitude above the largest finite one becomes that one. Nearest rounds
ties to even.

**int8.** A block of 128 consecutive elements, the last perhaps shorter, has the scale
``s = max|w| / 127``, and an element is ``q s`` with q in -127..127. Of a float32 (or float64)
weight, s is cut to 17 significant bits, so that ``127 s`` is exact; of a 16-bit one it is the next
power of two, and elements are at most the largest number of its dtype. A block with s below 2^-100
(float16: 2^-24) is zero.

**Stochastic rounding** takes the upper neighbour with the probability of the distance from the
lower one. Its random bits are a function of the seed of the last term before it, the parameter's
key and the element's index, on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from zograph.formats import BLOCK, Format
from zograph.kernels import Terms, tiles
from zograph.kernels.engine import codec_for, engine_for
from zograph.noise import Words, stream_words

SALT = 0x5DEECE66D1CE4E5B - (1 << 63)
"""Exclusive or with a seed gives the seed of the rounding: no step has a negative one."""

NOTHING: Terms = (
    torch.zeros(0, dtype=torch.int64),
    torch.zeros(0),
    None,
)
"""No pending terms."""


def encode(weight: Tensor, form: Format, stored: Tensor) -> Tensor:
    """Store a weight, rounded to nearest; of a number of the format nothing is lost.

    Parameters
    ----------
    weight
        Floating, contiguous.
    stored
        Contiguous, of ``form.nbytes(weight.numel())`` bytes, on the weight's device.

    Returns
    -------
    Tensor
        int64 [2], on the device: elements that were beyond the format's range, and NaNs.
    """
    weight, raw = weight.detach().view(-1), stored.view(torch.uint8).view(-1)
    kernels = codec_for(weight)
    if kernels is not None:
        return kernels.encode(weight, form, raw)
    scales, data = form.parts(raw, weight.numel())
    counts = torch.zeros(2, dtype=torch.int64, device=weight.device)
    for a, b in _tiles(weight):
        value = weight[a:b].to(torch.float32)
        counts += beyond(value, form)
        if form.scaled:
            own = scales[a // BLOCK : -(-b // BLOCK)]
            own.copy_(block_scales(value, weight.dtype))
            data[a:b] = whole(value, own, None).to(torch.int8)
        else:
            data[a:b] = rounded(value, form, weight.dtype, None).to(form.dtype)
    return counts


def decode(
    stored: Tensor,
    form: Format,
    out: Tensor,
    terms: Terms = NOTHING,
    key: int = 0,
    *,
    ends: Tensor | None = None,
    rounding: str = "nearest",
    distribution: str = "normal",
    first: int = 0,
) -> Tensor:
    """Read a stored weight and apply its pending terms.

    Parameters
    ----------
    stored
        As :func:`encode` left it.
    out
        Floating, contiguous: the weight.
    terms
        seeds int64[r], coefs float32[r], scales float32[r] or None for no decay; in step order,
        on the device of `out`.
    key
        The parameter's noise key.
    ends
        bool[r], on the CPU: the terms behind which the weight is rounded to its format. By default
        none.
    rounding
        ``nearest`` or ``stochastic``.
    first
        Noise index of the first element.

    Returns
    -------
    Tensor
        As of :func:`encode`.
    """
    flat, raw = out.view(-1), stored.view(torch.uint8).view(-1)
    seeds, coefs, scales = terms
    if ends is None:
        ends = torch.zeros(seeds.numel(), dtype=torch.bool)
    kernels = codec_for(flat)
    if kernels is not None:
        return kernels.decode(
            raw, form, flat, terms, key, ends, salt=SALT,
            stochastic=rounding == "stochastic", distribution=distribution, first=first,
        )  # fmt: skip
    counts = torch.zeros(2, dtype=torch.int64, device=out.device)
    own = torch.full((), key, device=out.device)
    points = [0, *(ends.nonzero().view(-1) + 1).tolist(), seeds.numel()]
    for a, b in _tiles(flat):
        value = unpacked(raw, form, flat, a, b)
        apply = engine_for(value, value.dtype).fold
        for i, j in pairwise(points):
            some: Terms = (seeds[i:j], coefs[i:j], None if scales is None else scales[i:j])
            if i < j:
                apply(value, some, key, distribution, None, first + a)
            if i < j and ends[j - 1]:
                counts += beyond(value, form)
                bits = None
                if rounding == "stochastic":
                    index = torch.arange(first + a, first + b, device=out.device)
                    bits = rounding_bits(index, stream_words(seeds[j - 1] ^ SALT, own))
                value = rounded(value, form, out.dtype, bits)
        flat[a:b] = value
    return counts


def _tiles(weight: Tensor) -> Iterator[tuple[int, int]]:
    """Cut elements into ranges that take bounded memory."""
    for a in range(0, weight.numel(), tiles.TILE):
        yield a, min(a + tiles.TILE, weight.numel())


def unpacked(raw: Tensor, form: Format, like: Tensor, a: int, b: int) -> Tensor:
    """Return elements a to b (a begins a block) of a stored weight like `like`, in float32."""
    scales, data = form.parts(raw, like.numel())
    value = data[a:b].to(torch.float32)
    if form.scaled:
        value = scaled(value, scales[a // BLOCK : -(-b // BLOCK)], like.dtype)
    return value


def beyond(value: Tensor, form: Format) -> Tensor:
    """Count the elements beyond a format's range, and the NaNs: int64 [2]."""
    limit = torch.finfo(torch.float32).max if form.scaled else form.largest
    return torch.stack([(value.abs() > limit).sum(), value.isnan().sum()])


def rounded(value: Tensor, form: Format, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """Round float32 values, which begin a block, to the numbers of a format.

    Parameters
    ----------
    dtype
        Of the weight.
    bits
        int32, as many: of stochastic rounding. None: to nearest.
    """
    if form.scaled:
        scales = block_scales(value, dtype)
        return scaled(whole(value, scales, bits), scales, dtype)
    value = value.nan_to_num(nan=0.0, posinf=form.largest, neginf=-form.largest)
    value = value.clamp(-form.largest, form.largest)
    if bits is None:
        return value.to(form.dtype).to(torch.float32)
    if form.dtype is torch.bfloat16:
        return (value.view(torch.int32) + ((bits >> 16) & 0xFFFF) & ~0xFFFF).view(torch.float32)
    size = value.abs()
    power = (size.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp(min=2.0**form.lowest) * 2.0**-form.mantissa
    steps = size / step
    below = steps.floor()
    size = (below + (unit(bits) < steps - below)) * step
    return size.clamp(max=form.largest).copysign(value)


def block_scales(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale of each block of float32 values."""
    most = blocks(value.nan_to_num(nan=0.0)).abs().amax(1)
    scale = most / torch.full((), 127.0, device=value.device)  # by a number, CUDA multiplies
    pattern = scale.view(torch.int32)
    pattern = pattern & ~0x7F if dtype.itemsize > 2 else (pattern + 0x7FFFFF) & 0x7F800000
    least = 2.0**-24 if dtype is torch.float16 else 2.0**-100
    return torch.where(scale < least, 0.0, pattern.view(torch.float32))


def whole(value: Tensor, scales: Tensor, bits: Tensor | None) -> Tensor:
    """Return the integers of blocks of float32 values under their scales, as float32."""
    by = scales[:, None]
    steps = blocks(value.nan_to_num(nan=0.0)) / torch.where(by > 0, by, 1.0)
    steps = torch.where(by > 0, steps, 0.0).view(-1)[: value.numel()]
    if bits is None:
        steps = steps.round()
    else:
        below = steps.floor()
        steps = below + (unit(bits) < steps - below)
    return steps.clamp(-127.0, 127.0) + 0.0


def scaled(integers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what integers mean under the scales of their blocks."""
    value = (blocks(integers) * scales[:, None]).view(-1)[: integers.numel()]
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return value.clamp(-most, most)


def blocks(value: Tensor) -> Tensor:
    """View values as rows of a block each, the last padded with zeros."""
    short = -value.numel() % BLOCK
    return torch.nn.functional.pad(value, (0, short)).view(-1, BLOCK)


def unit(bits: Tensor) -> Tensor:
    """Return numbers from 0 to 1, without 1, from random bits."""
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def rounding_bits(index: Tensor, words: Words) -> Tensor:
    """Return 32 random bits for each element index (int64) of a stream, as int32."""
    k0, k1, k2, k3 = words
    lo = index.to(torch.int32)
    hi = _xorshift((index >> 32).to(torch.int32) * -0x61C8864F, 16)
    x = _xorshift((lo ^ k0) * -0x61C8864F, 16)
    x = _xorshift((x + (k1 ^ hi)) * -0x7A143595, 15)
    x = _xorshift(x * -0x3D4D51CB, 16)
    y = _xorshift((x + k2) * 0x7FEB352D, 15)
    return _xorshift((y ^ (k3 + hi)) * -0x7B935975, 16)


def _xorshift(x: Tensor, bits: int) -> Tensor:
    return x ^ ((x >> bits) & ((1 << (32 - bits)) - 1))
