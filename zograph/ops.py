"""The ops `zograph::materialize*`, opaque to Inductor, and the in-place fold.

A weight is a stored `base` plus pending terms, each `w <- fl(fl(scale w) + fl(c z(seed)))` in
float32 in step order (docs/noise.md).  After the terms the value is rounded through the base's
dtype, so that an unfolded weight equals the folded one; then ``w +/- eps z(seed)`` is rounded to
the output dtype.  A float64 base is computed in float64 from the same float32 z.

All four ops are functional.  Outputs are contiguous; on the CPU they come from `zograph.pool`.
Shared arguments: `seeds` int64[r], `coefs` and `scales` float32[r] (r may be 0), `keys` int64[P, 2]
with this parameter's key and the index of its first element at `slot`, `seed` 0-dim int64, `eps`
0-dim float32, all on the device of `base`; `dtype` of the outputs; `decay=False` takes every scale
as 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zograph.kernels import Terms
from zograph.kernels.engine import engine_for
from zograph.noise import check_distribution
from zograph.pool import SMALL, pool

__all__ = ["fold_"]

_TERMS = "Tensor seeds, Tensor coefs, Tensor scales, Tensor keys, int slot, Tensor seed, Tensor eps"
_TAIL = "ScalarType dtype, str distribution, bool decay"
_SCHEMAS = {
    "materialize": f"(Tensor base, {_TERMS}, {_TAIL}) -> (Tensor, Tensor)",
    "materialize_one": f"(Tensor base, {_TERMS}, {_TAIL}, int sign) -> Tensor",
    "materialize_rows": f"(Tensor base, Tensor index, {_TERMS}, {_TAIL}) -> (Tensor, Tensor)",
    "materialize_rows_one": f"(Tensor base, Tensor index, {_TERMS}, {_TAIL}, int sign) -> Tensor",
}

_Out = Tensor | None


def _check_terms(base: Tensor, terms: Terms, distribution: str) -> Terms:
    """Validate what the C++ kernel would otherwise misread; return contiguous terms."""
    seeds, coefs, scales = terms
    if distribution != "normal":
        check_distribution(distribution)
    if not base.is_floating_point():
        raise ValueError(f"base must be floating, got {base.dtype}")
    if seeds.dtype != torch.int64 or coefs.dtype != torch.float32:
        raise ValueError(f"seeds, coefs must be int64, float32: got {seeds.dtype}, {coefs.dtype}")
    count = seeds.numel()
    if coefs.numel() != count:
        raise ValueError(f"{count} seeds but {coefs.numel()} coefs")
    if scales is not None and (scales.dtype != torch.float32 or scales.numel() != count):
        raise ValueError(f"scales must be float32[{count}], got {scales.dtype}[{scales.numel()}]")
    if base.is_cpu and not (seeds.is_cpu and coefs.is_cpu and (scales is None or scales.is_cpu)):
        raise ValueError("base is on the CPU, so seeds, coefs and scales must be")
    if count < 2:
        return terms
    return seeds.contiguous(), coefs.contiguous(), None if scales is None else scales.contiguous()


def _check_probe(base: Tensor, keys: Tensor, slot: int, seed: Tensor, eps: Tensor) -> None:
    if keys.dtype != torch.int64 or seed.dtype != torch.int64 or eps.dtype != torch.float32:
        found = f"{keys.dtype}, {seed.dtype}, {eps.dtype}"
        raise ValueError(f"keys, seed, eps must be int64, int64, float32: got {found}")
    if keys.dim() != 2 or keys.shape[1] != 2 or not keys.is_contiguous():
        raise ValueError(f"keys must be contiguous, [P, 2]: got {list(keys.shape)}")
    if not 0 <= slot < keys.shape[0]:
        raise ValueError(f"slot {slot} is not in {keys.shape[0]} keys")
    if seed.numel() != 1 or eps.numel() != 1:
        raise ValueError("seed and eps must hold one element each")
    if base.is_cpu and not (keys.is_cpu and seed.is_cpu and eps.is_cpu):
        raise ValueError("base is on the CPU, so keys, seed and eps must be")


def _empty(base: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One output: from the pool if it is large and on the CPU."""
    if index is None and (base.numel() * dtype.itemsize < SMALL or not base.is_cpu):
        return torch.empty_like(base, dtype=dtype, memory_format=torch.contiguous_format)
    shape = base.shape if index is None else (*index.shape, *base.shape[1:])
    if base.is_cpu:
        return pool.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=base.device)


def _run(
    base: Tensor,
    index: Tensor | None,
    sign: int,
    seeds: Tensor,
    coefs: Tensor,
    scales: Tensor,
    keys: Tensor,
    slot: int,
    seed: Tensor,
    eps: Tensor,
    dtype: torch.dtype,
    distribution: str,
    decay: bool,
) -> tuple[_Out, _Out]:
    """All four ops: rows `index` or the whole of `base`, the branch `sign` or (0) both."""
    terms = _check_terms(base, (seeds, coefs, scales if decay else None), distribution)
    _check_probe(base, keys, slot, seed, eps)
    if index is not None:
        if base.dim() < 1 or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"rows of a {base.dim()}-dim base by a {index.dtype} index")
        if index.device != base.device:
            raise ValueError(f"index is on {index.device}, base on {base.device}")
        index = index.contiguous()
    base = base.contiguous()
    plus = _empty(base, index, dtype) if sign >= 0 else None
    minus = _empty(base, index, dtype) if sign <= 0 else None
    given = (terms, keys, slot, seed, eps, distribution)
    engine_for(base, dtype).perturb(base, index, plus, minus, *given)
    return plus, minus


