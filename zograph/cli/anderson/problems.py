"""Fixed-point problems: the trained cell, the same scaled to contract by a factor, a linear map."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import zograph
from zograph.cli.anderson.model import Classifier

TRAINED, LINEAR = "trained", "linear"
WIDTH, FACTOR = 2048, 0.99
"""Of the linear map: numbers a sample, and its largest eigenvalue."""
POWER, KEPT = 30, 10
"""Steps of the power iteration, and how many of the last give the spectral radius."""


@dataclass(frozen=True)
class Problem:
    """A map, where to start, and each sample's spectral radius at the solution, float64[B]."""

    name: str
    f: Callable[[Tensor], Tensor]
    z0: Tensor
    radius: Tensor


@torch.no_grad()
def problems(model: Classifier, images: Tensor, names: Sequence[str]) -> list[Problem]:
    """Return the problems of these names: ``trained``, a factor to contract by, or ``linear``.

    A sample's cell is scaled about its own solution z*: ``z* + s (f(z) - z*)``. That keeps z*, and
    the Jacobian there is s times the cell's, whose spectral radius ``s`` brings to the factor.
    """
    x = model.stem(images)
    z0 = torch.zeros_like(x)

    def cell(z: Tensor) -> Tensor:
        value: Tensor = model.cell(z, x)
        return value

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not reach tol", category=UserWarning)
        solution, _ = zograph.fixed_point(cell, z0, tol=1e-5, max_iter=200)
    radius = spectral_radius(cell, solution)

    def problem(name: str) -> Problem:
        if name == TRAINED:
            return Problem(name, cell, z0, radius)
        if name == LINEAR:
            return linear(len(x))
        scale = (float(name) / radius).float().view(-1, 1, 1, 1)
        scaled = torch.full_like(radius, float(name))
        return Problem(name, lambda z: torch.lerp(solution, cell(z), scale), z0, scaled)

    return [problem(name) for name in names]


def linear(batch: int) -> Problem:
    """Return ``z A + x``, A symmetric with a spectrum even from 0 to 0.99, float32[batch, 2048]."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    matrix = (basis * torch.linspace(0, FACTOR, WIDTH)) @ basis.T
    x = torch.randn(batch, WIDTH, generator=generator)
    radius = torch.full((batch,), FACTOR, dtype=torch.float64)
    return Problem(LINEAR, lambda z: torch.addmm(x, z, matrix), torch.zeros_like(x), radius)


def spectral_radius(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Estimate the spectral radius of each sample's Jacobian at z, float64[B].

    The geometric mean of the last growths of a power iteration with the transpose, which has the
    same spectrum; a mean, because a pair of complex eigenvalues makes the growth swing.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = f(z)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    growths = []
    for _ in range(POWER):
        v = v / v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))
        (v,) = torch.autograd.grad(value, z, v, retain_graph=True)
        growths.append(v.flatten(1).norm(dim=1).double())
    return torch.stack(growths[-KEPT:]).log().mean(dim=0).exp()
