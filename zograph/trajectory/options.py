"""The option `anderson` of :func:`zograph.compile`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zograph.errors import OptionError

MOST = 256
"""Directions that a cycle may share; the host's work is cubic in the window, linear in these."""


@dataclass(frozen=True)
class Anderson:
    """Mix the iterates of a zeroth-order run while they share their directions.

    A cycle is `inner_steps` steps that all perturb along the same `directions` seeded directions,
    so that its iterates differ by their coordinates alone; those are mixed on the host. While the
    gate is closed, steps are those of plain ZO-SGD with as many directions, bit for bit.

    Parameters
    ----------
    directions
        Seeded directions that the steps of a cycle share; also those of a plain step. 1 to 256.
    inner_steps
        Steps of a cycle, at least 3: the first of its steps that is mixed is measured by the third.
    window
        Earlier iterates that are mixed, at least 1.
    ridge
        Added to the diagonal of the mixing system, in units of its mean diagonal, beside what the
        noise of the losses asks for.
    damping
        Share of the mixed step that is taken, above 0 and at most 1; noise makes it less.
    gate
        Ratio of noise to signal in the losses from which on nothing is mixed. 0 never mixes.

    Raises
    ------
    OptionError
        If a number is out of range.

    Examples
    --------
    >>> Anderson(directions=8).window
    7
    """

    directions: int = 16
    inner_steps: int = 8
    window: int = 7
    ridge: float = 1e-6
    damping: float = 1.0
    gate: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("directions", 1), ("inner_steps", 3), ("window", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MOST:
                raise OptionError(f"anderson: {name} is {value!r}; it must be {least} to {MOST}.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise OptionError(f"anderson: ridge is {self.ridge}; it must not be negative.")
        if not 0 < self.damping <= 1:
            raise OptionError(f"anderson: damping is {self.damping}; it must be in (0, 1].")
        if not (math.isfinite(self.gate) and self.gate >= 0):
            raise OptionError(f"anderson: gate is {self.gate}; it must not be negative.")
