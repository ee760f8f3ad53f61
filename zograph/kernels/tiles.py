"""The torch engine behind the ops: the definition over tiles of one static size.

Eager on the CPU (memory stays bounded), compiled on CUDA: a handful of functions over a fixed tile,
each output its own argument, the tail padded, so that one compilation serves every parameter.
Inductor must not fuse multiply-adds: `emulate_precision_casts` turns Triton's fp fusion off and
makes casts round where eager rounds; for C++ Inductor contracts nothing by default.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zograph.kernels import Terms
from zograph.noise import noise_at, stream_words

__all__ = ["TILE", "apply_terms_", "can_compile", "perturb", "perturb_rows", "term_engine"]

TILE = 1 << 17
WIDE_TILE = 1 << 23
"""CUDA only: the tile of large tensors, where launches of `TILE` would dominate."""


def _work_dtype(base: torch.dtype) -> torch.dtype:
    return torch.float64 if base == torch.float64 else torch.float32


def _z(start: Tensor, like: Tensor, seed: Tensor, key: Tensor, distribution: str) -> Tensor:
    index = torch.arange(like.numel(), device=like.device) + start
    return noise_at(index, stream_words(seed, key), distribution).to(like.dtype)


def _term_(
    w: Tensor,
    start: Tensor,
    seed: Tensor,
    key: Tensor,
    coef: Tensor,
    scale: Tensor | None,
    distribution: str,
) -> None:
    d = coef.to(w.dtype) * _z(start, w, seed, key, distribution)
    w.copy_((w if scale is None else scale.to(w.dtype) * w) + d)


def _both_(
    w: Tensor,
    plus: Tensor | None,
    minus: Tensor | None,
    start: Tensor,
    seed: Tensor,
    key: Tensor,
    eps: Tensor,
    distribution: str,
) -> None:
    d = eps.to(w.dtype) * _z(start, w, seed, key, distribution)
    if plus is not None:
        plus.copy_(w + d)
    if minus is not None:
        minus.copy_(w - d)


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile can make kernels for `device`."""
    return device.type == "cpu" or importlib.util.find_spec("triton") is not None


