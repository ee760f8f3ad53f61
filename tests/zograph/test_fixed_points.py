from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zograph
from zograph.errors import CellError, OptionError, ZographError
from zograph.fixed_points.progress import FLOOR
from zograph.fixed_points.solvers import SOLVE

SOLVERS = ("anderson", "picard")
Cell = Callable[[Tensor], Tensor]


def linear(rates: list[float], n: int = 24, dtype: torch.dtype = torch.float64) -> Cell:
    """A map per sample with spectrum up to its rate, and no two samples alike."""
    generator = torch.Generator().manual_seed(n)
    maps, shifts = [], []
    for rate in rates:
        q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        spectrum = rate * torch.linspace(-0.5, 1, n, dtype=torch.float64)
        maps.append((q * spectrum) @ q.T)
        shifts.append(torch.randn(n, generator=generator, dtype=torch.float64))
    a, b = torch.stack(maps).to(dtype), torch.stack(shifts).to(dtype)
    return lambda z: torch.einsum("bij,bj->bi", a, z) + b


def measured(f: Cell, z: Tensor) -> Tensor:
    value = f(z)
    return (value - z).norm(dim=1) / (value.norm(dim=1) + FLOOR)


class Counted:
    """A cell that counts its evaluations and keeps what it was given."""

    def __init__(self, f: Cell) -> None:
        self.f, self.seen = f, []  # type: ignore[var-annotated]

    def __call__(self, z: Tensor) -> Tensor:
        if not z.requires_grad:  # the last evaluation is for the derivative
            self.seen.append(z.clone())
        return self.f(z)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_are_those_of_the_returned_z(solver: Any, dtype: torch.dtype) -> None:
    f = linear([0.3, 0.6, 0.99], n=120, dtype=dtype)
    z0 = torch.zeros(3, 120, dtype=dtype)
    with pytest.warns(UserWarning, match="1 of 3 samples did not reach tol=0.0001 in max_iter=30"):
        z, info = zograph.fixed_point(f, z0, tol=1e-4, max_iter=30, solver=solver)
    assert z.dtype == info.residual.dtype == dtype
    assert info.iterations.dtype == torch.int64
    torch.testing.assert_close(measured(f, z), info.residual, rtol=1e-2, atol=0)
    assert torch.equal(info.converged, info.residual <= 1e-4)
    assert info.converged[:2].all()


