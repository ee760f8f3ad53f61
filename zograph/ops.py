"""The ops `zograph::materialize*`, opaque to Inductor, and the in-place fold.

A weight is a stored `base` plus pending terms, each `w <- fl(fl(scale w) + fl(c z(seed)))` in
float32 in step order (docs/noise.md).  After the terms the value is rounded through the base's
dtype, so that an unfolded weight equals the folded one; then ``w +/- eps z(seed)`` is rounded to
the output dtype.  A float64 base is computed in float64 from the same float32 z.

All four ops are functional.  Outputs are contiguous; on the CPU they come from `zograph.pool`.
Shared arguments: `seeds` int64[r], `coefs` and `scales` float32[r] (r may be 0), `keys` int64[P]
with this parameter's key at `slot`, `seed` 0-dim int64, `eps` 0-dim float32, all on `base`'s device;
`dtype` of the outputs; `decay=False` takes every scale as 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zograph import kernels
from zograph.kernels import tiles
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
_library = torch.library.Library("zograph", "DEF")

_Out = Tensor | None
_Terms = tuple[Tensor, Tensor, Tensor | None]


def _empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    if like.is_cpu:
        return pool.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _empty_like(base: Tensor, dtype: torch.dtype) -> Tensor:
    if base.is_cpu and base.numel() * dtype.itemsize >= SMALL:
        return pool.empty(base.shape, dtype)
    return torch.empty_like(base, dtype=dtype, memory_format=torch.contiguous_format)


def _check_terms(base: Tensor, terms: _Terms, distribution: str) -> _Terms:
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
    if count > 1:
        return (
            seeds.contiguous(),
            coefs.contiguous(),
            None if scales is None else scales.contiguous(),
        )
    return terms


def _check_probe(keys: Tensor, slot: int, seed: Tensor, eps: Tensor) -> None:
    if keys.dtype != torch.int64 or seed.dtype != torch.int64 or eps.dtype != torch.float32:
        found = f"{keys.dtype}, {seed.dtype}, {eps.dtype}"
        raise ValueError(f"keys, seed, eps must be int64, int64, float32: got {found}")
    if not 0 <= slot < keys.numel() or not keys.is_contiguous():
        raise ValueError(f"slot {slot} is not in {keys.numel()} contiguous keys")
    if seed.numel() != 1 or eps.numel() != 1:
        raise ValueError("seed and eps must hold one element each")


def _native(base: Tensor, dtype: torch.dtype) -> bool:
    return (
        base.is_cpu
        and base.dtype in kernels.DTYPES
        and dtype in kernels.DTYPES
        and kernels.available()
    )


def _perturb(
    base: Tensor,
    plus: _Out,
    minus: _Out,
    terms: _Terms,
    keys: Tensor,
    slot: int,
    seed: Tensor,
    eps: Tensor,
    dtype: torch.dtype,
    distribution: str,
) -> None:
    terms = _check_terms(base, terms, distribution)
    _check_probe(keys, slot, seed, eps)
    base = base.contiguous()
    if _native(base, dtype):
        key = keys.data_ptr() + 8 * slot
        kernels.materialize(base, plus, minus, terms, key, seed, eps, distribution)
    else:
        tiles.perturb(
            base, plus, minus, terms, keys[slot], seed.view(()), eps.view(()), distribution
        )


def _perturb_rows(
    base: Tensor,
    index: Tensor,
    plus: _Out,
    minus: _Out,
    terms: _Terms,
    keys: Tensor,
    slot: int,
    seed: Tensor,
    eps: Tensor,
    dtype: torch.dtype,
    distribution: str,
) -> None:
    terms = _check_terms(base, terms, distribution)
    _check_probe(keys, slot, seed, eps)
    if base.dim() < 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows of a {base.dim()}-dim base by a {index.dtype} index")
    base, index = base.contiguous(), index.contiguous()
    if _native(base, dtype):
        key = keys.data_ptr() + 8 * slot
        kernels.rows(base, index, plus, minus, terms, key, seed, eps, distribution)
    else:
        tiles.perturb_rows(
            base, index, plus, minus, terms, keys[slot], seed.view(()), eps.view(()), distribution
        )


def _signed(sign: int, out: Tensor) -> tuple[_Out, _Out]:
    if sign not in (1, -1):
        raise ValueError(f"sign must be +1 or -1, got {sign}")
    return (out, None) if sign > 0 else (None, out)


def _materialize(
    base: Tensor,
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
) -> tuple[Tensor, Tensor]:
    plus, minus = _empty_like(base, dtype), _empty_like(base, dtype)
    terms = (seeds, coefs, scales if decay else None)
    _perturb(base, plus, minus, terms, keys, slot, seed, eps, dtype, distribution)
    return plus, minus


def _materialize_one(
    base: Tensor,
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
    sign: int,
) -> Tensor:
    out = _empty_like(base, dtype)
    plus, minus = _signed(sign, out)
    terms = (seeds, coefs, scales if decay else None)
    _perturb(base, plus, minus, terms, keys, slot, seed, eps, dtype, distribution)
    return out


def _materialize_rows(
    base: Tensor,
    index: Tensor,
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
) -> tuple[Tensor, Tensor]:
    shape = (*index.shape, *base.shape[1:])
    plus, minus = _empty(shape, dtype, base), _empty(shape, dtype, base)
    terms = (seeds, coefs, scales if decay else None)
    _perturb_rows(base, index, plus, minus, terms, keys, slot, seed, eps, dtype, distribution)
    return plus, minus


def _materialize_rows_one(
    base: Tensor,
    index: Tensor,
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
    sign: int,
) -> Tensor:
    out = _empty((*index.shape, *base.shape[1:]), dtype, base)
    plus, minus = _signed(sign, out)
    terms = (seeds, coefs, scales if decay else None)
    _perturb_rows(base, index, plus, minus, terms, keys, slot, seed, eps, dtype, distribution)
    return out


def _fake(rows: bool, pair: bool) -> Callable[..., object]:
    """The shape function of an op: contiguous outputs of `dtype` on `base`'s device."""
    at = 9 if rows else 8  # position of dtype

    def fake(base: Tensor, *rest: object) -> object:
        index, dtype = rest[0], rest[at - 1]
        assert isinstance(dtype, torch.dtype)
        shape: tuple[int, ...] = tuple(base.shape)
        if rows:
            assert isinstance(index, Tensor)
            shape = (*index.shape, *base.shape[1:])
        if pair:
            return (
                torch.empty(shape, dtype=dtype, device=base.device),
                torch.empty(shape, dtype=dtype, device=base.device),
            )
        return torch.empty(shape, dtype=dtype, device=base.device)

    return fake


def _register() -> None:
    implementations: dict[str, Callable[..., object]] = {
        "materialize": _materialize,
        "materialize_one": _materialize_one,
        "materialize_rows": _materialize_rows,
        "materialize_rows_one": _materialize_rows_one,
    }
    for name, schema in _SCHEMAS.items():
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _library.impl(name, implementations[name], key)
        # No derivative and no autograd bookkeeping: the dispatcher goes straight to the kernel.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        fake = _fake("rows" in name, not name.endswith("one"))
        torch.library.register_fake(f"zograph::{name}", fake, lib=_library)


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
    given: _Terms = (seeds.to(where), coefs.to(where), scales.to(where) if decay else None)
    terms = _check_terms(base, given, distribution)
    if seeds.numel() == 0:
        return
    data = base.data
    work = data.contiguous()
    if _native(work, work.dtype):
        kernels.fold(work, terms, int(key), distribution)
    else:
        tiles.apply_terms_(work, terms, torch.as_tensor(key, device=where), distribution)
    if work.data_ptr() != data.data_ptr():
        data.copy_(work)
