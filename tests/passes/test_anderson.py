from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import fx

from tests.passes.graphs import block, ready_for, two_blocks
from tests.passes.test_dual_perturbation import bind_keys
from zograph import printer
from zograph.errors import OptionError, PassError, PipelineError, VerifyError
from zograph.fixed_points.nodes import anderson_solve, fixed_point
from zograph.ir import info, meta
from zograph.passes import Anderson, Lower, Outline, PassContext
from zograph.passes.lower import CompiledBody
from zograph.pipeline import default_passes
from zograph.testing import (
    Golden,
    GraphBuilder,
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
    assert_rejects,
    random_inputs,
    run_graph,
)
from zograph.trajectory import Anderson as TrajectoryMixing
from zograph.verifier import Verifier

aten = torch.ops.aten
OPTIONS = {
    "solver": "auto",
    "tol": 1e-5,
    "max_iter": 40,
    "stop": "relative",
    "window": 3,
    "beta": 1.0,
    "ridge": 1e-6,
    "history_dtype": None,
}


def deq(*solvers: str) -> fx.GraphModule:
    """Build one fixed point of tanh(W z + x) a solver, one after the other, and a mean loss."""
    b = GraphBuilder()
    x, names = b.input("x", (3, 4)), [f"layers.{i}.w" for i in range(len(solvers))]
    weights = [b.param(name, (4, 4)) for name in names]
    for i, (w, solver) in enumerate(zip(weights, solvers, strict=True)):
        inner = b.inner()
        z, c0, c1 = (inner.input(n, s) for n, s in (("z0", (3, 4)), ("c0", (4, 4)), ("c1", (3, 4))))
        small = inner.call(aten.mul.Tensor, inner.call(aten.linear.default, z, c0), 0.2)
        out = inner.call(aten.tanh.default, inner.call(aten.add.Tensor, small, c1))
        cell = b.cell(inner.build(out))
        stack = block(f"layers.{i}")[:2]
        start = b.call(aten.zeros.default, [3, 4], module=stack)
        kwargs = OPTIONS | {"solver": solver}
        solve = b.call(fixed_point, cell, (start,), (w, x), kwargs=kwargs, module=stack)
        x = b.call(operator.getitem, solve, 0)
    return b.build(b.call(aten.mean.default, x), facts=("normalized",))


def ready(*solvers: str) -> fx.GraphModule:
    return ready_for("anderson", deq(*solvers))


def solves(gm: fx.GraphModule) -> dict[tuple[str, str | None], str]:
    """Which solver each module's fixed point has, by branch."""
    nodes = [n for n in gm.graph.nodes if "solve" in getattr(n.target, "__name__", "")]
    return {(meta(n).module[-1][0], meta(n).branch): n.target.__name__ for n in nodes}


def test_golden_and_semantics(golden: Golden) -> None:
    gm = ready("auto", "picard")
    before = copy.deepcopy(gm)
    golden.check(gm, "anderson_before")
    result = Anderson().apply(gm, PassContext())
    golden.check(gm, "anderson_after")
    assert result.notes == ("2 solves by anderson", "2 solves by picard")
    assert_node_delta(before, gm, added=4, removed=4)
    assert_equivalent(before, gm, bind_keys(before, random_inputs(before)))
    Verifier().check(gm, after="anderson")


def test_both_solvers_find_the_same_point() -> None:
    mixed, forward = (
        Anderson(mode=mode).apply(ready("auto", "auto"), PassContext()).gm
        for mode in ("always", "off")
    )
    assert set(solves(mixed).values()) == {"anderson_solve"}
    assert set(solves(forward).values()) == {"picard_solve"}
    inputs = bind_keys(mixed, random_inputs(mixed))
    assert_equivalent(mixed, forward, inputs, bitwise=False, rtol=1e-4)
    a, b = (run_graph(gm, inputs)[0] for gm in (mixed, forward))
    assert not torch.equal(a, b)  # they did run apart


def test_a_named_solver_is_kept() -> None:
    gm = Anderson(mode="off").apply(ready("anderson"), PassContext()).gm
    assert set(solves(gm).values()) == {"anderson_solve"}
    gm = Anderson(mode="always").apply(ready("picard"), PassContext()).gm
    assert set(solves(gm).values()) == {"picard_solve"}


def test_auto_follows_what_is_recorded_in_both_branches() -> None:
    ctx = PassContext(solvers={"layers.1": "picard"})
    gm = Anderson().apply(ready("auto", "auto"), ctx).gm
    assert solves(gm) == {
        ("layers.0", "+"): "anderson_solve",
        ("layers.0", "-"): "anderson_solve",
        ("layers.1", "+"): "picard_solve",
        ("layers.1", "-"): "picard_solve",
    }


def test_both_branches_start_from_one_point() -> None:
    gm = Anderson().apply(ready("auto"), PassContext()).gm
    plus, minus = (n for n in gm.graph.nodes if n.target is anderson_solve)
    assert plus.args[1] == minus.args[1]
    assert plus.args[0] is minus.args[0]
    assert plus.args[2] != minus.args[2]
    assert meta(plus.args[1][0]).hoisted


