"""The Triton kernels behind `zograph.fixed_points.history` on CUDA.

A program does a part of one sample's row; the parts' sums are added in order, so that results are
the same every time. Nothing here waits for the device. Imported only where Triton is installed.
"""

# The bodies are Triton's language, not Python: an annotation there would be a type of Triton.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zograph.kernels.triton_noise import launch

BLOCK = 4096
"""Elements of a program."""


@triton.jit
def _place(width, parts, block: tl.constexpr):
    """Return the sample of a program and its elements in the sample's row."""
    program = tl.program_id(0).to(tl.int64)
    return program // parts, program % parts * block + tl.arange(0, block)


@triton.jit(do_not_specialize=["width", "parts", "slots"])
def _observe(
    value, z, values, residuals, slot, active, sums,
    slots, width: tl.int64, parts: tl.int64, keeps: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Store f(z) and f(z) - z in a slot and add up the products of f(z) - z with all slots'."""
    sample, at = _place(width, parts, block)
    inside = at < width
    if tl.load(active + sample) != 0:
        f = tl.load(value + sample * width + at, mask=inside, other=0).to(tl.float32)
        r = f - tl.load(z + sample * width + at, mask=inside, other=0).to(tl.float32)
        sums += tl.program_id(0).to(tl.int64) * (slots + 2)
        tl.store(sums + slots, tl.sum(r * r).to(tl.float64))
        tl.store(sums + slots + 1, tl.sum(f * f).to(tl.float64))
        if keeps:
            own = tl.load(slot + sample)
            kept = r.to(residuals.dtype.element_ty)
            here = (sample * slots + own) * width + at
            tl.store(values + here, f, mask=inside)
            tl.store(residuals + here, kept, mask=inside)
            for s in range(slots):
                past = tl.load(residuals + (sample * slots + s) * width + at, mask=inside, other=0)
                past = tl.where(own == s, kept, past).to(tl.float32)
                tl.store(sums + s, tl.sum(r * past).to(tl.float64))


@triton.jit(do_not_specialize=["width", "parts", "slots", "damping"])
def _mix(
    weights, damping, values, residuals, out,
    slots, width: tl.int64, parts: tl.int64, damps: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Add up weight times (value + damping residual); a slot of weight 0 is not read."""
    sample, at = _place(width, parts, block)
    inside = at < width
    total = tl.zeros([block], tl.float32)
    for s in range(slots):
        weight = tl.load(weights + sample * slots + s)
        if weight != 0:
            here = (sample * slots + s) * width + at
            total += weight.to(tl.float32) * tl.load(values + here, mask=inside, other=0)
            if damps:
                residual = tl.load(residuals + here, mask=inside, other=0).to(tl.float32)
                total += (weight * damping).to(tl.float32) * residual
    tl.store(out + sample * width + at, total.to(out.dtype.element_ty), mask=inside)


def observe(
    value: Tensor, z: Tensor, values: Tensor, residuals: Tensor, slot: Tensor, active: Tensor
) -> Tensor:
    """See :class:`zograph.kernels.engine.Mixing`."""
    slots = values.shape[1]
    return _sums(value, z, values, residuals, slot, active, slots=slots, keeps=True)


def norms(value: Tensor, z: Tensor) -> Tensor:
    """See :class:`zograph.kernels.engine.Mixing`."""
    active = torch.ones(len(value), dtype=torch.bool, device=value.device)
    return _sums(value, z, value, value, active, active, slots=0, keeps=False)


def mix(weights: Tensor, damping: float, values: Tensor, residuals: Tensor, out: Tensor) -> None:
    """See :class:`zograph.kernels.engine.Mixing`."""
    batch, slots, width = values.shape
    parts = -(-width // BLOCK)
    launch(
        _mix, out, batch * parts,
        weights, damping, values, residuals, out, slots, width, parts,
        damps=damping != 0, block=BLOCK,
    )  # fmt: skip


def _sums(value: Tensor, z: Tensor, *window: Tensor, slots: int, keeps: bool) -> Tensor:
    batch, width = value.shape
    parts = -(-width // BLOCK)
    sums = torch.zeros(batch, parts, slots + 2, dtype=torch.float64, device=value.device)
    launch(
        _observe, value, batch * parts,
        value, z, *window, sums, slots, width, parts, keeps=keeps, block=BLOCK,
    )  # fmt: skip
    return sums.sum(dim=1)
