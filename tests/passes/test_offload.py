from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from tests.conftest import SPEC
from tests.passes.graphs import ready_for, two_blocks
from tests.passes.test_dual_perturbation import bind_keys
from zograph import printer
from zograph.errors import PipelineError
from zograph.ir import Kind, info, meta, placeholders
from zograph.layout import Layout, StageUse
from zograph.meter import Cost
from zograph.ops import fold_
from zograph.passes import Offload, PassContext
from zograph.pipeline import Pipeline, default_passes
from zograph.testing import (
    Golden,
    GraphBuilder,
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
    random_inputs,
    run_graph,
)
from zograph.transfers import FETCH, FOLD, RELEASE, WAIT, WRITEBACK
from zograph.verifier import Verifier

aten = torch.ops.aten

RESIDENT = ("layers.0.w", "layers.1.bias")


def hand_made(gm: fx.GraphModule, *resident: str, **fields: Any) -> Layout:
    """Return a layout that keeps some weights on the device; each stage takes a millisecond."""
    uses = []
    for node in gm.graph.nodes:
        if meta(node).kind == Kind.STAGE:
            names = [str(meta(n).name) for n in node.all_input_nodes
                     if meta(n).kind == Kind.PARAMETER]  # fmt: skip
            cost = Cost(work=(("float32", 100_000_000, 0),))
            uses.append(
                StageUse(int(meta(node).stage or 0), str(node.target), tuple(names), 0, cost)
            )
    usual: dict[str, Any] = {"held": 0, "slots": 4 * 4096, "pair": None, "cut": None, "fixed": 0}
    return Layout(
        tier="host", spec=SPEC, budget=1 << 20, resident=frozenset(resident), uses=tuple(uses),
        **usual | fields,
    )  # fmt: skip


def outlined() -> fx.GraphModule:
    return ready_for("offload", two_blocks())


def context(gm: fx.GraphModule, *resident: str, **fields: Any) -> PassContext:
    return PassContext(layout=hand_made(gm, *resident, **fields))


def offloaded(gm: fx.GraphModule, *resident: str) -> fx.GraphModule:
    ctx = context(gm, *resident)
    gm = Offload().apply(gm, ctx).gm
    info(gm).facts |= Offload.contract.provides
    return gm


def calls(gm: fx.GraphModule, target: object) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def weights(nodes: Any) -> list[str]:
    return [str(meta(n).name) for n in nodes]


def bound(gm: fx.GraphModule, **terms: list[float]) -> dict[str, Any]:
    """Return random inputs by name, true keys, and the given pending terms."""
    names = [str(meta(n).name) for n in placeholders(gm)]
    found = dict(zip(names, bind_keys(gm, random_inputs(gm)), strict=True))
    dtypes = {"seeds": torch.int64, "coefs": torch.float32, "scales": torch.float32}
    return found | {f"pending.{k}": torch.tensor(v, dtype=dtypes[k]) for k, v in terms.items()}


NOTHING: dict[str, list[float]] = {"seeds": [3], "coefs": [0.0], "scales": [1.0]}
SOMETHING: dict[str, list[float]] = {"seeds": [3], "coefs": [0.1], "scales": [0.9]}


def test_golden_and_node_delta(golden: Golden) -> None:
    gm = outlined()
    before = copy.deepcopy(gm)
    ctx = context(gm, *RESIDENT)
    result = Offload().apply(gm, ctx)
    info(gm).facts |= Offload.contract.provides
    golden.check(gm, "offload_after")
    assert result.notes == ("4 of 6 visits of weights are fetched",)
    # four fetches, waits and releases; three folds and write-backs; an item for each weight
    # that is waited for (4), folded (5) and written back (3)
    assert_node_delta(before, gm, added=3 * 4 + 2 * 3 + 4 + 5 + 3, removed=0)
    Verifier().check(gm, after="offload")


def test_golden_where_all_weights_stay(golden: Golden) -> None:
    gm = outlined()
    before = copy.deepcopy(gm)
    Offload().apply(gm, PassContext())
    info(gm).facts |= Offload.contract.provides
    golden.check(gm, "offload_resident_after")
    assert_node_delta(before, gm, added=3 + 5, removed=0)
    Verifier().check(gm, after="offload")


