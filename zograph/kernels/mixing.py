"""The C++ kernels behind `zograph.fixed_points.history`, loaded with ctypes.

Tensors given to these functions must be contiguous CPU tensors of the dtypes stated: the callers
check, this does not.  Results differ from torch's in the order of summation only, and do not depend
on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from zograph import kernels
from zograph.kernels import DTYPES

SOURCE = Path(__file__).with_name("mixing.cpp")

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_SIGNATURES = {
    "zg_observe": (_P, _P, _P, _P, _I, _P, _P, _L, _L, _L, _I, _P),
    "zg_norms": (_P, _P, _L, _L, _I, _P),
    "zg_mix": (_P, _D, _P, _P, _I, _L, _L, _L, _I, _P),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    return kernels.load(SOURCE, _SIGNATURES)


def serves(state: Tensor) -> bool:
    """Whether the kernels mix states like this one; they are compiled at the first call."""
    return state.is_cpu and state.dtype == torch.float32 and _library() is not None


def observe(
    value: Tensor, z: Tensor, values: Tensor, residuals: Tensor, slot: Tensor, active: Tensor
) -> Tensor:
    """See :class:`zograph.kernels.engine.Mixing`."""
    library = _library()
    assert library is not None
    batch, slots, width = values.shape
    out = torch.empty(batch, slots + 2, dtype=torch.float64)
    library.zg_observe(
        value.data_ptr(),
        z.data_ptr(),
        values.data_ptr(),
        residuals.data_ptr(),
        DTYPES[residuals.dtype],
        slot.data_ptr(),
        active.data_ptr(),
        batch,
        slots,
        width,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out


def norms(value: Tensor, z: Tensor) -> Tensor:
    """See :class:`zograph.kernels.engine.Mixing`."""
    library = _library()
    assert library is not None
    out = torch.empty(len(value), 2, dtype=torch.float64)
    threads = torch.get_num_threads()
    library.zg_norms(value.data_ptr(), z.data_ptr(), *value.shape, threads, out.data_ptr())
    return out


def mix(weights: Tensor, damping: float, values: Tensor, residuals: Tensor, out: Tensor) -> None:
    """See :class:`zograph.kernels.engine.Mixing`."""
    library = _library()
    assert library is not None
    batch, slots, width = values.shape
    library.zg_mix(
        weights.data_ptr(),
        damping,
        values.data_ptr(),
        residuals.data_ptr(),
        DTYPES[residuals.dtype],
        batch,
        slots,
        width,
        torch.get_num_threads(),
        out.data_ptr(),
    )
