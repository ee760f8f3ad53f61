from __future__ import annotations

import copy

from tests.passes.graphs import ready_for, two_blocks
from tests.passes.test_dual_perturbation import bind_keys
from zograph import printer
from zograph.passes import Materialize, PassContext
from zograph.testing import (
    Golden,
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
    random_inputs,
)
from zograph.verifier import Verifier


def test_golden_and_semantics(golden: Golden) -> None:
    gm = ready_for("materialize", two_blocks())
    before = copy.deepcopy(gm)
    result = Materialize().apply(gm, PassContext())
    golden.check(gm, "materialize_after")
    assert result.notes == ("2 gathers perturb their rows only", "6 pairs made at once")
    assert_node_delta(before, gm, added=18, removed=14)
    assert_equivalent(before, gm, bind_keys(before, random_inputs(before)))
    Verifier().check(gm, after="materialize")


def test_one_branch_at_a_time_has_the_same_bits() -> None:
    gm = ready_for("materialize", two_blocks())
    pairs = Materialize().apply(copy.deepcopy(gm), PassContext()).gm
    single = Materialize(pairs=False).apply(gm, PassContext()).gm
    assert "zograph.materialize_one" in printer.summary(single)
    assert_equivalent(pairs, single, bind_keys(pairs, random_inputs(pairs)))


def test_idempotent() -> None:
    assert_idempotent(Materialize(), ready_for("materialize", two_blocks()))


def test_a_table_that_is_only_gathered_from_is_not_materialized_whole() -> None:
    gm = Materialize().apply(ready_for("materialize", two_blocks()), PassContext()).gm
    counts = printer.summary(gm)
    assert counts["zograph.materialize_rows"] == 1
    assert counts["zograph.materialize"] == 5  # the head still needs the whole table
