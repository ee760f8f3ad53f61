from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zograph
from zograph.errors import CellError

SOLVERS = ("anderson", "picard")
EXACT: dict[str, Any] = {"tol": 1e-13, "max_iter": 400}


def weights(n: int = 4, scale: float = 0.25) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = scale * torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(3, n, generator=generator, dtype=torch.float64)
    return w.requires_grad_(), x.requires_grad_()


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck(solver: Any) -> None:
    def solved(w: Tensor, x: Tensor) -> Tensor:
        z, _ = zograph.fixed_point(
            lambda z: torch.tanh(z @ w + x), torch.zeros_like(x), solver=solver, **EXACT
        )
        return z

    assert torch.autograd.gradcheck(solved, weights())


def test_gradcheck_of_a_tuple() -> None:
    def solved(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        def cell(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tanh(b @ w + x), 0.5 * torch.sin(a @ w.T)

        z, _ = zograph.fixed_point(cell, (torch.zeros_like(x), torch.ones_like(x)), **EXACT)
        return z[0], z[1]

    assert torch.autograd.gradcheck(solved, weights(3))


def test_it_is_the_gradient_of_the_unrolled_iteration() -> None:
    w, x = weights(6)
    z = torch.zeros_like(x)
    for _ in range(300):
        z = torch.tanh(z @ w + x)
    expected = torch.autograd.grad(z.square().sum(), (w, x))
    with torch.no_grad():
        start = torch.zeros_like(x)
    z, _ = zograph.fixed_point(lambda z: torch.tanh(z @ w + x), start, **EXACT)
    found = torch.autograd.grad(z.square().sum(), (w, x))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_values_are_those_without_gradients() -> None:
    w, x = weights()

    def solved() -> Tensor:
        z, _ = zograph.fixed_point(lambda z: torch.tanh(z @ w + x), torch.zeros_like(x))
        return z

    with torch.no_grad():
        plain = solved()
    assert torch.equal(solved(), plain)
    assert solved().requires_grad
    assert not plain.requires_grad


def test_nothing_to_differentiate_gives_a_plain_tensor() -> None:
    z0 = torch.zeros(1, 1, requires_grad=True)
    z, _ = zograph.fixed_point(torch.cos, z0)
    assert not z.requires_grad


def test_a_state_that_the_loss_does_not_use() -> None:
    w, x = weights()
    z, _ = zograph.fixed_point(
        lambda a, b: (torch.tanh(a @ w + x), torch.zeros_like(b)),
        (torch.zeros_like(x), torch.ones_like(x)),
        **EXACT,
    )
    (found,) = torch.autograd.grad(z[0].sum(), w)
    alone, _ = zograph.fixed_point(lambda a: torch.tanh(a @ w + x), torch.zeros_like(x), **EXACT)
    (expected,) = torch.autograd.grad(alone.sum(), w)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Deq(nn.Module):
    """A deep-equilibrium classifier of a closed-over cell."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mix, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        with torch.no_grad():
            self.mix.weight.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        z, _ = zograph.fixed_point(
            lambda z: torch.tanh(self.mix(z) + x), torch.zeros_like(x), tol=1e-3, max_iter=200
        )
        return self.head(z)


def test_a_deq_trains_by_backpropagation() -> None:
    model = Deq()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=generator)
    y = x[:, :3].argmax(dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_backward_system_warns_by_itself() -> None:
    w, x = weights(scale=0.45)
    z, _ = zograph.fixed_point(
        lambda z: torch.tanh(z @ w + 0.1 * x),
        torch.zeros_like(x),
        **EXACT,
        backward_tol=1e-12,
        backward_max_iter=3,
    )
    with pytest.warns(UserWarning, match="backward system of a fixed point: 3 of 3"):
        z.sum().backward()


def test_nan_in_the_backward_system() -> None:
    w, x = weights()
    z, _ = zograph.fixed_point(lambda z: torch.tanh(z @ w + x), torch.zeros_like(x), **EXACT)
    with pytest.raises(CellError, match="backward system"):
        (z * torch.nan).sum().backward()
