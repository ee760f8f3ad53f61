"""What a pass is: a frozen dataclass with a contract and one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import fx

if TYPE_CHECKING:
    from zograph.layout import Layout
    from zograph.trajectory.options import Anderson

Numerics = Literal["bitwise", "reassociates", "changes"]


@dataclass(frozen=True)
class Contract:
    """What a pass needs from the graph, what it adds, and what it does to the numbers.

    Attributes
    ----------
    requires, provides, forbids
        Facts about the graph, as plain words; the pipeline checks them before it
        touches a graph. A pass may run only when all of `requires` and none of `forbids`
        have been provided.
    numerics
        ``bitwise``: outputs keep every bit; ``reassociates``: equal up to rounding;
        ``changes``: computes something else.
    """

    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    forbids: frozenset[str] = frozenset()
    numerics: Numerics = "bitwise"


@dataclass(frozen=True)
class PassResult:
    """The graph after a pass, whether it differs, and what was skipped and why."""

    gm: fx.GraphModule
    modified: bool
    notes: tuple[str, ...] = ()


@dataclass
class PassContext:
    """What passes may ask for beside the graph.

    Attributes
    ----------
    distribution, backend, directions
        The options of :func:`zograph.compile` of the same name.
    fold_every
        Steps from one write of a streamed weight to the next.
    cut
        Most bytes of weights that a stage may hold where it can be cut; None: whole blocks.
    rounding
        Of weights to the format that they are stored in, if they have one.
    by_rows
        Weights are streamed, and rows of a stored table can be read on their own.
    layout
        Which weights are streamed and through how much memory; None: all weights stay on the
        device.
    solvers
        For fixed points that leave their solver open, ``anderson`` or ``picard`` by name, as
        measured before the first step and recorded.
    eps
        The perturbation, where it is known.
    mixing
        How the trajectory is mixed; None: it is not.
    lowered
        Compiled stage bodies by their form; `lower` adds to it and takes from it.
    """

    distribution: str = "normal"
    backend: str = "inductor"
    directions: int = 1
    fold_every: int = 1
    cut: int | None = None
    rounding: str = "nearest"
    by_rows: bool = False
    layout: Layout | None = None
    solvers: Mapping[str, str] = field(default_factory=dict)
    eps: float | None = None
    mixing: Anderson | None = None
    lowered: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass; the fields of a subclass are its options."""

    name: ClassVar[str]
    contract: ClassVar[Contract] = Contract()

    @abstractmethod
    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite `gm` in place and say what happened."""
