"""The derivative of a fixed point by the implicit function theorem.

With ``z = f(z, w)`` the gradient of a loss reaches w through one evaluation of the cell: where
g is the loss's gradient for z, the cell's own vjp is applied to u, which solves
``u = g + (df/dz)^T u``, a fixed-point problem again. Nothing of the iteration is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zograph.fixed_points.options import SolveOptions
from zograph.fixed_points.reporting import report
from zograph.fixed_points.solvers import SOLVE
from zograph.fixed_points.state import Cell, State


def attach(cell: Cell, z: State, options: SolveOptions) -> State:
    """Return `z` with a derivative for what the cell closes over; `z` itself if that is nothing.

    Costs one evaluation of the cell, whose graph is kept.

    Parameters
    ----------
    cell
        The map.
    z : tuple of Tensor
        Its fixed point.
    options : SolveOptions
        Of the backward system.
    """
    with torch.enable_grad():
        start = tuple(x.detach().requires_grad_() for x in z)
        value = cell(start)
    if not _reaches_others(value, start):
        return z
    found = _Implicit.apply(_Linear(start, value, options), *z, *value)  # type: ignore[no-untyped-call]
    return tuple(found)


@dataclass(frozen=True)
class _Linear:
    """The cell linearised at the fixed point: the graph from `start` to `value`."""

    start: State
    value: State
    options: SolveOptions

    def solve(self, grads: State) -> State:
        """Return the u with ``u = grads + (df/dz)^T u``."""
        u, _, status = SOLVE[self.options.solver](
            lambda u: self._step(grads, u), grads, self.options
        )
        report(status, len(grads[0]), self.options, "the backward system of a fixed point")
        return u

    def _step(self, grads: State, u: State) -> State:
        pairs = [(y, x) for y, x in zip(self.value, u, strict=True) if y.requires_grad]
        outputs, inputs = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs, self.start, inputs, retain_graph=True, allow_unused=True
        )
        return tuple(g if v is None else g + v for g, v in zip(grads, found, strict=True))


class _Implicit(torch.autograd.Function):
    """z in the forward pass; in the backward pass, the gradient that the cell's output must get."""

    @staticmethod
    def forward(ctx: Any, linear: _Linear, *tensors: Tensor) -> State:
        ctx.linear = linear
        return tuple(x.clone() for x in tensors[: len(linear.start)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None for _ in grads), *ctx.linear.solve(grads)


def _reaches_others(value: State, start: State) -> bool:
    """Whether the values' graph leads to a leaf other than the state."""
    own = {id(x) for x in start}
    stack = [x.grad_fn for x in value]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            return True
        stack += [n for n, _ in node.next_functions]
    return False
