"""The mixing of a cycle's iterates: small systems in plain float64.

Written without a linear algebra library, so that the same losses give the same bits on every
machine: a resume computes again what a log has led to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]

DEPENDENT = 1e-4
"""A displacement that keeps less of its length beside the others says nothing new."""
SINGULAR = 1e-9
"""An unknown whose pivot is a smaller share of its diagonal is left out."""


def dot(a: Vector, b: Vector) -> float:
    """Return the scalar product, added up in order."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def plus(a: Vector, factor: float, b: Vector) -> list[float]:
    """Return ``a + factor b``."""
    return [x + factor * y for x, y in zip(a, b, strict=True)]


def basis(
    moves: Sequence[Vector], changes: Sequence[Vector]
) -> tuple[list[list[float]], list[list[float]]]:
    """Make displacements orthonormal, and their gradient changes alike.

    Parameters
    ----------
    moves, changes
        Displacements of the iterate, the most trusted first, and those of its gradient.

    Returns
    -------
    units, images
        Orthonormal vectors, and what the curvature makes of each.
    """
    units: list[list[float]] = []
    images: list[list[float]] = []
    for move, change in zip(moves, changes, strict=True):
        v, w = list(move), list(change)
        length = dot(v, v) ** 0.5
        for _ in range(2):  # twice is enough
            for unit, image in zip(units, images, strict=True):
                part = dot(unit, v)
                v, w = plus(v, -part, unit), plus(w, -part, image)
        left = dot(v, v) ** 0.5
        if left > DEPENDENT * length:
            units.append([x / left for x in v])
            images.append([x / left for x in w])
    return units, images


def solve(system: Sequence[Vector], right: Vector) -> list[float] | None:
    """Solve a symmetric system by Cholesky, without the unknowns that make it not positive.

    These are 0 in the result; None if all are.
    """
    n = len(right)
    low = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            left = system[i][j] - dot(low[i][:j], low[j][:j])
            if i != j:
                low[i][j] = left / low[j][j]
            else:
                low[i][i] = left**0.5 if left > SINGULAR * abs(system[i][i]) else math.inf
    if all(math.isinf(low[i][i]) for i in range(n)):
        return None
    y: list[float] = []
    for i in range(n):
        y.append((right[i] - dot(low[i][:i], y)) / low[i][i])
    x = [0.0] * n
    for i in reversed(range(n)):
        rest = sum(low[k][i] * x[k] for k in range(i + 1, n))
        x[i] = (y[i] - rest) / low[i][i]
    return x


def mix(
    points: Sequence[Vector],
    grads: Sequence[Vector],
    at: int,
    *,
    rate: float,
    ridge: float,
    damping: float,
) -> list[float] | None:
    """Return the next point of a cycle, None where the measured curvature is not positive.

    Anderson mixing of type I, its system made symmetric: of the measured displacements from the
    point `at`, the combination that minimises the quadratic model which their gradients describe,
    and from there a step of the plain map along what gradient is left.

    Parameters
    ----------
    points, grads
        Coordinates, and the projected gradients there; the newest last.
    at
        Where to start from.
    rate
        Of the plain map ``c - rate g``. Where it is longer than the model's curvature allows, the
        step along the rest is shorter.
    ridge
        In units of the system's mean diagonal.
    damping
        Share of the combination that is taken.
    """
    others = [i for i in reversed(range(len(points))) if i != at]
    moves = [plus(points[i], -1.0, points[at]) for i in others]
    changes = [plus(grads[i], -1.0, grads[at]) for i in others]
    units, images = basis(moves, changes)
    if not units:
        return None
    n = len(units)
    system = [
        [(dot(units[i], images[j]) + dot(units[j], images[i])) / 2 for j in range(n)]
        for i in range(n)
    ]
    trace = sum(system[i][i] for i in range(n))
    for i in range(n):
        system[i][i] += ridge * trace / n
    share = solve(system, [dot(u, grads[at]) for u in units])
    if share is None:
        return None
    point, rest = list(points[at]), list(grads[at])
    for s, unit, image in zip(share, units, images, strict=True):
        point, rest = plus(point, -damping * s, unit), plus(rest, -damping * s, image)
    return plus(point, -min(rate, 1 / trace) if trace > 0 else -rate, rest)
