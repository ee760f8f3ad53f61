from __future__ import annotations

import copy

import torch

import zograph
from tests.passes.graphs import ready_for, two_blocks
from zograph.errors import PassError
from zograph.graphs import key_tables
from zograph.ir import Kind, info, meta, placeholders
from zograph.passes import DualPerturbation, PassContext
from zograph.testing import (
    Golden,
    GraphBuilder,
    assert_idempotent,
    assert_node_delta,
    assert_rejects,
    random_inputs,
    run_graph,
)
from zograph.verifier import Verifier

aten = torch.ops.aten


def bind_keys(gm: torch.fx.GraphModule, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Replace random keys by the true ones."""
    names = [str(meta(n).name) for n in placeholders(gm)]
    keys = key_tables(gm)
    return [keys.get(n, v) for n, v in zip(names, values, strict=True)]


def test_golden(golden: Golden) -> None:
    gm = ready_for("dual_perturbation", two_blocks())
    before = copy.deepcopy(gm)
    DualPerturbation().apply(gm, PassContext())
    golden.check(gm, "dual_perturbation_after")
    # five weights, the table twice; every node but the shared gate; one head output fewer
    assert_node_delta(before, gm, added=12 + 7, removed=0)
    Verifier().check(gm, after="dual_perturbation")


def test_each_branch_is_the_graph_at_moved_weights() -> None:
    gm = ready_for("dual_perturbation", two_blocks())
    before = copy.deepcopy(gm)
    inputs = random_inputs(before, seed=3)
    DualPerturbation().apply(gm, PassContext())
    values = bind_keys(gm, inputs + random_inputs(gm)[len(inputs) :])
    names = [str(meta(n).name) for n in placeholders(gm)]
    seed, eps = (values[names.index(n)] for n in ("seed", "eps"))
    found = run_graph(gm, values)

    def at(sign: int) -> torch.Tensor:
        moved = [
            x + sign * (eps * zograph.noise(str(meta(n).name), x.shape, int(seed)))
            if meta(n).kind == Kind.PARAMETER
            else x
            for n, x in zip(placeholders(before), inputs, strict=True)
        ]
        return run_graph(before, moved)[0]

    assert torch.equal(found[0], at(1))
    assert torch.equal(found[1], at(-1))
    assert not torch.equal(found[0], found[1])


def test_idempotent() -> None:
    assert_idempotent(DualPerturbation(), ready_for("dual_perturbation", two_blocks()))


def test_a_loss_without_trainable_weights_is_rejected() -> None:
    b = GraphBuilder()
    b.param("unused", (2,))
    x = b.input("x", (2,))
    gm = b.build(b.call(aten.mean.default, x), facts=("normalized",))
    gm = ready_for("dual_perturbation", gm)
    assert_rejects(DualPerturbation(), gm, PassError, "depends on no trainable parameter")


def test_frozen_weights_stay_as_they_are() -> None:
    gm = two_blocks()
    table = info(gm).params["wte"]
    info(gm).params["wte"] = type(table)("wte", table.shape, table.dtype, False, True, table.key)
    gm = ready_for("dual_perturbation", gm)
    DualPerturbation().apply(gm, PassContext())
    assert all("wte" not in names for names in info(gm).keys.values())
    Verifier().check(gm, after="dual_perturbation")
