"""The Triton kernels behind the ops on CUDA; the same bits as `zograph.noise`.

One launch per weight: terms and both perturbed copies in one pass over memory. Fused multiply-adds
are off (`enable_fp_fusion`), so that every product and sum rounds on its own. Nothing here waits
for the device.  Imported only where Triton is installed (see `zograph.kernels.engine`).
"""

# The bodies are Triton's language, not Python: an annotation there would be a type of Triton.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zograph.kernels import Terms

BLOCK = 1024
"""Elements of a program."""

_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_MIX0: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX1: tl.constexpr = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(h):
    h = (h ^ (h >> 30)) * _MIX0
    h = (h ^ (h >> 27)) * _MIX1
    return h ^ (h >> 31)


@triton.jit
def _words(seed, key):
    """The four words of a stream; seed and key are uint64 scalars."""
    a = _mix(_mix(seed + _GOLDEN) + key)
    b = _mix(_mix(key ^ _GOLDEN) + a)
    return (
        a.to(tl.uint32),
        (a >> 32).to(tl.uint32),
        b.to(tl.uint32),
        (b >> 32).to(tl.uint32),
    )


@triton.jit
def _shift(x, bits: tl.constexpr):
    return x ^ (x >> bits)


@triton.jit
def _halves(x):
    return (x & 0xFFFF) + (x >> 16)


@triton.jit
def two_words(index, seed, key):
    """The first two words of elements `index` (int64) of the stream of (seed, key), integers."""
    k0, k1, k2, k3 = _words(seed.to(tl.uint64), key.to(tl.uint64))
    lo = index.to(tl.uint32)
    hi = _shift((index >> 32).to(tl.uint32) * 0x9E3779B1, 16)
    x = _shift((lo ^ k0) * 0x9E3779B1, 16)
    x = _shift((x + (k1 ^ hi)) * 0x85EBCA6B, 15)
    x = _shift(x * 0xC2B2AE35, 16)
    y = _shift((x + k2) * 0x7FEB352D, 15)
    y = _shift((y ^ (k3 + hi)) * 0x846CA68B, 16)
    return x, y


@triton.jit
def _noise(index, seed, key, normal: tl.constexpr):
    """The float32 noise of elements `index` (int64) of the stream of (seed, key), integers."""
    x, y = two_words(index, seed, key)
    if normal:
        _, k1, _, _ = _words(seed.to(tl.uint64), key.to(tl.uint64))
        v = _shift((y + k1) * 0x31848BAB, 14)
        v = _shift((v ^ x) * 0x2C1B3C6D, 17)
        total = (_halves(x) + _halves(y) + _halves(v)).to(tl.int32) - 196605
        t = total.to(tl.float32) * 2.15791860e-05
        q = t * t
        poly = q * 3.57058025e-06
        poly = (poly - 3.05405629e-05) * q
        poly = (poly + 3.96967982e-04) * q
        poly = (poly + 7.32545182e-03) * q
        z = (poly + 0.974835217) * t
    else:
        z = (1 - ((y >> 30) & 2).to(tl.int32)).to(tl.float32)
    return z


@triton.jit
def _term(w, index, seed, key, coef, normal: tl.constexpr):
    """``w + fl(coef z)``, in w's dtype."""
    return w + coef.to(w.dtype) * _noise(index, seed, key, normal).to(w.dtype)


@triton.jit
def owed(
    w,
    index,
    seeds,
    coefs,
    scales,
    count,
    key,
    scaled: tl.constexpr,
    normal: tl.constexpr,
):
    """Apply the pending terms, in order."""
    for j in range(count):
        if scaled:
            w = tl.load(scales + j).to(w.dtype) * w
        w = _term(w, index, tl.load(seeds + j), key, tl.load(coefs + j), normal)
    return w


@triton.jit
def rounded(w, like: tl.constexpr):
    """Round to a dtype as torch does, float64 to a 16-bit one by way of float32."""
    if like.primitive_bitwidth == 16:
        w = w.to(tl.float32)
    return w.to(like)


