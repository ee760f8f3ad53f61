"""Fixed points on a GPU: the solutions of the CPU, and no host synchronise inside a solve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import zograph
from tests.zograph.test_fixed_point_graphs import Model, batch, compiled
from zograph.fixed_points import SolveOptions
from zograph.fixed_points.solvers import SOLVE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SOLVERS = ("anderson", "picard")


@contextlib.contextmanager
def no_synchronise() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tanh_cell(device: str) -> Any:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device) / 9
    return lambda state: (torch.tanh(state[0] @ w + 1),)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("history", [None, torch.bfloat16])
def test_solutions_are_those_of_the_cpu(solver: Any, history: torch.dtype | None) -> None:
    options = SolveOptions(tol=1e-5, history_dtype=history)
    (expected,), _, _ = SOLVE[solver](tanh_cell("cpu"), (torch.zeros(5, 64),), options)
    (z,), info, _ = SOLVE[solver](tanh_cell("cuda"), (torch.zeros(5, 64).cuda(),), options)
    assert info.converged.all()
    torch.testing.assert_close(z.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_host_does_not_synchronise(solver: Any) -> None:
    cell, z0, options = tanh_cell("cuda"), (torch.zeros(5, 64).cuda(),), SolveOptions(tol=1e-5)
    SOLVE[solver](cell, z0, options)  # what libraries do at their first call
    with no_synchronise():
        _, info, status = SOLVE[solver](cell, z0, options)
    assert status.running == 0
    assert info.converged.all()


def test_gradients_are_those_of_the_cpu() -> None:
    def gradient(device: str) -> Tensor:
        w = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 9
        w = w.to(device).requires_grad_()
        z, _ = zograph.fixed_point(
            lambda z: torch.tanh(z @ w + 1), torch.zeros(4, 16, device=device), tol=1e-6
        )
        z.square().sum().backward()
        assert w.grad is not None
        return w.grad.cpu()

    torch.testing.assert_close(gradient("cuda"), gradient("cpu"), rtol=1e-3, atol=1e-4)


def test_a_step_is_the_same_for_any_budget() -> None:
    found = []
    for memory in (None, "minimum"):
        step = compiled(Model(2), device="cuda", memory=memory)
        losses = [float(step(**{k: v.cuda() for k, v in batch(seed=i).items()})) for i in range(3)]
        found.append(losses)
        step.close()
    assert found[0] == found[1]