@functools.cache
def _engine(compiled: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    if not compiled:
        return _term_, _both_
    options: dict[str, Any] = {"emulate_precision_casts": True}
    term = torch.compile(_term_, dynamic=False, fullgraph=True, options=options)
    both = torch.compile(_both_, dynamic=False, fullgraph=True, options=options)
    return term, both


@functools.lru_cache(maxsize=64)
def _starts(tiles: int, tile: int, device: torch.device) -> Tensor:
    """int64[2 tiles]: entry 2i is i * tile; entries two apart stay 16-byte aligned."""
    return torch.arange(2 * tiles, device=device) * (tile // 2)


def _plan(n: int, device: torch.device) -> tuple[int, bool]:
    """Tile size, and whether to use compiled functions (then tiles are padded to that size)."""
    compiled = device.type == "cuda" and can_compile(device)
    wide = device.type == "cuda" and n >= WIDE_TILE
    return (WIDE_TILE if wide else TILE), compiled


def term_engine(flat: Tensor) -> tuple[Callable[..., None], int, bool]:
    """Return what applies one term to a float32 tile, the tile's size, whether it must be whole."""
    tile, compiled = _plan(flat.numel(), flat.device)
    return _engine(compiled)[0], tile, compiled


def _padded(x: Tensor, tile: int) -> Tensor:
    out = torch.zeros(tile, dtype=x.dtype, device=x.device)
    out[: x.numel()] = x
    return out


def _sweep(
    base: Tensor,
    outs: tuple[Tensor | None, Tensor | None],
    terms: Terms,
    key: Tensor,
    probe: tuple[Tensor, Tensor] | None,
    distribution: str,
    compiled: bool | None,
    ends: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    """Per tile of flat `base`: the terms, the base dtype's rounding, then outs or base itself."""
    n, (tile, chosen) = base.numel(), _plan(base.numel(), base.device)
    compiled = chosen if compiled is None else compiled
    term_, both_ = _engine(compiled)
    starts = _starts(-(-n // tile), tile, base.device)
    seeds, coefs, scales = terms
    for i, a in enumerate(range(0, n, tile)):
        b = min(a + tile, n)
        pad = compiled and b - a < tile
        source = base[a:b]
        w = (_padded(source, tile) if pad else source).to(_work_dtype(base.dtype), copy=True)
        start = starts[2 * i] if first is None else starts[2 * i] + first
        for j in range(seeds.numel()):
            scale = None if scales is None else scales[j]
            term_(w, start, seeds[j], key, coefs[j], scale, distribution)
            if ends is not None and ends[j] and base.dtype != w.dtype:
                w.copy_(w.to(base.dtype))
        if probe is None:
            source.copy_(w[: b - a])
            continue
        if seeds.numel() and base.dtype != w.dtype:
            w = w.to(base.dtype).to(w.dtype)
        views = [None if out is None else out[a:b] for out in outs]
        made = [_padded(v, tile) if pad and v is not None else v for v in views]
        both_(w, made[0], made[1], start, probe[0], key, probe[1], distribution)
        if pad:
            for view, full in zip(views, made, strict=True):
                if view is not None and full is not None:
                    view.copy_(full[: b - a])


def perturb(
    base: Tensor,
    plus: Tensor | None,
    minus: Tensor | None,
    terms: Terms,
    key: Tensor,
    seed: Tensor,
    eps: Tensor,
    distribution: str,
    *,
    first: Tensor | None = None,
    compiled: bool | None = None,
) -> None:
    """Write base + terms +/- eps z into `plus` and `minus` (either may be None).

    Parameters
    ----------
    base, plus, minus : Tensor
        Contiguous, one size, any floating dtypes, one device.
    terms : (seeds, coefs, scales)
        int64[r], float32[r], float32[r] or None for no decay.
    key, seed, eps : Tensor
        0-dim int64, int64, float32.
    first : Tensor, optional
        0-dim int64: the index of `base`'s first element.
    compiled : bool, optional
        Force compiled or eager tiles.  Default: compiled on CUDA where Triton is installed.
    """
    outs = tuple(None if out is None else out.view(-1) for out in (plus, minus))
    flat = (outs[0], outs[1])
    _sweep(base.view(-1), flat, terms, key, (seed, eps), distribution, compiled, None, first)


def apply_terms_(
    base: Tensor,
    terms: Terms,
    key: Tensor,
    distribution: str,
    ends: Tensor | None = None,
    *,
    first: Tensor | None = None,
    compiled: bool | None = None,
) -> None:
    """Apply the terms to contiguous `base` in place, rounding to its dtype at `ends` and last."""
    flat = base.view(-1)
    _sweep(flat, (None, None), terms, key, None, distribution, compiled, ends, first)


def perturb_rows(
    base: Tensor,
    index: Tensor,
    plus: Tensor | None,
    minus: Tensor | None,
    terms: Terms,
    key: Tensor,
    seed: Tensor,
    eps: Tensor,
    distribution: str,
    *,
    first: Tensor | None = None,
) -> None:
    """`perturb` for the rows `index` of `base`, eager, as many rows at a time as fill a tile.

    Raises
    ------
    IndexError
        On the CPU, if an index is out of range (CUDA asserts on the device).
    """
    height = base.shape[0]
    width = base.numel() // height if height else 0
    table, rows = base.view(height, width), index.reshape(-1).to(torch.int64)
    if base.device.type == "cpu":
        bad = rows[(rows < 0) | (rows >= height)]
        if bad.numel():
            message = f"row index {int(bad[0])} is out of range for a tensor of {height} rows"
            raise IndexError(message)
    columns = torch.arange(width, device=base.device)
    if first is not None:
        columns = columns + first
    outs = [None if out is None else out.view(rows.numel(), width) for out in (plus, minus)]
    seeds, coefs, scales = terms
    step = max(1, TILE // max(width, 1))
    for a in range(0, rows.numel(), step):
        picked = rows[a : a + step]
        at = picked[:, None] * width + columns

        def z(seed: Tensor, w: Tensor, at: Tensor = at) -> Tensor:
            return noise_at(at, stream_words(seed, key), distribution).to(w.dtype)

        w = table.index_select(0, picked).to(_work_dtype(base.dtype))
        for j in range(seeds.numel()):
            d = coefs[j].to(w.dtype) * z(seeds[j], w)
            w = (w if scales is None else scales[j].to(w.dtype) * w) + d
        if seeds.numel():
            w = w.to(base.dtype).to(w.dtype)
        d = eps.to(w.dtype) * z(seed, w)
        for out, value in zip(outs, (w + d, w - d), strict=True):
            if out is not None:
                out[a : a + step] = value
