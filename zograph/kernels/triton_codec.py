"""The Triton kernels behind `zograph.codec` on CUDA; the same bits as its definition.

One launch reads a stored weight, applies its terms, rounds it and writes it; one stores a weight.
A program does whole blocks of a stored int8 weight, so that it knows their scales. Nothing here
waits for the device. Imported only where Triton is installed.
"""

# The bodies are Triton's language, not Python: an annotation there would be a type of Triton.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zograph.formats import BLOCK, Format
from zograph.kernels import Terms
from zograph.kernels.triton_noise import instead, launch, owed, rounded, two_words

ROWS = 8
"""Blocks of a program."""

DENSE = -1
"""The code of what is stored as the weight is."""

_BF16: tl.constexpr = tl.constexpr(0)
_E4M3: tl.constexpr = tl.constexpr(2)
_E5M2: tl.constexpr = tl.constexpr(3)
_INT8: tl.constexpr = tl.constexpr(4)
_INTEGERS: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has no fraction


@triton.jit
def _real(pattern):
    return pattern.to(tl.float32, bitcast=True)


@triton.jit
def _pattern(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def _place(n, block: tl.constexpr, rows: tl.constexpr):
    """Return the blocks of a program, [rows], and their elements, [rows, block]."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    return row, row[:, None] * block + tl.arange(0, block)[None, :]


@triton.jit
def _read(data, scales, row, at, n, code: tl.constexpr, block: tl.constexpr, most: tl.constexpr):
    """Load stored elements, as float32."""
    raw = tl.load(data + at, mask=at < n, other=0)
    if code == _INT8:
        scale = tl.load(scales + row, mask=row * block < n, other=0)
        value = _meaning(raw.to(tl.float32), scale, most)
    elif code == _E4M3:
        size = (raw & 0x7F).to(tl.uint32) << 20
        tiny = _pattern(_real(size + 0x3C800000) - 0.015625)
        size = tl.where(size < 0x00800000, tiny, size + 0x3C000000)
        value = _real(size | ((raw & 0x80).to(tl.uint32) << 24))
    elif code == _E5M2:  # the upper byte of a float16
        value = (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif code == _BF16:
        value = _real(raw.to(tl.uint32) << 16)
    else:
        value = raw.to(tl.float32)
    return value


@triton.jit
def _stored(value, like: tl.constexpr, code: tl.constexpr):
    """Numbers of a format (of int8, integers) as elements of its stored dtype."""
    if code == _E4M3:
        size = _pattern(tl.abs(value))
        tiny = (tl.abs(value) * 512.0).to(tl.int32).to(tl.uint32)
        size = tl.where(size < 0x3C800000, tiny, (size - 0x3C000000) >> 20)
        raw = size | ((_pattern(value) >> 24) & 0x80)
    elif code == _E5M2:
        raw = value.to(tl.float16).to(tl.uint16, bitcast=True) >> 8
    elif code == _BF16:
        raw = _pattern(value) >> 16
    else:
        raw = value
    return raw.to(like)


@triton.jit
def _clipped(value, inside, counts, largest: tl.constexpr):
    """Values within +-largest, NaN as 0, both counted; 0 outside, where there is noise too."""
    size = tl.abs(value)
    nan, beyond = value != value, size > largest
    many = tl.sum(tl.sum((beyond & inside).to(tl.int64), axis=1), axis=0)
    if many > 0:
        tl.atomic_add(counts, many)
    many = tl.sum(tl.sum((nan & inside).to(tl.int64), axis=1), axis=0)
    if many > 0:
        tl.atomic_add(counts + 1, many)
    value = tl.where(beyond, tl.where(value < 0, -largest, largest), value)
    return tl.where(nan | (inside == 0), 0.0, value)


@triton.jit
def _whole(value, random, stochastic: tl.constexpr):
    """To integers: the nearest, ties to even, or one of both neighbours as random bits say."""
    if stochastic:
        below = tl.floor(value)
        unit = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        found = below + (unit < value - below).to(tl.float32)
    else:
        found = (value + _INTEGERS) - _INTEGERS
    return found


@triton.jit
def _float_of(
    value, random, code: tl.constexpr, largest: tl.constexpr, mantissa: tl.constexpr,
    lowest: tl.constexpr, stochastic: tl.constexpr,
):  # fmt: skip
    """Round values within the range of a floating format to its numbers."""
    pattern = _pattern(value)
    if code == _BF16:
        if stochastic:
            pattern += random >> 16
        else:
            pattern += 0x7FFF + ((pattern >> 16) & 1)
        found = _real(pattern & 0xFFFF0000)
    else:
        size = tl.abs(value)
        step = tl.maximum(_pattern(size) & 0x7F800000, (127 + lowest) << 23) - (mantissa << 23)
        steps = _whole(size * _real((254 << 23) - step), random, stochastic)
        size = tl.minimum(steps * _real(step), largest)
        found = _real(_pattern(size) | (pattern & 0x80000000))
    return found


@triton.jit
def _integers_of(
    value, random, narrow: tl.constexpr, least: tl.constexpr, stochastic: tl.constexpr
):
    """Integers of blocks, as float32 without negative zeros, and the scales of the blocks."""
    most = tl.max(tl.abs(value), axis=1)
    scale = tl.div_rn(most, tl.full(most.shape, 127.0, tl.float32))
    pattern = _pattern(scale)
    pattern = (pattern + 0x7FFFFF) & 0x7F800000 if narrow else pattern & 0xFFFFFF80
    scale = tl.where(scale < least, 0.0, _real(pattern))
    by = scale[:, None] + tl.zeros_like(value)
    steps = tl.where(by > 0, tl.div_rn(value, tl.where(by > 0, by, 1.0)), 0.0)
    steps = _whole(steps, random, stochastic)
    return tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int32).to(tl.float32), scale


@triton.jit
def _meaning(integers, scale, most: tl.constexpr):
    """What the integers of blocks mean."""
    return tl.minimum(tl.maximum(integers * scale[:, None], -most), most)


@triton.jit(do_not_specialize=["n", "count", "key", "first"])
def _decode(
    data, scales, source: tl.constexpr, out, n: tl.int64,
    seeds, coefs, decays, count, key: tl.int64, first: tl.int64, counts, code: tl.constexpr,
    largest: tl.constexpr, mantissa: tl.constexpr, lowest: tl.constexpr, narrow: tl.constexpr,
    least: tl.constexpr, most: tl.constexpr, rounds: tl.constexpr, stochastic: tl.constexpr,
    salt: tl.constexpr, decayed: tl.constexpr, normal: tl.constexpr,
    block: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Read elements stored as `source`, apply terms, round to the format `code` and write."""
    row, at = _place(n, block, rows)
    w = _read(data, scales, row, at, n, source, block, most)
    index = at + first
    w = owed(w, index, seeds, coefs, decays, count, key, decayed, normal)
    if rounds:
        w = _clipped(w, at < n, counts, largest)
        random = index.to(tl.uint32)
        if stochastic:
            _, random = two_words(index, tl.load(seeds + count - 1) ^ salt, key)
        if code == _INT8:
            w, scale = _integers_of(w, random, narrow, least, stochastic)
            w = _meaning(w, scale, most)
        else:
            w = _float_of(w, random, code, largest, mantissa, lowest, stochastic)
    tl.store(out + at, rounded(w, out.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def _encode(
    weight, n: tl.int64, data, scales, counts,
    code: tl.constexpr, largest: tl.constexpr, mantissa: tl.constexpr, lowest: tl.constexpr,
    narrow: tl.constexpr, least: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Round a weight to nearest and store it."""
    row, at = _place(n, block, rows)
    w = tl.load(weight + at, mask=at < n, other=0).to(tl.float32)
    w = _clipped(w, at < n, counts, largest)
    random = at.to(tl.uint32)
    if code == _INT8:
        w, scale = _integers_of(w, random, narrow, least, False)
        tl.store(scales + row, scale, mask=row * block < n)
    else:
        w = _float_of(w, random, code, largest, mantissa, lowest, False)
    tl.store(data + at, _stored(w, data.dtype.element_ty, code), mask=at < n)


def encode(weight: Tensor, form: Format, stored: Tensor) -> Tensor:
    """See :class:`zograph.kernels.engine.Codec`."""
    scales, data = form.parts(stored, weight.numel())
    counts = torch.zeros(2, dtype=torch.int64, device=weight.device)
    _over_blocks(
        _encode, weight,
        weight, weight.numel(), _patterns(data), scales, counts, **_facts(form, weight.dtype),
    )  # fmt: skip
    return counts


def decode(
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
    """See :class:`zograph.kernels.engine.Codec`."""
    scales, data = form.parts(stored, out.numel())
    seeds, coefs, decays = terms
    counts = torch.zeros(2, dtype=torch.int64, device=out.device)
    cuts = (ends.nonzero().view(-1) + 1).tolist()
    source, how = _patterns(data), form.code
    # What was rounded is exact in the weight's dtype: the next terms start from there.
    for a, b in pairwise([0, *(cut for cut in cuts if cut < len(seeds)), len(seeds)]):
        _over_blocks(
            _decode, out,
            source, scales, how, out, out.numel(),
            seeds[a:b], coefs[a:b], instead(decays, coefs)[a:b], b - a, key, first, counts,
            decayed=decays is not None, normal=distribution == "normal",
            rounds=b in cuts, stochastic=stochastic, salt=salt,
            most=_most(out.dtype), **_facts(form, out.dtype),
        )  # fmt: skip
        source, how = out, DENSE
    return counts


def _facts(form: Format, dtype: torch.dtype) -> dict[str, Any]:
    """What kernels know of a format and of the weight's dtype."""
    return {
        "code": form.code,
        "largest": torch.finfo(torch.float32).max if form.scaled else form.largest,
        "mantissa": form.mantissa,
        "lowest": form.lowest,
        "narrow": dtype.itemsize == 2,
        "least": 2.0**-24 if dtype is torch.float16 else 2.0**-100,
    }


def _most(dtype: torch.dtype) -> float:
    """The largest number of a weight."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


def _patterns(data: Tensor) -> Tensor:
    """View numbers whose arithmetic not every GPU knows as integers."""
    views = {2: torch.uint16, 1: torch.uint8}
    known = data.dtype in (torch.float16, torch.int8)
    return data if known else data.view(views[data.dtype.itemsize])


def _over_blocks(kernel: Any, weight: Tensor, *args: Any, **constants: Any) -> None:
    programs = -(-weight.numel() // (ROWS * BLOCK))
    launch(kernel, weight, programs, *args, **constants, block=BLOCK, rows=ROWS)
