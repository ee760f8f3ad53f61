from __future__ import annotations

import copy

import torch

from tests.passes.graphs import ready_for, two_blocks
from zograph.ir import Kind, info, meta, placeholders
from zograph.passes import Hoist, PassContext
from zograph.testing import (
    Golden,
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
)
from zograph.verifier import Verifier

aten = torch.ops.aten


def test_golden_and_semantics(golden: Golden) -> None:
    gm = ready_for("hoist", two_blocks())
    before = copy.deepcopy(gm)
    result = Hoist().apply(gm, PassContext())
    golden.check(gm, "hoist_after")
    assert result.notes == ("1 nodes hoisted, 1 of them into stage 0",)
    assert_node_delta(before, gm, added=0, removed=0)
    assert_equivalent(before, gm)
    Verifier().check(gm, after="hoist")


def test_idempotent() -> None:
    assert_idempotent(Hoist(), ready_for("hoist", two_blocks()))


def test_frozen_weights_are_shared_in_their_own_stage() -> None:
    gm = two_blocks()
    for name, p in list(info(gm).params.items()):
        if name != "layers.1.w":
            frozen = type(p)(p.name, p.shape, p.dtype, False, p.decay, p.key)
            info(gm).params[name] = frozen
    gm = ready_for("hoist", gm)
    Hoist().apply(gm, PassContext())
    embedding = next(n for n in gm.graph.nodes if n.target is aten.embedding.default)
    assert meta(embedding).hoisted
    assert meta(embedding).stage == 1
    (weight,) = (n for n in placeholders(gm, Kind.PARAMETER) if meta(n).name == "layers.1.w")
    assert all(not meta(u).hoisted for u in weight.users)
    Verifier().check(gm, after="hoist")
