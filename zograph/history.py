"""The updates of a run as seeded terms, and which of them a weight still owes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Terms:
    """Updates, in order: for each term ``w <- fl(fl(scale w) + fl(coef z(seed)))``."""

    seeds: torch.Tensor
    """int64 [terms]."""
    coefs: torch.Tensor
    """float32 [terms]."""
    scales: torch.Tensor
    """float32 [terms]; taken as 1 for parameters that weight decay spares."""

    @staticmethod
    def of(terms: Sequence[tuple[int, float, float]]) -> Terms:
        """Build from (seed, coefficient, scale) tuples, in order."""
        seeds, coefs, scales = zip(*terms, strict=True) if terms else ((), (), ())
        return Terms(
            torch.tensor(seeds, dtype=torch.int64),
            torch.tensor(coefs, dtype=torch.float32),
            torch.tensor(scales, dtype=torch.float32),
        )

    def to(self, device: torch.device) -> Terms:
        """Return the terms on a device; does not wait for a GPU that they are sent to."""
        columns = (self.seeds, self.coefs, self.scales)
        return Terms(*(c.to(device, non_blocking=device.type == "cuda") for c in columns))

    @staticmethod
    def joined(steps: Sequence[Terms]) -> Terms:
        """Put the terms of several steps behind each other."""
        columns = zip(*((t.seeds, t.coefs, t.scales) for t in steps), strict=True)
        return Terms(*(torch.cat(c) for c in columns))


class History:
    """The newest steps' terms, as far back as some weight owes them.

    A weight's *version* is the number of steps whose terms are in its stored value. Its *fold
    points*, where a narrow base is rounded, are the versions v with ``(v + phase) % every == 0``;
    the phase is the weight's own.

    Parameters
    ----------
    every
        The fold period, in steps.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._first = 0
        """The version that `_block` starts at."""
        self._block = Terms.of(())
        self._counts = torch.zeros(0, dtype=torch.int64)
        """How many terms each step of the block has."""
        self._steps: list[Terms] = []
        """The steps behind the block."""
        self._owed: dict[tuple[int, int], tuple[Terms, torch.Tensor | None]] = {}

    def is_fold_point(self, version: int, phase: int) -> bool:
        """Whether a weight of this phase is folded into its base at a version."""
        return (version + phase % self.every) % self.every == 0

    @property
    def newest(self) -> int:
        """The number of steps so far: the version of a weight that owes nothing."""
        return self._first + len(self._counts) + len(self._steps)

    def restore(self, terms: Terms, counts: torch.Tensor) -> None:
        """Start with the steps of an earlier run.

        Parameters
        ----------
        terms
            Of every step, in order.
        counts
            int64 [steps]: how many terms each has.
        """
        self._first, self._steps, self._owed = 0, [], {}
        self._block, self._counts = terms, counts

    def add(self, terms: Terms, oldest: int) -> None:
        """Add a step.

        Parameters
        ----------
        oldest
            The lowest version of a weight; what is before it is forgotten.
        """
        start = self._first + len(self._counts)
        if oldest >= start:
            self._steps = self._steps[oldest - start :]
            self._first, self._block = oldest, Terms.of(())
            self._counts = self._counts[:0]
        self._steps.append(terms)
        self._owed = {}

    def since(self, version: int, phase: int = 0) -> tuple[Terms, torch.Tensor | None] | None:
        """Return the terms that a weight of this version and phase owes, None if there are none.

        Returns
        -------
        terms
            In order.
        ends
            bool [terms], on the CPU: the terms behind which a fold point is. None if there is
            none before the last term.
        """
        if version >= self.newest:
            return None
        assert version >= self._first, f"the terms of step {version} were forgotten"
        key = (version, phase % self.every)
        if key not in self._owed:
            self._owed[key] = self._collect(version - self._first, key[1])
        return self._owed[key]

    def _collect(self, skip: int, phase: int) -> tuple[Terms, torch.Tensor | None]:
        behind = self._steps[max(skip - len(self._counts), 0) :]
        old, gone = self._counts[skip:], int(self._counts[:skip].sum())
        block = Terms(self._block.seeds[gone:], self._block.coefs[gone:], self._block.scales[gone:])
        if not len(old) and len(behind) == 1:
            return behind[0], None
        where = behind[0].coefs.device if behind else block.coefs.device
        counts = torch.cat([old, torch.tensor([len(t.coefs) for t in behind], dtype=torch.int64)])
        versions = self._first + skip + 1 + torch.arange(len(counts))
        points = ((versions + phase) % self.every == 0) & (counts.cumsum(0) > 0)
        ends = torch.zeros(int(counts.sum()), dtype=torch.bool)
        ends[counts.cumsum(0)[points] - 1] = True
        return Terms.joined([block.to(where), *behind]), ends
