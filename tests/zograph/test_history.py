"""What a weight owes, against terms that are applied one step at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zograph.history import History, Terms
from zograph.ops import fold_

Step = list[tuple[int, float, float]]
ROUND = "round"


@dataclass
class Naive:
    """Every step's terms, kept for ever."""

    every: int
    steps: list[Step] = field(default_factory=list)

    def owed(self, version: int, phase: int) -> list[object]:
        """List the terms from a version on, and a mark wherever a narrow weight is rounded."""
        found: list[object] = []
        for v in range(version, len(self.steps)):
            found += self.steps[v]
            if (v + 1 + phase) % self.every == 0:
                found.append(ROUND)
        return found


def settled(actions: list[object]) -> list[object]:
    """Leave out marks that change nothing: the first, the last (it is always rounded), doubles."""
    kept = [a for a, b in zip(actions, [ROUND, *actions], strict=False) if not a == b == ROUND]
    return kept[:-1] if kept and kept[-1] == ROUND else kept


def marked(found: tuple[Terms, torch.Tensor | None] | None) -> list[object]:
    """Put what a history says in the form of :class:`Naive`."""
    if found is None:
        return []
    terms, ends = found
    columns = (terms.seeds.tolist(), terms.coefs.tolist(), terms.scales.tolist())
    actions: list[object] = []
    for i, term in enumerate(zip(*columns, strict=True)):
        actions.append(term)
        if ends is not None and ends[i]:
            actions.append(ROUND)
    return actions


NUMBERS = st.floats(-2, 2, width=32)
STEPS = st.lists(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), NUMBERS, NUMBERS), max_size=3), max_size=9
)
"""A skipped step has no term, one of several directions has several."""


def restored(every: int, steps: list[Step]) -> History:
    history = History(every)
    counts = torch.tensor([len(s) for s in steps], dtype=torch.int64)
    history.restore(Terms.of([t for s in steps for t in s]), counts)
    return history


@settings(max_examples=200, deadline=None)
@given(every=st.integers(1, 5), before=STEPS, behind=STEPS, data=st.data())
def test_a_weight_owes_what_a_step_by_step_fold_would_apply(
    every: int, before: list[Step], behind: list[Step], data: st.DataObject
) -> None:
    history, naive = restored(every, before), Naive(every, list(before))
    versions = [0, 0, 0]
    for step in [None, *behind]:
        if step is not None:
            history.add(Terms.of(step), min(versions))
            naive.steps.append(step)
        assert history.newest == len(naive.steps)
        for i, version in enumerate(versions):
            phase = data.draw(st.integers(0, 2**63 - 1))
            found = history.since(version, phase)
            assert (found is None) == (version == history.newest)
            assert settled(marked(found)) == settled(naive.owed(version, phase))
            versions[i] = data.draw(st.integers(version, history.newest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None)
@given(every=st.integers(1, 4), steps=STEPS, kept=st.integers(0, 9), key=st.integers(0, 2**62))
def test_one_fold_of_many_steps_has_the_bits_of_many_folds(
    dtype: torch.dtype, every: int, steps: list[Step], kept: int, key: int
) -> None:
    history = restored(every, steps[:kept])
    for step in steps[kept:]:
        history.add(Terms.of(step), 0)
    start = torch.linspace(-1, 1, 40).to(dtype)
    once, owed = start.clone(), history.since(0, key)
    if owed is not None:
        terms, ends = owed
        fold_(once, terms.seeds, terms.coefs, terms.scales, key, ends=ends)
    wide = start.float()
    for version, step in enumerate(steps, 1):
        for term in step:
            one = Terms.of([term])
            fold_(wide, one.seeds, one.coefs, one.scales, key)
        if history.is_fold_point(version, key):
            wide = wide.to(dtype).float()
    assert torch.equal(once, wide.to(dtype))


def test_a_mark_in_the_wrong_place_shows() -> None:
    steps: list[Step] = [[(i, 0.25, 1.0)] for i in range(6)]
    found = restored(3, steps).since(0, 1)
    assert settled(marked(found)) == settled(Naive(3, steps).owed(0, 1))
    assert settled(marked(found)) != settled(Naive(3, steps).owed(0, 2))
    assert settled(marked(found)) != settled(Naive(2, steps).owed(0, 1))


def test_terms_that_were_forgotten_are_not_owed_again() -> None:
    history = History()
    for i in range(4):
        history.add(Terms.of([(i, 1.0, 1.0)]), max(i - 1, 0))
    with pytest.raises(AssertionError, match="the terms of step 0 were forgotten"):
        history.since(0)


def test_what_a_weight_owes_is_collected_once() -> None:
    history = restored(2, [[(1, 1.0, 1.0)]] * 3)
    assert history.since(1, 4) is history.since(1, 6)
    before = history.since(1)
    history.add(Terms.of([(2, 1.0, 1.0)]), 1)
    assert marked(history.since(1)) != marked(before)