def _pick(sign: int, outs: tuple[_Out, _Out]) -> Tensor:
    out = outs[0] if sign > 0 else outs[1]
    assert out is not None
    return out


def _check_sign(sign: int) -> int:
    if sign not in (1, -1):
        raise ValueError(f"sign must be +1 or -1, got {sign}")
    return sign


def _materialize(base: Tensor, *rest: Any) -> tuple[_Out, _Out]:
    return _run(base, None, 0, *rest)


def _materialize_one(base: Tensor, *rest: Any) -> Tensor:
    sign = _check_sign(rest[-1])
    return _pick(sign, _run(base, None, sign, *rest[:-1]))


def _materialize_rows(base: Tensor, index: Tensor, *rest: Any) -> tuple[_Out, _Out]:
    return _run(base, index, 0, *rest)


def _materialize_rows_one(base: Tensor, index: Tensor, *rest: Any) -> Tensor:
    sign = _check_sign(rest[-1])
    return _pick(sign, _run(base, index, sign, *rest[:-1]))


_IMPLEMENTATIONS: dict[str, Callable[..., object]] = {
    "materialize": _materialize,
    "materialize_one": _materialize_one,
    "materialize_rows": _materialize_rows,
    "materialize_rows_one": _materialize_rows_one,
}


def _fake(rows: bool, pair: bool) -> Callable[..., object]:
    """The shape function of an op: contiguous outputs of `dtype` on `base`'s device."""

    def fake(base: Tensor, *rest: Any) -> object:
        shape = (*rest[0].shape, *base.shape[1:]) if rows else tuple(base.shape)
        dtype = rest[8] if rows else rest[7]
        outs = [torch.empty(shape, dtype=dtype, device=base.device) for _ in range(1 + pair)]
        return tuple(outs) if pair else outs[0]

    return fake


def _register() -> None:
    library = torch.library.Library("zograph", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        for key in ("CPU", "CUDA"):
            library.impl(name, _IMPLEMENTATIONS[name], key)  # type: ignore[no-untyped-call]
        # No derivative and no autograd bookkeeping: the dispatcher goes straight to the kernel.
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
        fake = _fake("rows" in name, not name.endswith("one"))
        torch.library.register_fake(f"zograph::{name}", fake, lib=library)
    _libraries.append(library)


_libraries: list[torch.library.Library] = []  # a Library unregisters its ops when it dies
_register()


def fold_(
    base: Tensor,
    seeds: Tensor,
    coefs: Tensor,
    scales: Tensor,
    key: int | Tensor,
    *,
    distribution: str = "normal",
    decay: bool = True,
    ends: Tensor | None = None,
    first: int | Tensor = 0,
) -> None:
    """Apply the pending terms to `base` in place.

    Equal, bit for bit, to the value the ops perturb.  Works on leaf parameters in any grad mode and
    leaves the version counter alone.

    Parameters
    ----------
    base : Tensor
        Any shape, floating.  float32 and narrower are computed in float32 and rounded once.
    seeds, coefs, scales : Tensor
        int64[r], float32[r], float32[r], in step order; moved to `base`'s device if elsewhere.
    key : int or Tensor
        The parameter's noise key; a tensor is 0-dim int64.
    distribution : {"normal", "rademacher"}
    decay : bool
        False takes every scale as 1.
    ends : Tensor, optional
        bool[r], on the CPU: the terms behind which a narrow `base` is rounded, as if they had been
        applied by a call of their own.  By default only the last.
    first : int or Tensor
        Index in the parameter of `base`'s first element, where `base` is a piece of it.

    Raises
    ------
    ValueError
        For wrong dtypes or lengths, or an unknown distribution.

    Examples
    --------
    >>> w = torch.zeros(4)
    >>> fold_(w, torch.tensor([1]), torch.ones(1), torch.ones(1), 7)
    >>> bool(w.any())
    True
    """
    where = base.device
    given: Terms = (seeds.to(where), coefs.to(where), scales.to(where) if decay else None)
    terms = _check_terms(base, given, distribution)
    if seeds.numel() == 0:
        return
    data = base.data
    work = data.contiguous()
    if ends is not None and (ends.dtype != torch.bool or len(ends) != len(seeds)):
        raise ValueError(f"ends must be bool[{len(seeds)}], got {ends.dtype}[{len(ends)}]")
    engine_for(work, work.dtype).fold(work, terms, int(key), distribution, ends, int(first))
    if work.data_ptr() != data.data_ptr():
        data.copy_(work)
