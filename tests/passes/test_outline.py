from __future__ import annotations

import copy

import pytest

from tests.passes.graphs import DEEP, deep, ready_for, two_blocks
from tests.passes.test_dual_perturbation import bind_keys
from zograph import printer
from zograph.ir import info
from zograph.passes import Outline, PassContext
from zograph.pipeline import default_passes
from zograph.testing import (
    Golden,
    assert_equivalent,
    assert_idempotent,
    random_inputs,
)
from zograph.verifier import Verifier


def test_golden_and_semantics(golden: Golden) -> None:
    gm = ready_for("outline", two_blocks())
    before = copy.deepcopy(gm)
    result = Outline().apply(gm, PassContext())
    golden.check(gm, "outline_after")
    assert result.notes == ("5 stages, 4 distinct bodies",)
    assert_equivalent(before, gm, bind_keys(before, random_inputs(before)))
    Verifier().check(gm, after="outline")


def test_idempotent() -> None:
    assert_idempotent(Outline(), ready_for("outline", two_blocks()))


@pytest.mark.parametrize("name", DEEP)
def test_the_number_of_bodies_does_not_grow_with_depth(name: str) -> None:
    def bodies(layers: int) -> int:
        gm = deep(name, layers)
        for pass_ in default_passes().replace("lower"):
            gm = pass_.apply(gm, PassContext()).gm
            info(gm).facts |= pass_.contract.provides
        return len(printer.bodies(gm))

    assert bodies(4) == bodies(2) <= 9
