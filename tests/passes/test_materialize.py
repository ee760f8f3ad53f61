from __future__ import annotations

import copy

import pytest
import torch
from torch import fx

from tests.passes.graphs import ready_for, two_blocks
from tests.passes.test_dual_perturbation import bind_keys
from zograph import printer
from zograph.ir import info
from zograph.meter import measure
from zograph.passes import Materialize, PassContext
from zograph.passes.materialize import split_pairs
from zograph.testing import (
    Golden,
    GraphBuilder,
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
    random_inputs,
)
from zograph.verifier import Verifier

aten = torch.ops.aten


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


def one_large_weight() -> fx.GraphModule:
    """Build a graph whose one weight dwarfs its activations, with the pairs made."""
    b = GraphBuilder()
    x = b.call(aten.linear.default, b.input("x", (2, 64)), b.param("w", (64, 64)), stage=1)
    gm = b.build(b.call(aten.mean.default, x, stage=1), facts=("normalized", "partitioned"))
    gm = ready_for("materialize", gm)
    gm = Materialize().apply(gm, PassContext()).gm
    info(gm).facts |= Materialize.contract.provides
    return gm


def test_split_pairs_halves_the_scratch_and_keeps_the_bits() -> None:
    pairs, split = one_large_weight(), one_large_weight()
    nbytes = 64 * 64 * 4
    assert split_pairs(split, nbytes) == 0  # not larger than the limit
    assert split_pairs(split, nbytes - 1) == 1
    assert_node_delta(pairs, split, added=2, removed=3)
    Verifier().check(split, after="offload")
    assert_equivalent(pairs, split, bind_keys(pairs, random_inputs(pairs)))
    before, after = measure(pairs, {}), measure(split, {})
    assert (before.scratch_bytes, after.scratch_bytes) == (2 * nbytes, nbytes)
    assert after.rest_bytes == before.rest_bytes
    assert after.peak_bytes < before.peak_bytes - nbytes // 2
    assert before.noise == 64 * 64
    assert after.noise == round(1.4 * 64 * 64)
    assert before.copies == after.copies == {nbytes}
    assert split_pairs(split, 0) == 0  # again


@pytest.mark.parametrize("limit", [0, 15, 16, 63, 64, 111, 112])
def test_split_pairs_takes_the_large_ones(limit: int) -> None:
    gm = Materialize().apply(ready_for("materialize", two_blocks()), PassContext()).gm
    before = copy.deepcopy(gm)
    sizes = [16, 16, 64, 64, 7 * 4 * 4]  # whole copies: two biases, two weights, the table
    rows = 3 * 4 * 4
    found = split_pairs(gm, limit)
    assert found == sum(n > limit for n in [*sizes, rows])
    Verifier().check(gm, after="offload")
    assert_equivalent(before, gm, bind_keys(before, random_inputs(before)))