def test_equal_blocks_share_a_body_and_its_cell() -> None:
    gm = Anderson().apply(ready("auto", "auto", "auto"), PassContext()).gm
    info(gm).facts |= Anderson.contract.provides
    before = copy.deepcopy(gm)
    result = Outline().apply(gm, PassContext())
    # The first is called with the same x in both branches, the others are alike.
    assert result.notes == ("5 stages, 4 distinct bodies",)
    assert len(printer.cells(gm)) == 2
    assert not any(n.op == "get_attr" for n in gm.graph.nodes)
    Verifier().check(gm, after="outline")
    assert_equivalent(before, gm, bind_keys(before, random_inputs(before)))


def test_lower_compiles_the_cell_and_leaves_the_solve() -> None:
    gm = ready_for("lower", deq("auto", "picard"))
    before = copy.deepcopy(gm)
    ctx = PassContext()
    result = Lower().apply(gm, ctx)
    assert result.notes == ("3 bodies compiled",)
    bodies = [m for name, m in gm.named_children() if name.startswith("body")]
    cells = [c for m in bodies for c in m.children() if not isinstance(m, CompiledBody)]
    assert [isinstance(m, CompiledBody) for m in bodies].count(False) == len(cells) == 2
    assert all(isinstance(c, CompiledBody) for c in cells)
    Verifier().check(gm, after="lower")
    inputs = bind_keys(before, random_inputs(before))
    assert_equivalent(before, gm, inputs, bitwise=False, rtol=1e-5)
    assert not Lower().apply(gm, ctx).modified


def test_idempotent() -> None:
    assert_idempotent(Anderson(), ready("auto", "picard"))


def test_a_graph_without_fixed_points_is_left_alone() -> None:
    gm = ready_for("anderson", two_blocks())
    result = Anderson().apply(gm, PassContext())
    assert not result.modified
    assert result.notes == ()


def test_rejects() -> None:
    with pytest.raises(OptionError, match="mode='never' is unknown; use one of auto, always, off"):
        Anderson(mode="never")  # type: ignore[arg-type]
    ctx = PassContext(solvers={"layers.0": "newton"})
    match = "recorded for the fixed point 'layers.0' is 'newton'"
    assert_rejects(Anderson(), ready("auto"), PassError, match, ctx)
    with pytest.raises(PipelineError, match="anderson requires a partitioned graph"):
        default_passes().replace("anderson").insert_before("partition", Anderson()).validate()


def test_a_tolerance_looser_than_eps_warns() -> None:
    with pytest.warns(UserWarning, match="tol=1e-05, which is looser than eps=1e-06"):
        Anderson().apply(ready("auto"), PassContext(eps=1e-6))
    Anderson().apply(ready("auto"), PassContext(eps=1e-5))  # warnings are errors


def test_evaluation_is_solved_too() -> None:
    assert "anderson" in [p.name for p in default_passes().for_evaluation()]


BROKEN: list[tuple[str, Any]] = [
    ("a cell as the first argument", lambda n: (n.args[1][0], *n.args[1:])),
    ("3 values for the cell", lambda n: (*n.args[:2], n.args[2][:1])),
    ("input 1 of the cell: f32[4, 4]", lambda n: (*n.args[:2], n.args[2][::-1])),
    (
        "a cell with one result per state",
        lambda n: (n.args[0], n.args[1] + n.args[2][:1], n.args[2][1:]),
    ),
]


@pytest.mark.parametrize(("message", "change"), BROKEN)
def test_the_verifier_sees_solves_and_cells_that_do_not_fit(message: str, change: Any) -> None:
    gm = Anderson().apply(ready("auto"), PassContext()).gm
    node = next(n for n in gm.graph.nodes if n.target is anderson_solve)
    node.args = change(node)
    with pytest.raises(VerifyError, match="the rule 'cells'") as error:
        Verifier().check(gm, after="anderson", skip=("dead", "lint"))
    assert message in str(error.value)


def test_the_verifier_looks_into_cells() -> None:
    gm = ready("auto")
    (cell,) = printer.cells(gm)
    node = next(n for n in cell.graph.nodes if n.target is aten.tanh.default)
    node.target = aten.tanh_.default
    with pytest.raises(
        VerifyError, match="the rule 'functional' at %tanh_ in a stage body or cell"
    ):
        Verifier().check(gm, after="anderson")


def test_golden_of_a_mixed_trajectory(golden: Golden) -> None:
    gm = ready_for("anderson", two_blocks())
    before = printer.text(gm)
    ctx = PassContext(mixing=TrajectoryMixing(directions=8, inner_steps=6, window=5))
    result = Anderson().apply(gm, ctx)
    assert result.modified
    assert result.notes == ("the trajectory: 8 directions x 6 steps, window 5",)
    golden.check(gm, "anderson_trajectory")
    assert not Anderson().apply(gm, ctx).modified
    changed = set(printer.text(gm).splitlines()) ^ set(before.splitlines())
    assert len(changed) == 2  # the line of the seed
