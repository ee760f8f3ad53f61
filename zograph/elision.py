"""Write-back elision: how many steps a streamed weight goes unwritten if the machine decides."""

from __future__ import annotations

from collections.abc import Mapping

from zograph.ir import ParamInfo
from zograph.layout import Layout

PERIODS = (1, 2, 4, 8, 16)
"""What ``fold_every="auto"`` chooses from: the last is the most steps' terms a weight may owe."""
WORTH = 0.98
"""A longer period must save two hundredths of the step at least."""


def mean_terms(directions: int, period: int) -> float:
    """Return how many pending terms a visit applies on average."""
    return directions * (period + 1) / 2


def choose_period(layout: Layout, params: Mapping[str, ParamInfo], directions: int) -> int:
    """Return the fold period with the shortest predicted step.

    A longer period writes less and makes more noise (:func:`mean_terms`). Where compute is what
    limits a step, or where nothing is written, 1 is best.

    Parameters
    ----------
    layout
        Of the step with period 1.
    """
    seconds = {k: step_seconds(layout, params, directions, k) for k in PERIODS}
    best = min(PERIODS, key=lambda k: (seconds[k], k))
    return best if seconds[best] <= WORTH * seconds[1] else 1


def step_seconds(
    layout: Layout, params: Mapping[str, ParamInfo], directions: int, period: int
) -> float:
    """Predict a step: the longer of compute and transfer, both streams of transfer at once."""
    spec = layout.spec
    visits = [n for u in layout.uses for n in u.weights if n not in layout.resident]
    written = {n for n in visits if params[n].trainable}
    read_bytes = sum(params[n].stored_bytes for n in visits)
    written_bytes = sum(params[n].stored_bytes for n in written) / period
    disk = layout.tier == "disk"
    reading, writing = (spec.read, spec.write) if disk else (spec.to_device, spec.to_host)
    both = spec.disk_both if disk else spec.link_both
    together = (read_bytes + written_bytes) / both
    transfer = max(read_bytes / reading, written_bytes / writing, together)
    trained = sum(p.bytes // p.dtype.itemsize for p in params.values() if p.trainable)
    compute = sum(spec.seconds(u.cost.work, noise=u.cost.noise) for u in layout.uses)
    compute += trained * mean_terms(directions, period) / spec.fold
    return max(compute, transfer)