@pytest.mark.parametrize("resident", [(), RESIDENT, ("wte",)])
def test_without_pending_terms_nothing_changes(resident: tuple[str, ...]) -> None:
    gm = outlined()
    before = copy.deepcopy(gm)
    gm = offloaded(gm, *resident)
    values = bound(gm, **NOTHING)
    twin = [values[str(meta(n).name)] for n in placeholders(before)]
    expected = run_graph(before, twin)
    found = run_graph(gm, list(values.values()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    moved = run_graph(gm, list(bound(gm, **SOMETHING).values()))
    assert not torch.equal(expected[0], moved[0])


@pytest.mark.parametrize("resident", [(), RESIDENT, ("wte",)])
@pytest.mark.parametrize("directions", [1, 2])
def test_pending_terms_are_folded_first(resident: tuple[str, ...], directions: int) -> None:
    gm = outlined()
    before = copy.deepcopy(gm)
    ctx = replace(context(gm, *resident), directions=directions)
    Offload().apply(gm, ctx)
    terms = {"seeds": [3, 8], "coefs": [0.1, -0.2], "scales": [0.9, 1.0]}
    terms = {k: v[:directions] for k, v in terms.items()}
    values = bound(gm, **terms)
    found = run_graph(gm, list(values.values()))
    pending = [values[f"pending.{k}"] for k in terms]

    def folded(*, skip: str = "") -> list[torch.Tensor]:
        moved = dict(values)
        for name, param in info(gm).params.items():
            if name != skip:
                moved[name] = values[name].clone()
                fold_(
                    moved[name], *pending, param.key, distribution="normal", decay=param.decay
                )  # fmt: skip
        return run_graph(before, [moved[str(meta(n).name)] for n in placeholders(before)])

    assert all(torch.equal(a, b) for a, b in zip(folded(), found, strict=True))
    for skip in info(gm).params:
        assert not torch.equal(folded(skip=skip)[0], found[0])


def test_equivalent_with_a_control() -> None:
    gm = outlined()
    before = copy.deepcopy(gm)
    Offload().apply(gm, PassContext())
    inputs = bound(gm, **NOTHING)
    twin = [inputs[str(meta(n).name)] for n in placeholders(before)]
    for node in calls(gm, FOLD):  # what is only in `gm` gets random values: leave it out
        for item in list(node.users):
            item.replace_all_uses_with(node.args[0][item.args[1]])
            gm.graph.erase_node(item)
        gm.graph.erase_node(node)
    gm.recompile()
    assert_equivalent(before, gm, twin)


def test_idempotent() -> None:
    gm = outlined()
    assert_idempotent(Offload(), gm, context(gm, *RESIDENT))
    assert_idempotent(Offload(), outlined())
    gm = outlined()
    assert_idempotent(Offload(), gm, replace(context(gm, *RESIDENT), fold_every=3))


def test_a_second_run_says_so() -> None:
    gm = outlined()
    ctx = context(gm)
    Offload().apply(gm, ctx)
    result = Offload().apply(gm, ctx)
    assert not result.modified
    assert result.notes == ("transfers are in the graph already",)


def test_it_needs_an_outlined_graph() -> None:
    with pytest.raises(PipelineError, match="offload requires a outlined graph"):
        Pipeline((Offload(),)).validate()


def test_tied_weights_are_fetched_twice_and_folded_once() -> None:
    gm = offloaded(outlined())
    fetched = [weights(n.args[0]) for n in calls(gm, FETCH)]
    assert [names.count("wte") for names in fetched] == [1, 0, 0, 1]
    folded = [name for n in calls(gm, FOLD) for name in weights(n.args[0])]
    assert sorted(folded) == sorted(info(gm).params)
    (written,) = (n for n in calls(gm, WRITEBACK) if "wte" in weights(n.args[0]))
    again = calls(gm, FETCH)[-1].args[0][0]
    assert again.args[0] is written  # the second visit sees the folded value
    assert meta(calls(gm, FETCH)[-1]).stage == 4


def every_third(gm: fx.GraphModule, *resident: str) -> fx.GraphModule:
    Offload().apply(gm, replace(context(gm, *resident), fold_every=3))
    info(gm).facts |= Offload.contract.provides
    return gm


def test_golden_where_weights_are_written_every_third_step(golden: Golden) -> None:
    gm = every_third(outlined(), *RESIDENT)
    golden.check(gm, "offload_every_third")
    Verifier().check(gm, after="offload")


def test_weights_that_are_not_written_are_folded_wherever_they_are_fetched() -> None:
    gm, once = every_third(outlined()), offloaded(outlined())
    folded = [name for n in calls(gm, FOLD) for name in weights(n.args[0])]
    assert sorted(folded) == sorted([*info(gm).params, "wte"])
    (written,) = (n for n in calls(gm, WRITEBACK) if "wte" in weights(n.args[0]))
    assert written.args[1] == 3
    again = calls(gm, FETCH)[-1].args[0][0]
    assert again.op == "placeholder"  # the second visit starts from the base
    values = list(bound(gm, **SOMETHING).values())
    expected = run_graph(once, values)
    assert all(torch.equal(a, b) for a, b in zip(run_graph(gm, values), expected, strict=True))


def test_every_slot_is_released_behind_its_stage() -> None:
    gm = offloaded(outlined(), *RESIDENT)
    place = {n: i for i, n in enumerate(gm.graph.nodes)}
    for fetch, release in zip(calls(gm, FETCH), calls(gm, RELEASE), strict=True):
        stage = meta(fetch).stage
        assert meta(release).stage == stage
        (body,) = (n for n in gm.graph.nodes
                   if meta(n).kind == Kind.STAGE and meta(n).stage == stage)  # fmt: skip
        assert place[fetch] < place[body] < place[release]
        uses = release.args[1]
        assert set(body.users) <= set(uses)
        assert sum(u.args[0].target is WRITEBACK for u in uses) == sum(
            len(n.args[0]) for n in calls(gm, WRITEBACK) if meta(n).stage == stage
        )


def freeze(gm: fx.GraphModule, name: str) -> None:
    info(gm).params[name] = replace(info(gm).params[name], trainable=False)


@pytest.mark.parametrize("resident", [(), RESIDENT])
def test_frozen_weights_are_fetched_and_nothing_more(resident: tuple[str, ...]) -> None:
    gm = two_blocks()
    freeze(gm, "layers.0.w")
    freeze(gm, "layers.1.w")
    gm = offloaded(ready_for("offload", gm), *resident)
    for target in (FOLD, WRITEBACK):
        names = [name for n in calls(gm, target) for name in weights(n.args[0])]
        assert names
        assert not {"layers.0.w", "layers.1.w"} & set(names)
    fetched = [name for n in calls(gm, FETCH) for name in weights(n.args[0])]
    assert ("layers.0.w" in fetched) == (not resident)
    assert "layers.1.w" in fetched
    Verifier().check(gm, after="offload")


def with_unused() -> fx.GraphModule:
    b = GraphBuilder()
    w = b.param("w", (2, 2))
    b.param("spare", (3, 2))
    b.param("frozen", (3,), trainable=False)
    b.param("spare.bias", (5,))
    x = b.call(aten.linear.default, b.input("x", (2, 2)), w)
    return b.build(b.call(aten.mean.default, x), facts=("normalized",))


@pytest.mark.parametrize("resident", [(), ("spare",), ("w", "spare", "spare.bias")])
def test_unused_weights_are_folded_at_the_end(resident: tuple[str, ...]) -> None:
    gm = offloaded(ready_for("offload", with_unused()), *resident)
    folds = calls(gm, FOLD)
    assert [weights(n.args[0]) for n in folds] == [["w"], ["spare"], ["spare.bias"]]
    assert list(info(gm).stages.values())[1:] == ["unused spare", "unused spare.bias"]
    assert [n.args[6] for n in folds] == [[True], [True], [False]]  # decay
    streamed = {"w", "spare", "spare.bias"} - set(resident)
    assert {n for w in calls(gm, WRITEBACK) for n in weights(w.args[0])} == streamed
    assert len(calls(gm, RELEASE)) == len(streamed)
    Verifier().check(gm, after="offload")
    gm.graph.eliminate_dead_code()
    assert len(calls(gm, FOLD)) == 3


def test_weights_that_export_dropped_get_their_placeholder_back() -> None:
    gm = ready_for("offload", with_unused())
    for node in placeholders(gm, Kind.PARAMETER):
        if not node.users:
            gm.graph.erase_node(node)
    gm = offloaded(gm)
    assert weights(placeholders(gm, Kind.PARAMETER)) == ["w", "spare", "spare.bias"]
    Verifier().check(gm, after="offload")


def test_an_evaluation_fetches_and_folds() -> None:
    """What is pending is folded on the first visit, whoever visits."""
    gm = two_blocks()
    for pass_ in default_passes().for_evaluation():
        if pass_.name == "offload":
            break
        if pass_.name != "normalize":
            gm = pass_.apply(gm, PassContext()).gm
            info(gm).facts |= pass_.contract.provides
    before = copy.deepcopy(gm)
    gm = offloaded(gm, *RESIDENT)
    counts = printer.summary(gm)
    assert (counts["zograph.fetch"], counts["zograph.fold"], counts["zograph.writeback"]) == (
        4, 3, 3,
    )  # fmt: skip
    Verifier().check(gm, after="offload")
    values = bound(gm, **NOTHING)
    twin = [values[str(meta(n).name)] for n in placeholders(before)]
    expected, found = run_graph(before, twin), run_graph(gm, list(values.values()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_evaluation_leaves_unused_weights_alone() -> None:
    gm = with_unused()
    for pass_ in default_passes().for_evaluation():
        if pass_.name not in ("normalize", "offload", "schedule", "lower"):
            gm = pass_.apply(gm, PassContext()).gm
            info(gm).facts |= pass_.contract.provides
    gm = offloaded(gm)
    assert [weights(n.args[0]) for n in calls(gm, FOLD)] == [["w"]]


def test_pairs_are_split_where_the_layout_says_so() -> None:
    gm = outlined()
    before = copy.deepcopy(gm)
    result = Offload().apply(gm, context(gm, pair=4 * 4 * 4 - 1))
    assert result.notes[1] == "2 pairs of copies made one after the other"  # table, shared body
    counts = printer.summary(gm)
    assert counts["zograph.materialize_one"] == 4
    assert counts["zograph.materialize"] == printer.summary(before)["zograph.materialize"] - 2
    values = bound(gm, **NOTHING)
    twin = [values[str(meta(n).name)] for n in placeholders(before)]
    expected, found = run_graph(before, twin), run_graph(gm, list(values.values()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_what_is_awaited_is_what_is_fetched() -> None:
    gm = offloaded(outlined())
    for wait in calls(gm, WAIT):
        assert wait.args[0].target is FETCH
        assert [meta(u).name for u in sorted(wait.users)] == weights(wait.args[0].args[0])
        assert all(meta(u).kind == Kind.WEIGHT for u in wait.users)
