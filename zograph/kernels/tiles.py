"""The torch engine behind the ops: the definition, over tiles so that memory stays bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from zograph.kernels import Terms
from zograph.noise import noise_at, stream_words

__all__ = ["TILE", "fold", "perturb"]

TILE = 1 << 17


def _z(index: Tensor, like: Tensor, seed: Tensor, key: Tensor, distribution: str) -> Tensor:
    return noise_at(index, stream_words(seed, key), distribution).to(like.dtype)


def _owed(
    w: Tensor, index: Tensor, terms: Terms, key: Tensor, distribution: str, ends: list[bool]
) -> Tensor:
    """Apply terms to values of a dtype, in float32 at least, rounding to that dtype at `ends`."""
    seeds, coefs, scales = terms
    stored = w.dtype
    w = w.to(torch.float64 if stored == torch.float64 else torch.float32)
    for j in range(seeds.numel()):
        d = coefs[j].to(w.dtype) * _z(index, w, seeds[j], key, distribution)
        w = (w if scales is None else scales[j].to(w.dtype) * w) + d
        if ends[j]:
            w = w.to(stored).to(w.dtype)
    return w


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
    height = 1 if index is None else base.shape[0]  # the whole is one row
    rows = torch.zeros(1, device=base.device) if index is None else index.reshape(-1)
    if index is not None and base.is_cpu:
        bad = rows[(rows < 0) | (rows >= height)]
        if bad.numel():
            message = f"row index {int(bad[0])} is out of range for a tensor of {height} rows"
            raise IndexError(message)
    width = base.numel() // max(height, 1)
    table = base.view(height, width)
    outs = [None if out is None else out.view(rows.numel(), width) for out in (plus, minus)]
    key, first, seed, eps = keys[slot, 0], keys[slot, 1], seed.view(()), eps.view(())
    ends = [False] * (terms[0].numel() - 1) + [True]
    step, part = max(1, TILE // max(width, 1)), min(max(width, 1), TILE)
    for a in range(0, rows.numel(), step):
        picked = rows[a : a + step].to(torch.int64)
        for c in range(0, width, part):
            columns = torch.arange(c, min(c + part, width), device=base.device)
            at = picked[:, None] * width + columns + first
            w = _owed(table[picked, c : c + part], at, terms, key, distribution, ends)
            d = eps.to(w.dtype) * _z(at, w, seed, key, distribution)
            for out, value in zip(outs, (w + d, w - d), strict=True):
                if out is not None:
                    out[a : a + step, c : c + part] = value


def fold(
    base: Tensor,
    terms: Terms,
    key: int,
    distribution: str,
    ends: Tensor | None = None,
    first: int = 0,
) -> None:
    """See :class:`zograph.kernels.engine.Engine`."""
    flat, where = base.view(-1), base.device
    own = torch.full((), key, device=where)
    points = [False] * terms[0].numel() if ends is None else ends.tolist()
    for a in range(0, flat.numel(), TILE):
        tile = flat[a : a + TILE]
        index = torch.arange(first + a, first + a + tile.numel(), device=where)
        tile.copy_(_owed(tile, index, terms, own, distribution, points))
