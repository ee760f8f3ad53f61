from __future__ import annotations

import copy
import operator

import pytest

from tests.passes.graphs import two_blocks
from tests.passes.test_anderson import deq
from zograph.errors import PipelineError
from zograph.fixed_points.nodes import trial_solve
from zograph.ir import Kind, meta, output
from zograph.observers import Observers
from zograph.passes import Anderson, Lower, PassContext, Trial
from zograph.pipeline import Pipeline, default_passes, run
from zograph.testing import Golden, assert_idempotent, random_inputs, run_graph
from zograph.verifier import Verifier


def test_golden_and_findings(golden: Golden) -> None:
    gm = deq("auto", "anderson", "auto", "picard")
    result = Trial().apply(gm, PassContext())
    golden.check(gm, "trial_after")
    assert result.notes == ("2 fixed points are measured",)
    Verifier().check(gm, after="trial")
    assert [meta(n).name for n in output(gm).args[0]] == ["layers.0", "layers.2"]
    inputs = random_inputs(gm)
    for found in run_graph(gm, inputs):
        assert found.shape == (2, 3)
        assert (found[:, 0] == 0).all()  # every sample converges
        assert (found[:, 1:] > 0).all()


def test_it_counts_what_the_solvers_need() -> None:
    """The evaluations are those of the solves that the pass `anderson` would put there."""
    before = deq("auto")
    gm = Trial().apply(copy.deepcopy(before), PassContext()).gm
    inputs = random_inputs(before)
    (found,) = run_graph(gm, inputs)
    for row, mode in enumerate(("off", "always")):
        solved = Anderson(mode=mode).apply(copy.deepcopy(before), PassContext()).gm  # type: ignore[arg-type]
        node = next(n for n in solved.graph.nodes if "solve" in n.name)
        with solved.graph.inserting_after(node):
            count = solved.graph.call_function(operator.getitem, (node, 1))
        output(solved).args = ((count,),)
        solved.recompile()
        (iterations,) = run_graph(solved, inputs)
        assert int(iterations.max()) == found[row, 1]


def test_it_goes_through_the_pipeline() -> None:
    passes = default_passes().for_trial()
    assert passes is not None
    names = [p.name for p in passes]
    assert names[names.index("trial") + 1] == "partition"
    assert not {"dual_perturbation", "materialize"} & set(names)
    graph = deq("auto", "picard", "auto", "picard")
    gm = run(graph, Pipeline(passes.passes[1:]), PassContext(), Observers(verify=True))
    assert [meta(n).name for n in output(gm).args[0]] == ["layers.0", "layers.2"]
    assert [meta(n).stage for n in gm.graph.nodes if meta(n).kind is Kind.STAGE][-1] == 6


def test_only_what_is_open_is_measured() -> None:
    gm = deq("auto", "auto", "picard")
    ctx = PassContext(solvers={"layers.0": "picard"})
    Trial().apply(gm, ctx)
    (node,) = (n for n in gm.graph.nodes if n.target is trial_solve)
    assert meta(node).module[-1][0] == "layers.1"
    for given, known in ((deq("picard"), {}), (two_blocks(), {}), (deq("auto"), {"layers.0": "x"})):
        assert not Trial().apply(given, PassContext(solvers=known)).modified


def test_a_step_that_names_its_mode_has_no_trial() -> None:
    for mode in ("always", "off"):
        passes = default_passes().replace("anderson", Anderson(mode=mode))  # type: ignore[arg-type]
        assert passes.for_trial() is None
    assert default_passes().replace("anderson").for_trial() is None


def test_a_trial_compiles_cells_alone() -> None:
    passes = default_passes().for_trial()
    assert passes is not None
    assert [p for p in passes if isinstance(p, Lower)] == [Lower(bodies=False)]
    gm = run(deq("auto"), Pipeline(passes.passes[1:]), PassContext(), Observers())
    lowered = [type(m).__name__ for _, m in gm.named_modules()]
    assert lowered.count("CompiledBody") == 1


def test_idempotent() -> None:
    assert_idempotent(Trial(), deq("auto", "picard"))


def test_rejects() -> None:
    with pytest.raises(PipelineError, match="trial requires a normalized graph"):
        default_passes().insert_before("normalize", Trial()).validate()
    with pytest.raises(PipelineError, match="trial must run before the graph is partitioned"):
        default_passes().insert_after("anderson", Trial()).validate()
