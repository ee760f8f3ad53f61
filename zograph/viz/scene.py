"""What a picture shows: boxes in stages, and the arrows between them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from zograph.ir import Branch, ParamInfo

ItemKind = Literal["op", "weights", "transfers", "input", "stored", "noise", "result", "entry"]


@dataclass(frozen=True)
class Move:
    """One thing that happens to the weights of a stage: fetch, wait, fold, write back, release."""

    what: str
    low: int
    """Bytes that it moves, or terms that it folds, at least and at most over equal stages."""
    high: int
    streams: tuple[str, ...] = ()


@dataclass
class Item:
    """One box."""

    id: str
    kind: ItemKind
    stage: int | None = None
    branch: Branch | None = None
    hoisted: bool = False
    lines: list[str] = field(default_factory=list)
    params: list[ParamInfo] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    """Of weights: which perturbed copies are made of them, ``+`` and ``-``."""
    rows: bool = False
    """Of weights: only the rows that are gathered get perturbed."""
    moves: dict[str, Move] = field(default_factory=dict)
    """Of transfers: what happens to the stage's weights, in order."""


@dataclass(frozen=True)
class Edge:
    """One arrow: from where a value is made to where it is used."""

    source: str
    target: str
    port: str = ""
    """Which copy of a weight; ``release`` of a slot that the target fills anew."""
    type: str = ""
    views: tuple[str, ...] = ()
    """The reshaping operators on the way."""


@dataclass
class Stage:
    """One cluster: a stage, or `repeats` stages of equal form, each `step` behind the last."""

    number: int
    path: str
    form: Hashable
    params: dict[str, ParamInfo] = field(default_factory=dict)
    first_path: str = ""
    """Where the names of the drawn weights start."""
    repeats: int = 1
    step: int = 1
    chained: bool = False
    """Whether each repetition uses what the one before it made."""
    refills: bool = False
    """Whether slots that one repetition releases are filled anew by another."""

    def numbers(self) -> str:
        """Write the numbers of the stages: ``7``, ``2-13`` or ``2, 5 .. 11``."""
        last = self.number + (self.repeats - 1) * self.step
        if self.repeats == 1:
            return str(self.number)
        if self.step == 1:
            return f"{self.number}-{last}"
        dots = ", " if self.repeats == 2 else " .. "
        second = "" if self.repeats == 2 else f", {self.number + self.step}"
        return f"{self.number}{second}{dots}{last}"

    def size(self) -> tuple[int, int]:
        """Return the number of weights and their bytes."""
        infos = self.params.values()
        return sum(p.bytes // p.dtype.itemsize for p in infos), sum(p.bytes for p in infos)


@dataclass
class Scene:
    """A whole picture. The edges are a dictionary to keep them unique and in order."""

    items: dict[str, Item] = field(default_factory=dict)
    edges: dict[Edge, None] = field(default_factory=dict)
    stages: dict[int, Stage] = field(default_factory=dict)
    params: dict[str, ParamInfo] = field(default_factory=dict)

    def tied(self, name: str, stage: int | None) -> int | None:
        """Return the first stage that uses a parameter, None if it is `stage` itself."""
        first = next((s.number for s in self.stages.values() if name in s.params), None)
        return None if first == stage else first

    def unused(self) -> list[ParamInfo]:
        """List the parameters that no box shows and no stage uses."""
        used = {n for s in self.stages.values() for n in s.params}
        used |= {p.name for i in self.items.values() for p in i.params}
        return [p for n, p in self.params.items() if n not in used]