def test_anderson_needs_fewer_evaluations() -> None:
    f, z0 = linear([0.95] * 4, n=60), torch.zeros(4, 60, dtype=torch.float64)
    counts = {}
    for solver in SOLVERS:
        _, info = zograph.fixed_point(f, z0, tol=1e-6, max_iter=400, solver=solver)
        assert info.converged.all()
        counts[solver] = info.iterations.double().mean()
    assert counts["anderson"] < 0.35 * counts["picard"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_samples_are_frozen(solver: Any) -> None:
    f = Counted(linear([0.05, 0.95]))
    z, info = zograph.fixed_point(
        f, torch.zeros(2, 24, dtype=torch.float64), tol=1e-6, max_iter=300, solver=solver
    )
    first, last = info.iterations.tolist()
    assert first < last == len(f.seen)
    later = torch.stack([x[0] for x in f.seen[first:]])
    assert torch.equal(later, later[:1].expand_as(later))
    alone, _ = zograph.fixed_point(
        linear([0.05]), torch.zeros(1, 24, dtype=torch.float64), tol=1e-6, solver=solver
    )
    torch.testing.assert_close(z[0], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_best_iterate_is_returned(solver: Any) -> None:
    """The residual falls at first and rises then; what comes back is the bottom."""
    seen: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.clone())
        gap = [1.0, 0.5, 0.1, 0.3, 0.7, 2.0][min(len(seen) - 1, 5)]
        return z + gap

    with pytest.warns(UserWarning, match="did not reach"):
        z, info = zograph.fixed_point(
            f, torch.zeros(1, 1), max_iter=6, stop="absolute", solver=solver
        )
    torch.testing.assert_close(z, seen[2])
    assert info.residual.item() == pytest.approx(0.1, rel=1e-5)
    assert not info.converged.any()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(0.3, 0.99),
    window=st.integers(2, 6),
    kink=st.booleans(),
)
def test_never_slower_than_forward_steps_by_more_than_the_stated_factor(
    seed: int, rate: float, window: int, kink: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    a *= rate / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    f = Counted(lambda z: ((z @ a).abs() if kink else z @ a) + b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, info = zograph.fixed_point(
            f,
            torch.zeros(1, 8, dtype=torch.float64),
            tol=1e-9,
            max_iter=60,
            window=window,
            stop="absolute",
            solver="anderson",
        )
    residuals = [float((f.f(z) - z).norm()) for z in f.seen]
    for n in range(1, len(residuals) + 1):
        bound = rate ** ((n - 1) // (window + 1)) * residuals[0]
        assert min(residuals[:n]) <= bound * (1 + 1e-9)
    assert info.residual.item() == pytest.approx(min(residuals), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("seed", [3, 4])
def test_where_the_residual_rises_on_the_way_forward_steps_lead_out(seed: int) -> None:
    """No contraction in the norm; mixing alone is caught for ever at a minimum of the residual."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    w = 1.8 * w.triu(1) + 0.9 * torch.eye(16, dtype=torch.float64)
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    counts = {}
    for solver in SOLVERS:
        _, info = zograph.fixed_point(
            lambda z: torch.tanh(z @ w + x),
            torch.zeros_like(x),
            tol=1e-6,
            max_iter=400,
            solver=solver,
        )
        assert info.converged.all()
        counts[solver] = info.iterations
    assert counts["anderson"].max() < 1.2 * counts["picard"].max()
    assert counts["anderson"].double().mean() < 0.8 * counts["picard"].double().mean()


@pytest.mark.parametrize("solver", SOLVERS)
def test_tuples_of_states_are_solved_as_one(solver: Any) -> None:
    a = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.15

    def joint(z: Tensor) -> Tensor:
        return torch.tanh(z @ a + 1)

    def split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = joint(torch.cat([x.flatten(1), y], dim=1))
        return both[:, :4].view(-1, 2, 2), both[:, 4:]

    options: Any = {"tol": 1e-9, "solver": solver}
    whole, one = zograph.fixed_point(joint, torch.zeros(3, 5, dtype=torch.float64), **options)
    z0 = (torch.zeros(3, 2, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
    (x, y), two = zograph.fixed_point(split, z0, **options)
    torch.testing.assert_close(torch.cat([x.flatten(1), y], dim=1), whole)
    assert torch.equal(one.iterations, two.iterations)


def test_exact_and_singular_mixing_systems() -> None:
    """Equal residuals make the Gram matrix singular, a start at the solution makes it zero."""
    target = torch.ones(2, 3)
    z, info = zograph.fixed_point(lambda z: target + 0 * z, target.clone(), ridge=0.0)
    assert torch.equal(z, target)
    assert info.iterations.tolist() == [1, 1]
    z, info = zograph.fixed_point(lambda z: target + 0 * z, torch.zeros(2, 3), ridge=0.0)
    assert torch.equal(z, target)
    with pytest.warns(UserWarning, match="2 of 2 samples did not reach"):
        z, info = zograph.fixed_point(lambda z: z + 1, torch.zeros(2, 3), ridge=0.0, tol=1e-9)
    assert z.isfinite().all()
    assert info.residual.isfinite().all()


@pytest.mark.parametrize(("solver", "power"), [("picard", 1), ("picard", 2), ("anderson", 2)])
def test_divergence_stops_and_says_so(solver: Any, power: int) -> None:
    """One sample contracts, the other grows: linearly (5x an iteration) or to infinity."""

    def f(z: Tensor) -> Tensor:
        grown = 5 * z.abs() ** power + 1
        return torch.stack([0.1 * z[0] + 1, grown[1]])

    with pytest.warns(UserWarning, match="1 of 2 samples diverged"):
        z, info = zograph.fixed_point(
            f, torch.ones(2, 1), stop="absolute", max_iter=200, solver=solver
        )
    assert info.converged.tolist() == [True, False]
    assert z.isfinite().all()
    assert info.residual[1] == (f(z) - z)[1].abs()
    assert info.iterations[1] < 100


def test_a_linear_map_that_expands_is_solved_by_mixing() -> None:
    z, info = zograph.fixed_point(lambda z: 3 * z - 1, torch.zeros(1, 4), tol=1e-6)
    assert info.converged.all()
    torch.testing.assert_close(z, torch.full((1, 4), 0.5))


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_from_the_cell(solver: Any) -> None:
    def f(z: Tensor) -> Tensor:
        out = 0.5 * z + 1
        out[1] = math.nan
        return out

    with pytest.raises(CellError, match="NaN for 1 of 3 samples"):
        zograph.fixed_point(f, torch.zeros(3, 2), solver=solver)
    z, info, status = SOLVE[solver](
        lambda s: (f(s[0]),), (torch.zeros(3, 2),), zograph.fixed_points.SolveOptions()
    )
    assert info.converged.tolist() == [True, False, True]
    assert info.residual.isnan().tolist() == [False, True, False]
    assert torch.equal(z[0][1], torch.zeros(2))
    assert status.broken == 1


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (lambda z: z[:, :1], r"float32\[2, 3\] on cpu into torch.float32\[2, 1\]"),
        (lambda z: z.double(), "into torch.float64"),
        (lambda z: (z, z), "returned 2 values"),
        (lambda z: None, "returned NoneType"),
        (lambda z: z.mul_(0.5).add_(1), "writes in place to its state"),
        (lambda z: (None,), "NoneType for state 0"),
    ],
)
def test_cells_that_are_no_map(cell: Any, message: str) -> None:
    with pytest.raises(CellError, match=message):
        zograph.fixed_point(cell, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tol", 0.0),
        ("tol", math.nan),
        ("backward_tol", -1.0),
        ("max_iter", 0),
        ("max_iter", 2.5),
        ("backward_max_iter", 0),
        ("window", 1),
        ("window", True),
        ("beta", 0.0),
        ("beta", 1.5),
        ("ridge", -1e-9),
        ("ridge", math.inf),
        ("solver", "newton"),
        ("stop", "never"),
        ("history_dtype", torch.int8),
    ],
)
def test_options_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{option}"):
        zograph.fixed_point(torch.cos, torch.zeros(1, 1), **{option: value})


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        ((), "is empty"),
        (torch.tensor(1.0), "dimension 0 counts"),
        (torch.zeros(2, dtype=torch.int64), "real floating"),
        ((torch.zeros(2), torch.zeros(3)), "2"),
        (([1.0],), "list"),
    ],
)
def test_starts_that_are_no_state(z0: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        zograph.fixed_point(lambda *z: z, z0)
    assert issubclass(OptionError, ZographError)


def test_beta_damps() -> None:
    f = linear([0.9], n=8)
    first = Counted(f)
    with pytest.warns(UserWarning, match="did not reach"):
        zograph.fixed_point(
            first, torch.zeros(1, 8, dtype=torch.float64), beta=0.25, max_iter=2, solver="anderson"
        )
    torch.testing.assert_close(first.seen[1], 0.25 * f(torch.zeros(1, 8, dtype=torch.float64)))


@pytest.mark.parametrize("history", [torch.bfloat16, torch.float64])
def test_the_history_may_be_of_another_dtype(history: torch.dtype) -> None:
    f = linear([0.9, 0.8], dtype=torch.float32)
    z0 = torch.zeros(2, 24)
    _, plain = zograph.fixed_point(f, z0, tol=1e-5, max_iter=99)
    z, info = zograph.fixed_point(f, z0, tol=1e-5, max_iter=99, history_dtype=history)
    assert info.converged.all()
    assert (measured(f, z) <= 1.02e-5).all()
    assert info.iterations.max() <= 1.5 * plain.iterations.max()


@pytest.mark.parametrize("solver", SOLVERS)
def test_narrow_states_are_mixed_in_float32(solver: Any) -> None:
    f = linear([0.6, 0.8], dtype=torch.bfloat16)
    z, info = zograph.fixed_point(
        f, torch.zeros(2, 24, dtype=torch.bfloat16), tol=2e-2, solver=solver
    )
    assert z.dtype == torch.bfloat16
    assert info.residual.dtype == torch.float32
    assert info.converged.all()


def test_a_window_larger_than_the_dimension() -> None:
    z, info = zograph.fixed_point(torch.cos, torch.zeros(3, 1), tol=1e-7, window=9)
    assert info.converged.all()
    torch.testing.assert_close(z, z.cos())


def test_an_empty_batch() -> None:
    z, info = zograph.fixed_point(torch.cos, torch.zeros(0, 4))
    assert z.shape == (0, 4)
    assert info.converged.shape == (0,)


def test_non_contiguous_states() -> None:
    f = linear([0.5, 0.6], n=12)
    z0 = torch.zeros(4, 3, 2, dtype=torch.float64).permute(2, 1, 0)

    def cell(z: Tensor) -> Tensor:
        return f(z.flatten(1)).view(2, 4, 3).transpose(1, 2)

    z, info = zograph.fixed_point(cell, z0, tol=1e-8)
    assert info.converged.all()
    torch.testing.assert_close(cell(z), z)
