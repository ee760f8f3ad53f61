"""Write-back elision: how many steps a streamed weight goes unwritten if the machine decides."""

from __future__ import annotations

from collections.abc import Callable

PERIODS = (1, 2, 4, 8, 16)
"""What ``fold_every="auto"`` chooses from: the last is the most steps' terms a weight may owe."""
WORTH = 0.98
"""A longer period must save two hundredths of the step at least."""


def mean_terms(directions: int, period: int) -> float:
    """Return how many pending terms a visit applies on average."""
    return directions * (period + 1) / 2


def choose_period(seconds: Callable[[int], float]) -> int:
    """Return the fold period with the shortest step.

    A longer period writes less and makes more noise (:func:`mean_terms`). Where compute is what
    limits a step, or where nothing is written, 1 is best.

    Parameters
    ----------
    seconds
        Predicts a step for a period.
    """
    found = {k: seconds(k) for k in PERIODS}
    best = min(PERIODS, key=lambda k: (found[k], k))
    return best if found[best] <= WORTH * found[1] else 1
