"""The deep-equilibrium classifier of the benchmark, and the recipe that trains it.

The cell is the one of the CIFAR-10 model of Kolter, Duvenaud and Johnson's tutorial on implicit
layers (2020), which arXiv 2410.19460 measures.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, relu

import zograph
from zograph.cli.anderson.images import CLASSES

CHANNELS, INNER, GROUPS, GRID = 48, 64, 8, 4
BATCH, LR = 32, 1e-3

SMOOTH, POWER = 1.0, 6
"""The weight of :func:`stretch` in the loss, and its steps of the power iteration."""


class Cell(nn.Module):
    """``z -> norm(relu(z + norm(x + conv(norm(relu(conv z))))))``, float32[B, 48, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, INNER, 3, padding=1, bias=False)
        self.second = nn.Conv2d(INNER, CHANNELS, 3, padding=1, bias=False)
        self.inner = nn.GroupNorm(GROUPS, INNER)
        self.middle, self.outer = (nn.GroupNorm(GROUPS, CHANNELS) for _ in range(2))
        for convolution in (self.first, self.second):
            nn.init.normal_(convolution.weight, std=0.01)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Apply the cell to the state, given the input that is injected."""
        y: Tensor = self.inner(relu(self.first(z)))
        found: Tensor = self.outer(relu(z + self.middle(x + self.second(y))))
        return found


class Classifier(nn.Module):
    """Stem, fixed point of the cell, average pool, linear head.

    Parameters
    ----------
    **options
        Of :func:`zograph.fixed_point`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS))
        self.cell = Cell()
        self.head = nn.Linear(CHANNELS * GRID**2, CLASSES)
        self.options = options

    def solve(self, x: Tensor) -> Tensor:
        """Return the fixed point for what the stem gives, of the same shape."""
        z: Tensor
        z, _ = zograph.fixed_point(lambda z: self.cell(z, x), torch.zeros_like(x), **self.options)
        return z

    def classify(self, z: Tensor) -> Tensor:
        """Return the logits of a state, float32[B, 10]."""
        found: Tensor = self.head(avg_pool2d(z, z.shape[-1] // GRID).flatten(1))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images, float32[B, 3, H, W] with H = W a multiple of 4."""
        return self.classify(self.solve(self.stem(images)))


def stretch(cell: Cell, z: Tensor, x: Tensor) -> Tensor:
    """Estimate the mean 8th power of the spectral radii of the samples' Jacobians at z.

    A high power, for the samples that converge last. The radius is taken to be ``||J^T v||`` for
    the unit v that a few steps of the power iteration lead to. Differentiable for the weights.
    """
    z = z.detach().requires_grad_()
    value = cell(z, x)
    v = torch.randn_like(value)
    for _ in range(POWER):
        (v,) = torch.autograd.grad(value, z, _unit(v), retain_graph=True)
    (found,) = torch.autograd.grad(value, z, _unit(v), create_graph=True)
    return found.square().flatten(1).sum(dim=1).pow(4).mean()


def _unit(v: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    return v / size


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in torch's random order without end."""
    while True:
        for rows in torch.split(torch.randperm(len(images)), size):
            if len(rows) == min(size, len(images)):
                yield images[rows], labels[rows]


def objective(model: Classifier, pixels: Tensor, labels: Tensor, smooth: float) -> Tensor:
    """Return the loss of a batch: cross entropy, and :func:`stretch` times `smooth`."""
    x = model.stem(pixels)
    z = model.solve(x)
    spread = stretch(model.cell, z, x.detach())
    return cross_entropy(model.classify(z), labels) + smooth * spread


def train(pixels: Tensor, labels: Tensor, steps: int) -> Classifier:
    """Train a classifier by the recipe: seed 0, Adam at 1e-3 with a cosine, batches of 32.

    Inexact solves do: 15 evaluations at most, 8 backwards.
    """
    torch.manual_seed(0)
    model = Classifier(tol=1e-2, max_iter=15, backward_max_iter=8).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = batches(pixels, labels, BATCH)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not reach tol", category=UserWarning)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(objective(model, *next(found), SMOOTH))
            optimizer.step()
            schedule.step()
    return model.eval()
