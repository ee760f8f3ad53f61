from __future__ import annotations

import copy

import torch
from torch import fx

from tests.passes.test_dual_perturbation import bind_keys
from zograph import printer
from zograph.ir import info, meta
from zograph.passes import Gather, PassContext
from zograph.pipeline import default_passes
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
BY_ROWS = PassContext(by_rows=True)


def lookups(
    *, trainable: bool = False, shifted: bool = False, reused: bool = False
) -> fx.GraphModule:
    """Build a table that is looked up twice, positions, and a trainable head; outlined."""
    b = GraphBuilder()
    table = b.param("wte", (7, 4), trainable=trainable)
    places = b.param("wpe", (5, 4), trainable=False)
    head = b.param("head", (3, 4))
    ids, at = b.input("ids", ("batch",), torch.int64), b.input("at", ("batch",), torch.int64)
    index = b.call(aten.remainder.Scalar, ids, 7) if shifted else ids
    x = b.call(aten.embedding.default, table, index)
    y = x if trainable else b.call(aten.embedding.default, table, index)
    x = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, y),
               b.call(aten.embedding.default, places, at))  # fmt: skip
    if reused:
        x = b.call(aten.add.Tensor, x, b.call(aten.sum.default, table))
    gm = b.build(
        b.call(aten.mean.default, b.call(aten.linear.default, x, head)), facts=("normalized",)
    )
    for pass_ in default_passes():
        if pass_.name == "gather":
            break
        if pass_.name != "normalize":
            gm = pass_.apply(gm, PassContext()).gm
            info(gm).facts |= pass_.contract.provides
    return gm


def tables(gm: fx.GraphModule) -> set[str]:
    """Return the parameters that stages are called with."""
    stages = [n for n in gm.graph.nodes if n.op == "call_module"]
    inputs = {s for n in stages for s in n.all_input_nodes if s.op == "placeholder"}
    return {str(meta(s).name) for s in inputs} & info(gm).params.keys()


def inputs_for(gm: fx.GraphModule) -> list[object]:
    """Random inputs whose indices are within both tables."""
    return [
        x % 5 if isinstance(x, torch.Tensor) and meta(n).name in ("ids", "at") else x
        for n, x in zip(
            [n for n in gm.graph.nodes if n.op == "placeholder"],
            bind_keys(gm, random_inputs(gm)),
            strict=True,
        )
    ]


def test_golden_and_semantics(golden: Golden) -> None:
    gm = lookups()
    before = copy.deepcopy(gm)
    result = Gather().apply(gm, BY_ROWS)
    golden.check(gm, "gather_after")
    assert result.notes == ("2 lookups read rows",)
    assert_node_delta(before, gm, added=2, removed=3)
    assert tables(gm) == {"head"}
    assert_equivalent(before, gm, inputs_for(before))
    info(gm).facts |= Gather.contract.provides
    Verifier().check(gm, after="gather")


def test_idempotent() -> None:
    assert_idempotent(Gather(), lookups(), BY_ROWS)


def test_without_streaming_tables_stay_arguments() -> None:
    result = Gather().apply(lookups(), PassContext())
    assert not result.modified
    assert result.notes == ("tables are on the device, or fetched whole",)


def test_a_trainable_table_is_updated_whole_so_it_is_fetched_whole() -> None:
    gm = lookups(trainable=True)
    Gather().apply(gm, BY_ROWS)
    assert tables(gm) == {"head", "wte"}


def test_a_table_with_another_use_is_fetched_whole() -> None:
    gm = lookups(reused=True)
    Gather().apply(gm, BY_ROWS)
    assert tables(gm) == {"head", "wte"}


def test_an_index_from_an_earlier_stage_will_do() -> None:
    """What depends on no weight is computed in stage 0, ahead of every fetch."""
    gm = lookups(shifted=True)
    before = copy.deepcopy(gm)
    Gather().apply(gm, BY_ROWS)
    assert "zograph.gather" in printer.summary(gm)
    assert tables(gm) == {"head"}
    assert_equivalent(before, gm, inputs_for(before))
