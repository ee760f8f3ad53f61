"""A state is a tuple of tensors that share dimension 0; what the solvers do to whole states."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zograph.errors import CellError, OptionError
from zograph.kernels.engine import mixing_for
from zograph.pool import pool

State = tuple[Tensor, ...]
Cell = Callable[[State], State]


def check_start(state: Sequence[Tensor]) -> State:
    """Return z0 as a state.

    Raises
    ------
    OptionError
        If it is empty, not of real floating tensors, or they differ in device or dimension 0.
    """
    if not state:
        raise OptionError("z0 is empty; it must be a tensor or a tuple of tensors.")
    for i, x in enumerate(state):
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
            found = f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise OptionError(
                f"z0[{i}] is {found}; it must be a real floating tensor whose dimension 0 counts "
                f"the samples."
            )
        if x.shape[0] != state[0].shape[0] or x.device != state[0].device:
            raise OptionError(
                f"z0[{i}] has {x.shape[0]} samples on {x.device}, z0[0] has {state[0].shape[0]} on "
                f"{state[0].device}; they must be the same."
            )
    return tuple(state)


def check_like(new: object, state: State) -> State:
    """Return what a cell gave for `state` as a state.

    Raises
    ------
    CellError
        If it differs from `state` in number, shape, dtype or device.
    """
    found = (new,) if isinstance(new, Tensor) else new
    if not isinstance(found, (tuple, list)) or len(found) != len(state):
        kind = f"{len(found)} values" if isinstance(found, (tuple, list)) else type(new).__name__
        raise CellError(f"the cell was given {len(state)} tensors and returned {kind}.")
    for i, (a, b) in enumerate(zip(found, state, strict=True)):
        if not isinstance(a, Tensor):
            raise CellError(f"the cell returned a {type(a).__name__} for state {i}.")
        what = [(f"{x.dtype}{list(x.shape)} on {x.device}") for x in (b, a)]
        if what[0] != what[1]:
            raise CellError(
                f"the cell turned state {i} from {what[0]} into {what[1]}; a fixed point needs a "
                f"map that keeps shape, dtype and device. Cast or reshape inside the cell."
            )
    return tuple(found)


@contextlib.contextmanager
def unwritten(state: State) -> Iterator[None]:
    """Raise CellError if a cell writes to the state that it is given."""
    tracked = [x for x in state if not x.is_inference()]
    before = [x._version for x in tracked]
    yield
    if [x._version for x in tracked] != before:
        raise CellError("the cell writes in place to its state: f(z) and z could not be compared.")


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that norms of a state are computed in: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def rows(state: State) -> State:
    """View each tensor as one row a sample."""
    return tuple(x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in state)


def minus(a: Tensor, b: Tensor) -> Tensor:
    """Subtract, in float32 if the operands are narrower."""
    kind = wide(a.dtype)
    return a - b if a.dtype == kind else a.to(kind) - b.to(kind)


def squares(value: Tensor, z: Tensor) -> Tensor:
    """Return the squares of each row's norms of f(z) - z and of f(z), float64[B, 2]."""
    kernels = mixing_for(value)
    if kernels is not None:
        return kernels.norms(value.contiguous(), z.contiguous())
    return torch.stack([square(minus(value, z)), square(value)], dim=1)


def square(x: Tensor) -> Tensor:
    """Return the square of each row's norm, float64[B]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=wide(x.dtype))
    return norm.double().square()


def choose(mask: Tensor, yes: State, no: State) -> State:
    """Return, sample by sample, `yes` where `mask` (bool[B]) holds and `no` elsewhere.

    Copies nothing on the CPU if the mask is the same for all samples; asks no GPU.
    """
    masks = [mask.view(-1, *[1] * (x.dim() - 1)) for x in yes]
    pairs = zip(masks, yes, no, strict=True)
    if mask.device.type != "cpu":
        return tuple(torch.where(m, a, b) for m, a, b in pairs)
    count = int(mask.sum())
    if count in (0, len(mask)):
        return yes if count else no
    # Into recycled memory: fresh pages would cost more than the copy.
    outs = [pool.empty(x.shape, x.dtype) for x in yes]
    return tuple(torch.where(m, a, b, out=out) for (m, a, b), out in zip(pairs, outs, strict=True))
