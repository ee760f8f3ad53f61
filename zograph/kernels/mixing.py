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
from torch._subclasses.fake_tensor import FakeTensor

from zograph import kernels
from zograph.kernels import DTYPES

SOURCE = Path(__file__).with_name("mixing.cpp")
HISTORY = (torch.float32, torch.bfloat16)

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_SIGNATURES = {
    "zg_observe": (_P, _P, _P, _P, _I, _P, _P, _L, _L, _L, _I, _P),
    "zg_norms": (_P, _P, _L, _L, _I, _P),
    "zg_mix": (_P, _D, _P, _P, _I, _L, _L, _L, _I, _P),
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    return kernels.load(SOURCE, _SIGNATURES)


def serves(state: Tensor, history: torch.dtype = torch.float32) -> bool:
    """Whether the kernels mix states like this one; they are compiled at the first call."""
    known = (
        state.is_cpu
        and not isinstance(state, FakeTensor)
        and state.dtype == torch.float32
        and history in HISTORY
    )
    return known and _library() is not None


def observe(
    value: Tensor, z: Tensor, values: Tensor, residuals: Tensor, slot: Tensor, active: Tensor
) -> Tensor:
    """Store f(z) and f(z) - z in the slots of the active samples; return the sums.

    Parameters
    ----------
    value, z : Tensor
        float32[B, D].
    values, residuals : Tensor
        float32[B, S, D]; float32 or bfloat16[B, S, D].
    slot, active : Tensor
        int64[B], bool[B].

    Returns
    -------
    Tensor
        float64[B, S + 2]: the products of f(z) - z with the residuals in all slots, its square and
        that of f(z); 0 for samples that are not active.
    """
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
    """Return the squares of each row's f(z) - z and f(z), float64[B, 2], of float32[B, D]."""
    library = _library()
    assert library is not None
    out = torch.empty(len(value), 2, dtype=torch.float64)
    threads = torch.get_num_threads()
    library.zg_norms(value.data_ptr(), z.data_ptr(), *value.shape, threads, out.data_ptr())
    return out


def mix(weights: Tensor, damping: float, values: Tensor, residuals: Tensor, out: Tensor) -> None:
    """Write the sum over slots of weight times (value + damping residual) into float32[B, D].

    A slot of weight 0 is not read.
    """
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
