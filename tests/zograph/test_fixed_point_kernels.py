"""The kernels of mixing against the operators that they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import zograph
from zograph.fixed_points.history import History
from zograph.fixed_points.ring import solve
from zograph.fixed_points.state import squares
from zograph.kernels import mixing

native = pytest.mark.skipif(
    not mixing.serves(torch.zeros(1)), reason="no compiler, or kernels are switched off"
)
SHAPES = [(3, 5), (2, 4096), (4, 3, 7, 401), (1, 70000), (2, 0)]


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "serves", lambda *args: False)


def filled(shape: tuple[int, ...], dtype: torch.dtype | None, slots: int = 4) -> Any:
    """A history with three of four slots written, and what was seen of the last."""
    generator = torch.Generator().manual_seed(0)
    history = History((torch.zeros(shape),), slots, dtype)
    active = torch.ones(shape[0], dtype=torch.bool)
    for slot in (0, 2, 1):
        value, z = (torch.randn(shape, generator=generator) for _ in range(2))
        seen = history.observe(torch.full((shape[0],), slot), active, (value,), (z,))
    return history, seen


@native
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_they_do_what_the_operators_do(
    shape: tuple[int, ...], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(shape[0], 4, generator=torch.Generator().manual_seed(1)).double()
    weights[:, 3] = 0  # not written
    history, seen = filled(shape, dtype)
    found = [history.mix(weights, damping)[0] for damping in (0.0, -1.0, -0.25)]
    without_kernels(monkeypatch)
    history, expected = filled(shape, dtype)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5 * max(1, math.prod(shape[1:])) ** 0.5}
    loose = close if dtype is None else {"rtol": 1e-2, "atol": 0.01 * math.prod(shape[1:]) ** 0.5}
    torch.testing.assert_close(seen.products[:, :3], expected.products[:, :3], **loose)
    torch.testing.assert_close(seen.residual, expected.residual, rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.value, expected.value, rtol=1e-5, atol=0)
    for x, damping in zip(found, (0.0, -1.0, -0.25), strict=True):
        torch.testing.assert_close(x, history.mix(weights, damping)[0], rtol=1e-5, atol=1e-5)


@native
def test_norms_without_storing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (1, 16, 63, 5000, 70000):
        value, z = (torch.randn(3, width, generator=generator) for _ in range(2))
        found = squares(value, z)
        with monkeypatch.context() as context:
            without_kernels(context)
            torch.testing.assert_close(found, squares(value, z), rtol=1e-5, atol=0)


@native
def test_bits_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            history, seen = filled((2, 150000), None)
            mixed = history.mix(torch.tensor([[0.2, 0.3, 0.5, 0]] * 2).double(), 0.0)[0]
            found.append((seen.products[:, :3], seen.residual, mixed))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=native), False])
def test_what_is_not_finite_stays_out(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        without_kernels(monkeypatch)
    history = History((torch.zeros(2, 40),), 3, None)
    slot, active = torch.tensor([0, 0]), torch.tensor([True, True])
    history.observe(slot, active, (torch.ones(2, 40),), (torch.zeros(2, 40),))
    bad = torch.ones(2, 40)
    bad[0, 7] = math.inf
    bad[1, 3] = math.nan
    seen = history.observe(slot + 1, active, (bad,), (torch.zeros(2, 40),))
    assert not seen.value.isfinite().any()
    weights = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]).double()
    assert torch.equal(history.mix(weights, 0.0)[0], torch.ones(2, 40))


@pytest.mark.parametrize("kernels", [pytest.param(True, marks=native), False])
def test_samples_that_are_not_active_are_left_alone(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        without_kernels(monkeypatch)
    history = History((torch.zeros(2, 40),), 3, None)
    slot = torch.tensor([1, 1])
    for value, active in ((1.0, [True, True]), (2.0, [False, True])):
        z = (torch.zeros(2, 40),)
        history.observe(slot, torch.tensor(active), (torch.full((2, 40), value),), z)
    weights = torch.tensor([[0, 1.0, 0]] * 2).double()
    assert history.mix(weights, 0.0)[0][:, 0].tolist() == [1.0, 2.0]


@native
@pytest.mark.parametrize("solver", ["anderson", "picard"])
def test_solves_agree_with_and_without_kernels(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 9

    def solved() -> tuple[Tensor, Tensor]:
        z, info = zograph.fixed_point(
            lambda z: torch.tanh(z @ w + 1), torch.zeros(5, 64), tol=1e-5, solver=solver
        )
        assert info.converged.all()
        return z, info.iterations

    z, iterations = solved()
    without_kernels(monkeypatch)
    other, again = solved()
    torch.testing.assert_close(z, other, rtol=1e-4, atol=1e-5)
    assert (iterations - again).abs().max() <= 1


def test_small_systems() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 5, 5, generator=generator, dtype=torch.float64)
    matrix = a @ a.mT + 1e-3 * torch.eye(5, dtype=torch.float64)
    right = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(solve(matrix, right), torch.linalg.solve(matrix, right))
    singular = torch.ones(1, 3, 3, dtype=torch.float64)
    assert not solve(singular, torch.ones(1, 3, dtype=torch.float64)).isfinite().all()
