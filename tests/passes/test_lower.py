from __future__ import annotations

import copy
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tests.passes.graphs import ready_for, two_blocks
from tests.passes.test_dual_perturbation import bind_keys
from tests.zoo import batch, build, loss_fn
from zograph import printer
from zograph.ir import info
from zograph.passes import Lower, PassContext
from zograph.passes.lower import CompiledBody, compile_body
from zograph.pipeline import default_passes
from zograph.testing import (
    assert_equivalent,
    assert_idempotent,
    capture_function,
    random_inputs,
)


def test_semantics_and_sharing() -> None:
    gm = ready_for("lower", two_blocks())
    before = copy.deepcopy(gm)
    result = Lower().apply(gm, PassContext())
    assert result.notes == ("4 bodies compiled",)
    assert all(isinstance(m, CompiledBody) for m in gm.children())
    inputs = bind_keys(before, random_inputs(before))
    assert_equivalent(before, gm, inputs, bitwise=False, rtol=1e-6)
    assert not Lower().apply(gm, PassContext()).modified


def test_the_eager_backend_leaves_graphs() -> None:
    gm = ready_for("lower", two_blocks())
    assert not Lower().apply(gm, PassContext(backend="eager")).modified
    assert_idempotent(Lower(), gm, PassContext(backend="eager"))


@pytest.mark.slow
def test_perturbed_copies_die_young() -> None:
    """In the generated code at most two weights of a block have live copies at a time."""
    gm = capture_function(build("opt"), loss_fn("opt"), **batch("opt", 4, 16))
    for pass_ in default_passes().replace("lower"):
        gm = pass_.apply(gm, PassContext()).gm
        info(gm).facts |= pass_.contract.provides
    body = max(printer.bodies(gm), key=lambda b: len(printer.bodies(gm)[b]))
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code, *_) = run_and_get_code(lambda: compile_body(body))
    weights = {}  # buffer -> number of elements
    live, peak, seen = 0, 0, 0
    for line in code.splitlines():
        if match := re.match(
            r"\s*assert_size_stride\((buf\d+), \((\d+), (\d+)\), .*materialize", line
        ):
            weights[match[1]] = int(match[2]) * int(match[3])
            live, seen = live + weights[match[1]], seen + 1
            peak = max(peak, live)
        elif match := re.match(r"\s*del (buf\d+)$", line):
            live -= weights.pop(match[1], 0)
    assert seen == 12  # q, k, v, out, fc1, fc2, each for both branches
    assert not weights
    assert peak <= 2 * 64 * 32  # both copies of the largest weight alone
