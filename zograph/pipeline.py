"""The pipeline: read :func:`run` first. Everything else in zograph serves it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import fx

from zograph.errors import PipelineError
from zograph.ir import info
from zograph.observers import Observers
from zograph.passes import (
    Anderson,
    Chunk,
    DualPerturbation,
    Gather,
    Hoist,
    Lower,
    Materialize,
    Normalize,
    Offload,
    Outline,
    Partition,
    Pass,
    PassContext,
    Schedule,
    Trial,
)

DUAL = frozenset({"dual", "materialized"})


def run(
    gm: fx.GraphModule, passes: Pipeline, ctx: PassContext, observers: Observers
) -> fx.GraphModule:
    """Rewrite a captured graph, pass by pass, into one that the runtime executes.

    Parameters
    ----------
    gm
        A captured graph; rewritten in place.
    passes
        What to run, in order. Its contracts are checked before the graph is touched.
    observers
        Verify, time, dump and compare around every pass; passes do none of that.

    Returns
    -------
    fx.GraphModule
        The rewritten graph.

    Raises
    ------
    PipelineError
        If a pass stands before one that it requires.
    VerifyError
        If a pass leaves a graph that breaks a rule.
    """
    passes.validate(info(gm).facts)
    for pass_ in passes:
        observers.before(pass_, gm)
        result = pass_.apply(gm, ctx)
        gm = result.gm
        info(gm).facts |= pass_.contract.provides
        observers.after(pass_, result)
    return gm


@dataclass(frozen=True)
class Pipeline:
    """An immutable, ordered sequence of passes.

    Examples
    --------
    >>> from zograph.pipeline import default_passes
    >>> [p.name for p in default_passes()][:3]
    ['normalize', 'partition', 'hoist']
    """

    passes: tuple[Pass, ...]

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def insert_before(self, name: str, *passes: Pass) -> Pipeline:
        """Return a pipeline with passes added ahead of the one called `name`."""
        return self._spliced(self._index(name), 0, passes)

    def insert_after(self, name: str, *passes: Pass) -> Pipeline:
        """Return a pipeline with passes added behind the one called `name`."""
        return self._spliced(self._index(name) + 1, 0, passes)

    def replace(self, name: str, *passes: Pass) -> Pipeline:
        """Return a pipeline with other passes (or none) in place of the one called `name`."""
        return self._spliced(self._index(name), 1, passes)

    def split(self, name: str) -> tuple[Pipeline, Pipeline]:
        """Return the passes ahead of the one called `name`, and the rest."""
        at = self._index(name)
        return Pipeline(self.passes[:at]), Pipeline(self.passes[at:])

    def for_evaluation(self) -> Pipeline:
        """Return the passes that apply to a graph without branches."""
        contracts = [(p, p.contract) for p in self.passes]
        return Pipeline(tuple(p for p, c in contracts if not (c.requires | c.provides) & DUAL))

    def for_trial(self) -> Pipeline | None:
        """Return the passes of a graph that measures fixed points; None if none may be open.

        It runs once, so that of its stages the cells alone are compiled.
        """
        if not any(isinstance(p, Anderson) and p.mode == "auto" for p in self.passes):
            return None
        lowered = (replace(p, bodies=False) if isinstance(p, Lower) else p for p in self.passes)
        return Pipeline(tuple(lowered)).for_evaluation().insert_before("partition", Trial())

    def validate(self, given: frozenset[str] = frozenset()) -> None:
        """Check the order against the contracts.

        Parameters
        ----------
        given
            Facts that earlier passes have provided.

        Raises
        ------
        PipelineError
            With the pass, the missing or forbidden fact, and who would provide it.
        """
        facts = set(given)
        for pass_ in self.passes:
            contract = pass_.contract
            if missing := sorted(contract.requires - facts):
                makers = [p.name for p in self.passes if contract.requires & p.contract.provides]
                hint = f"Put it behind {', '.join(makers)}." if makers else "No pass provides it."
                raise PipelineError(f"{pass_.name} requires a {missing[0]} graph. {hint}")
            if clash := sorted(contract.forbids & facts):
                raise PipelineError(f"{pass_.name} must run before the graph is {clash[0]}.")
            facts |= contract.provides

    def _index(self, name: str) -> int:
        names = [p.name for p in self.passes]
        if name not in names:
            raise PipelineError(f"no pass is called {name!r}; there are: {', '.join(names)}.")
        return names.index(name)

    def _spliced(self, at: int, drop: int, passes: Iterable[Pass]) -> Pipeline:
        changed = list(self.passes)
        changed[at : at + drop] = passes
        return Pipeline(tuple(changed))


def default_passes() -> Pipeline:
    """Return the passes of :func:`zograph.compile`, in order."""
    return Pipeline(
        (
            Normalize(),
            Chunk(),
            Partition(),
            Hoist(),
            DualPerturbation(),
            Materialize(),
            Anderson(),
            Outline(),
            Gather(),
            Offload(),
            Schedule(),
            Lower(),
        )
    )
