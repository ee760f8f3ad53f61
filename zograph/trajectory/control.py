"""What a step of a mixed trajectory does: a pure function of the losses measured so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from zograph.trajectory.mixing import dot, mix, plus
from zograph.trajectory.options import Anderson

FIRST, GROWTH, LONGEST = 16, 16, 2048
"""Plain steps behind the first cycle that fails, how many times more behind the next, at most."""
JUDGED = 3
"""Steps of a cycle before its gain is judged."""
WORTH = 1.5
"""Plain steps that a step of a cycle has to be worth. Mixing moves far along flat directions, too,
which no loss shows and later steps have to make up for."""

Point = tuple[float, ...]


@dataclass(frozen=True)
class State:
    """Where a run stands between two steps: what its log says, and nothing else."""

    step: int = 0
    """Steps so far."""
    start: int = 0
    """The step that the cycle under way began with."""
    points: tuple[Point, ...] = ()
    """Coordinates of its iterates; the next step measures at the last one."""
    grads: tuple[Point, ...] = ()
    """Projected gradients at them, the last one's not measured yet."""
    losses: tuple[float, ...] = ()
    left: int = 0
    """Plain steps to go before the next cycle."""
    pause: int = FIRST
    """Plain steps behind the next cycle that fails."""
    cycles: int = 0
    mixed: int = 0
    """Steps that were mixed."""
    rejected: int = 0
    """Cycles ended by a loss that did not support them."""
    closed: int = 0
    """Cycles ended because the losses were too noisy."""
    slow: int = 0
    """Cycles that gained too little, and were taken back."""

    @property
    def seed_step(self) -> int:
        """The step whose seeds the next step uses."""
        return self.start if self.points else self.step


def advance(
    state: State, options: Anderson, losses: Sequence[Sequence[float]], *, lr: float, eps: float
) -> tuple[State, list[float] | None]:
    """Take in what a step measured.

    Parameters
    ----------
    losses
        loss+ and loss- of every direction; if one is not finite, nothing moves.

    Returns
    -------
    state
        For the next step.
    coefs
        What the weights move by along each direction, exact in float32; None: what a plain step
        moves them by.
    """
    q, behind = options.directions, replace(state, step=state.step + 1)
    if not np.isfinite(losses).all():
        return (_leave(behind) if state.points else behind), None
    if state.left:
        return replace(behind, left=state.left - 1), None
    if not options.gate:
        return behind, None
    grad = tuple((plus_ - minus) / (2 * eps) for plus_, minus in losses)
    loss = sum(plus_ + minus for plus_, minus in losses) / (2 * q)
    if not state.points:
        state = replace(state, start=state.step, points=((0.0,) * q,), cycles=state.cycles + 1)
    points, grads = state.points, (*state.grads, grad)
    values = (*state.losses, loss)
    rate, last = lr / q, len(points) - 1
    plain = plus(points[last], -rate, grad)
    behind = replace(
        behind, start=state.start, points=points, grads=grads, losses=values, cycles=state.cycles
    )
    if last == 0:
        return _go(behind, _rounded(plus(plain, -1.0, points[0])))
    noise = noise_ratio(points, grads, values)
    noisy, best = noise > options.gate, values.index(min(values))
    goal = plain_loss(values, WORTH * last)
    if noisy or best != last:
        if noisy:
            behind = replace(behind, closed=state.closed + 1)
        else:
            behind = replace(behind, rejected=state.rejected + 1)
        if best == last:
            return _leave(behind), None
        back = plus(points[best], -rate / 2, grads[best])
        paid = not noisy and values[best] <= goal
        return (_done if paid else _leave)(behind), _rounded(plus(back, -1.0, points[last]))
    if last >= min(JUDGED, options.inner_steps - 1) and loss > goal:
        behind = replace(behind, slow=state.slow + 1)
        return _leave(behind), _rounded(plus(points[1], -1.0, points[last]))
    first = max(0, last - options.window)
    found = mix(
        points[first:],
        grads[first:],
        last - first,
        rate=rate,
        ridge=options.ridge + noise,
        damping=options.damping / (1 + noise),
    )
    target = plain if found is None else found
    behind = replace(behind, mixed=state.mixed + (found is not None))
    coefs = _rounded(plus(target, -1.0, points[last]))
    if last + 1 < options.inner_steps:
        return _go(behind, coefs)
    return _done(behind), coefs


def _go(state: State, coefs: list[float]) -> tuple[State, list[float]]:
    """Go on with a cycle from where it is by `coefs`."""
    there = tuple(plus(state.points[-1], 1.0, coefs))
    return replace(state, points=(*state.points, there)), coefs


def _done(state: State) -> State:
    """End a cycle that paid; the next one begins at once."""
    return replace(state, points=(), grads=(), losses=(), pause=FIRST)


def _leave(state: State) -> State:
    """End a cycle that failed; the next one waits longer."""
    left, pause = state.pause, min(GROWTH * state.pause, LONGEST)
    return replace(state, points=(), grads=(), losses=(), left=left, pause=pause)


def noise_ratio(points: Sequence[Point], grads: Sequence[Point], losses: Sequence[float]) -> float:
    """Return the noise of a cycle's losses as a share of what they changed by, squared.

    The mean of the gradients at two points tells the loss between them exactly where it is
    quadratic; what a measured difference has beside that is noise.
    """
    noise = signal = 0.0
    for k in range(1, len(losses)):
        mean = [(a + b) / 2 for a, b in zip(grads[k - 1], grads[k], strict=True)]
        told = dot(mean, plus(points[k], -1.0, points[k - 1]))
        noise += (losses[k] - losses[k - 1] - told) ** 2
        signal += told**2
    return noise / signal if signal else float("inf")


def plain_loss(losses: Sequence[float], steps: float) -> float:
    """Return the loss behind so many plain steps, if each leaves the share that the first one left.

    Where a loss is not positive, each takes off as much as the first one.
    """
    first, second = losses[:2]
    if min(first, second) <= 0:
        return first - steps * (first - second)
    return float(first * (second / first) ** steps)


def _rounded(coefs: Sequence[float]) -> list[float]:
    """Return what float32 makes of coefficients: what is applied and logged."""
    return [float(np.float32(c)) for c in coefs]