@triton.jit(do_not_specialize=["n", "count", "key", "first"])
def _fold(
    base,
    n: tl.int64,
    seeds,
    coefs,
    scales,
    count,
    key: tl.int64,
    first: tl.int64,
    work: tl.constexpr,
    scaled: tl.constexpr,
    normal: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    w = tl.load(base + at, mask=at < n).to(work)
    w = owed(w, at + first, seeds, coefs, scales, count, key, scaled, normal)
    tl.store(base + at, rounded(w, base.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["n", "height", "width", "count", "slot"])
def _perturb(
    base,
    rows,
    plus,
    minus,
    n: tl.int64,
    height: tl.int64,
    width: tl.int64,
    seeds,
    coefs,
    scales,
    count,
    keys,
    slot: tl.int64,
    probe,
    eps,
    work: tl.constexpr,
    by_rows: tl.constexpr,
    has_plus: tl.constexpr,
    has_minus: tl.constexpr,
    scaled: tl.constexpr,
    normal: tl.constexpr,
    block: tl.constexpr,
):
    """Base or rows of it with what it owes, plus and minus eps z. A row that is none is NaN."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    source = at
    if by_rows:
        row = tl.load(rows + at // width, mask=inside, other=0).to(tl.int64)
        source = row * width + at % width
        known = inside & (row >= 0) & (row < height)
        w = tl.load(base + source, mask=known, other=float("nan")).to(work)
    else:
        w = tl.load(base + source, mask=inside).to(work)
    key, first = tl.load(keys + 2 * slot), tl.load(keys + 2 * slot + 1)
    index = source + first
    if count > 0:
        w = owed(w, index, seeds, coefs, scales, count, key, scaled, normal)
        w = w.to(base.dtype.element_ty).to(work)
    d = tl.load(eps).to(work) * _noise(index, tl.load(probe), key, normal).to(work)
    if has_plus:
        tl.store(plus + at, rounded(w + d, plus.dtype.element_ty), mask=inside)
    if has_minus:
        tl.store(minus + at, rounded(w - d, minus.dtype.element_ty), mask=inside)


def perturb(
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
    """See :class:`zograph.kernels.engine.Engine`."""
    out = plus if plus is not None else minus
    assert out is not None
    seeds, coefs, scales = terms
    height = base.shape[0] if base.dim() else 1
    launch(
        _perturb, out, -(-out.numel() // BLOCK),
        base, base if index is None else index, instead(plus, out), instead(minus, out),
        out.numel(), height, base.numel() // max(height, 1),
        seeds, coefs, instead(scales, coefs), seeds.numel(), keys, slot, seed, eps,
        work=_work(base), by_rows=index is not None,
        has_plus=plus is not None, has_minus=minus is not None,
        scaled=scales is not None, normal=distribution == "normal", block=BLOCK,
    )  # fmt: skip


def fold(
    base: Tensor,
    terms: Terms,
    key: int,
    distribution: str,
    ends: Tensor | None = None,
    first: int = 0,
) -> None:
    """See :class:`zograph.kernels.engine.Engine`."""
    seeds, coefs, scales = terms
    cuts = [] if ends is None else (ends[:-1].nonzero().view(-1) + 1).tolist()
    for a, b in zip([0, *cuts], [*cuts, seeds.numel()], strict=True):
        launch(
            _fold, base, -(-base.numel() // BLOCK),
            base, base.numel(),
            seeds[a:b], coefs[a:b], instead(scales, coefs)[a:b], b - a, key, first,
            work=_work(base), scaled=scales is not None, normal=distribution == "normal",
            block=BLOCK,
        )  # fmt: skip


def launch(kernel: Any, like: Tensor, programs: int, *args: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the device of `like`."""
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*args, **constants, enable_fp_fusion=False)


def instead(wanted: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor, or another one where there is none: a kernel takes no None."""
    return other if wanted is None else wanted


def _work(base: Tensor) -> Any:
    return tl.float64 if base.dtype.itemsize == 8 else tl.float32
