"""The C++ codec behind `zograph.codec`, loaded with ctypes; the same bits as its definition.

Tensors given to these functions must be contiguous CPU tensors of the dtypes stated: the callers
check, this does not.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from zograph import kernels
from zograph.formats import Format
from zograph.kernels import DTYPES, Terms

SOURCE = Path(__file__).with_name("codec.cpp")

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "zg_decode": (_P, _I, _L, _P, _I, _L, _P, _P, _P, _L, _L, _P, _L, _I, _I, _I, _P, _P),
    "zg_encode": (_P, _I, _L, _I, _P, _I, _P),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    return kernels.load(SOURCE, _SIGNATURES)


def serves(weight: Tensor) -> bool:
    """Whether the kernel converts weights like this one; it is compiled at the first call."""
    return weight.is_cpu and weight.dtype in DTYPES and _library() is not None


def encode(weight: Tensor, form: Format, stored: Tensor) -> Tensor:
    """See :class:`zograph.kernels.engine.Codec`."""
    library = _library()
    assert library is not None
    counts = torch.zeros(2, dtype=torch.int64)
    library.zg_encode(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        weight.numel(),
        form.code,
        stored.data_ptr(),
        torch.get_num_threads(),
        counts.data_ptr(),
    )
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
    library = _library()
    assert library is not None
    seeds, coefs, scales = terms
    counts = torch.zeros(2, dtype=torch.int64)
    library.zg_decode(
        stored.data_ptr(),
        form.code,
        out.numel(),
        out.data_ptr(),
        DTYPES[out.dtype],
        first,
        seeds.data_ptr(),
        coefs.data_ptr(),
        scales.data_ptr() if scales is not None else None,
        seeds.numel(),
        key,
        ends.data_ptr(),
        salt,
        stochastic,
        distribution == "normal",
        torch.get_num_threads(),
        kernels.fill_address(),
        counts.data_ptr(),
    )
    return counts
