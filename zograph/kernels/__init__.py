"""The C++ kernels behind the ops, loaded with ctypes; the same bits as `zograph.noise`.

Without a compiler `available()` is False and callers use the torch definition.  Tensors given to
these functions must be contiguous CPU tensors of the dtypes stated: the ops check, this does not.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zograph.env import setting
from zograph.kernels.build import KernelBuildError, build

__all__ = ["DTYPES", "available", "fill", "fold", "perturb", "reason"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Base and output dtypes the kernels know, with their codes in noise.cpp."""

Terms = tuple[Tensor, Tensor, Tensor | None]
"""seeds int64[r], coefs float32[r], scales float32[r] or None for no decay."""

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_reason: str | None = None

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_TERMS = (_P, _P, _P, _L)  # seeds, coefs, scales, r
_PROBE = (_P, _P, _P, _I, _I)  # key, seed, eps, normal, threads
_SIGNATURES = {
    "zg_materialize": (None, (_P, _P, _P, _I, _I, _L, *_TERMS, *_PROBE)),
    "zg_rows": (_L, (_P, _P, _P, _I, _I, _P, _I, _L, _L, _L, *_TERMS, *_PROBE)),
    "zg_fold": (None, (_P, _I, _L, *_TERMS, _L, _L, _P, _I, _I)),
    "zg_fill": (None, (_P, _I, _L, _L, _L, _L, _I, _I)),
}


def _load() -> None:
    global _library, _reason
    with _lock:
        if _library is not None or _reason is not None:
            return
        if (setting("ZOGRAPH_KERNELS") or "").lower() in ("0", "off", "false", "no"):
            _reason = "switched off by ZOGRAPH_KERNELS"
            return
        try:
            library = build()
        except KernelBuildError as error:
            _reason = str(error)
            return
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        _library = library


def available(*, warn: bool = False) -> bool:
    """Return whether the C++ kernels can be used, compiling them at the first call.

    Parameters
    ----------
    warn : bool
        Warn (`RuntimeWarning`) if they cannot: for callers that asked for them by name.
    """
    if _library is None and _reason is None:
        _load()
    if warn and _library is None:
        warnings.warn(f"zograph kernels unavailable: {_reason}", RuntimeWarning, stacklevel=2)
    return _library is not None


def load(source: Path, signatures: Mapping[str, Sequence[Any]]) -> ctypes.CDLL | None:
    """Return the library of other kernels, whose functions return nothing; None without compiler.

    Parameters
    ----------
    source
        A C++ file beside this one.
    signatures
        The types of each function's arguments, as ctypes has them.
    """
    if not available():
        return None
    try:
        library = build(source)
    except KernelBuildError:
        return None
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = None, arguments
    return library


def reason() -> str | None:
    """Return why the kernels are unavailable, None if they are available."""
    available()
    return _reason


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
    assert _library is not None
    out = plus if plus is not None else minus
    assert out is not None
    seeds, coefs, scales = terms
    outs = (
        base.data_ptr(),
        plus.data_ptr() if plus is not None else None,
        minus.data_ptr() if minus is not None else None,
        DTYPES[base.dtype],
        DTYPES[out.dtype],
    )
    rest = (
        seeds.data_ptr(),
        coefs.data_ptr(),
        scales.data_ptr() if scales is not None else None,
        seeds.numel(),
        keys.data_ptr() + 16 * slot,
        seed.data_ptr(),
        eps.data_ptr(),
        distribution == "normal",
        torch.get_num_threads(),
    )
    if index is None:
        _library.zg_materialize(*outs, base.numel(), *rest)
        return
    height = base.shape[0]
    width = base.numel() // height if height else 0
    narrow = index.dtype == torch.int32
    bad = _library.zg_rows(*outs, index.data_ptr(), narrow, index.numel(), height, width, *rest)
    if bad >= 0:
        row = int(index.view(-1)[bad])
        raise IndexError(f"row index {row} is out of range for a tensor of {height} rows")


def fold(
    base: Tensor,
    terms: Terms,
    key: int,
    distribution: str,
    ends: Tensor | None = None,
    first: int = 0,
) -> None:
    """See :class:`zograph.kernels.engine.Engine`."""
    assert _library is not None
    seeds, coefs, scales = terms
    _library.zg_fold(
        base.data_ptr(),
        DTYPES[base.dtype],
        base.numel(),
        seeds.data_ptr(),
        coefs.data_ptr(),
        scales.data_ptr() if scales is not None else None,
        seeds.numel(),
        key,
        first,
        ends.data_ptr() if ends is not None else None,
        distribution == "normal",
        torch.get_num_threads(),
    )


def fill(out: Tensor, seed: int, key: int, distribution: str, *, first: int = 0) -> None:
    """Fill `out` with the noise of the elements `first`, `first + 1`, ... of a stream."""
    assert _library is not None
    _library.zg_fill(
        out.data_ptr(),
        DTYPES[out.dtype],
        out.numel(),
        first,
        seed,
        key,
        distribution == "normal",
        torch.get_num_threads(),
    )


def fill_address() -> int:
    """Return where `zg_fill` is, for other kernels that make noise."""
    assert _library is not None
    address = ctypes.cast(_library.zg_fill, ctypes.c_void_p).value
    assert address is not None
    return address
