"""How a step uses memory: what the planner decides and the passes offload and schedule act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from zograph.meter import Cost

if TYPE_CHECKING:
    from zograph.device import DeviceSpec

Tier = Literal["host", "disk"]


@dataclass(frozen=True)
class StageUse:
    """What one stage of an outlined graph needs at given sizes."""

    stage: int
    body: str | None
    """Target of the call; None for a stage that only folds weights that no operator uses."""
    weights: tuple[str, ...]
    live: int
    """Bytes of values that other stages made and that are alive while this one runs."""
    cost: Cost
    """Of its body, over all batches: peaks are the largest, work is the sum."""

    @property
    def peak(self) -> int:
        """Bytes beside weights and slots while the stage runs."""
        return self.live + self.cost.peak_bytes

    @property
    def rest(self) -> int:
        """Bytes of it at the most without perturbed copies."""
        return self.live + self.cost.rest_bytes


@dataclass(frozen=True)
class Layout:
    """Where weights stand and what else takes memory, for one graph and one set of sizes."""

    tier: Tier
    spec: DeviceSpec
    budget: int | Literal["minimum"] | None
    """What was asked for: bytes, the smallest that is enough, or no limit."""
    resident: frozenset[str] = field(repr=False)
    """Parameters that stay on the device; the others are streamed."""
    held: int
    """Bytes of the resident parameters."""
    slots: int
    """Bytes of the arena that streamed weights pass through."""
    pair: int | None
    """Largest perturbed copy, in bytes, that is made together with its twin; None: all."""
    cut: int | None
    fixed: int
    """Bytes of buffers, constants, tables of keys and the batch itself."""
    uses: tuple[StageUse, ...] = field(repr=False)
    fold_every: int = 1
    """Steps from one write of a streamed weight to the next."""
    decoded: int = 0
    """Bytes in which a stage's weights are decoded; 0 where none is stored in a format."""
    copies: int = 0
    """Bytes that are kept for perturbed copies from stage to stage; 0: each stage keeps what its
    peak leaves, and asks for the rest, which costs page faults on a CPU."""

    @property
    def peak(self) -> int:
        """Most bytes of perturbed copies and activations at once."""
        return working_bytes(self.uses, self.copies)

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that a step takes."""
        return self.fixed + self.held + self.slots + self.decoded + self.peak

    def room_for_copies(self, stage: int) -> int:
        """Return the bytes of perturbed copies that may be kept all through a stage."""
        (use,) = (u for u in self.uses if u.stage == stage)
        return max(0, self.peak - use.rest)


def most_copies(uses: Sequence[StageUse]) -> int:
    """Return the most bytes of perturbed copies at once."""
    return max((u.cost.scratch_bytes for u in uses), default=0)


def working_bytes(uses: Sequence[StageUse], copies: int) -> int:
    """Return the most bytes beside weights and slots, with so many kept for perturbed copies."""
    if copies:
        return copies + max(u.rest for u in uses)
    return max((u.peak for u in uses), default=0)
