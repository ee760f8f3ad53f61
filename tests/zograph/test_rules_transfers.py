"""Every rule on transfers meets a graph that breaks it, and its message."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from tests.passes.graphs import ready_for, two_blocks
from tests.passes.test_offload import calls, context, every_third, freeze, offloaded, outlined
from zograph import ir, rules_transfers
from zograph.errors import VerifyError
from zograph.formats import with_format
from zograph.ir import annotate, info, meta
from zograph.passes import Schedule
from zograph.rules import RULES
from zograph.transfers import DECODE, ENCODE, FETCH, FOLD, RELEASE, WAIT, WRITEBACK
from zograph.verifier import Verifier

Make = Callable[[], fx.GraphModule]
BREAKS: list[tuple[str, Make, tuple[str, ...]]] = []


def breaks(rule: str, *messages: str) -> Callable[[Make], Make]:
    """Register a function that makes a graph breaking `rule`."""

    def register(make: Make) -> Make:
        BREAKS.append((rule, make, messages))
        return make

    return register


def streamed(*resident: str) -> fx.GraphModule:
    return offloaded(outlined(), *resident)


def scheduled(slots: int = 3 * 4096) -> fx.GraphModule:
    gm = outlined()
    ctx = context(gm, slots=slots)
    gm = offloaded(gm)
    Schedule().apply(gm, ctx)
    info(gm).facts |= Schedule.contract.provides
    return gm


def items(node: fx.Node) -> list[fx.Node]:
    return sorted(node.users)


@breaks("slots", "expected: one wait and no other user", "found:    2 waits")
def two_waits() -> fx.GraphModule:
    gm = streamed()
    fetch, wait = calls(gm, FETCH)[1], calls(gm, WAIT)[1]
    with gm.graph.inserting_after(wait):
        ir.call(gm.graph, WAIT, (fetch,), source="test", stage=2)
    return gm


@breaks("slots", "expected: one wait and no other user", "found:    0 waits")
def no_wait() -> fx.GraphModule:
    gm = streamed()
    fetch, wait = calls(gm, FETCH)[3], calls(gm, WAIT)[3]
    for item in items(wait):
        item.args = (fetch, *item.args[1:])
    gm.graph.erase_node(wait)
    return gm


@breaks("slots", "expected: one wait and no other user", "found:    1 waits")
def a_use_without_the_wait() -> fx.GraphModule:
    gm = streamed()
    items(calls(gm, WAIT)[3])[0].args = (calls(gm, FETCH)[3], 0)
    return gm


@breaks("slots", "expected: a release of its slot", "found:    none")
def no_release() -> fx.GraphModule:
    gm = streamed()
    gm.graph.erase_node(calls(gm, RELEASE)[2])
    return gm


@breaks("slots", "expected: a release of its slot", "found:    none")
def a_weight_left_out_of_the_release() -> fx.GraphModule:
    gm = streamed()
    release = calls(gm, RELEASE)[1]
    release.args = (release.args[0][1:], release.args[1])
    return gm


@breaks("slots", "expected: uses of stage 2 only", "of stage 3", "fetch the weight again")
def a_use_by_another_stage() -> fx.GraphModule:
    gm = streamed()
    second, third = (n for n in gm.graph.nodes if n.op == "call_module" and meta(n).stage in (2, 3))
    third.replace_input_with(third.args[0], second.args[0])
    return gm


@breaks("slots", "expected: uses ahead of its release", "release it later")
def a_use_behind_the_release() -> fx.GraphModule:
    gm = streamed("layers.0.w", "layers.0.bias", "layers.1.w", "layers.1.bias")
    release = calls(gm, RELEASE)[1]
    (stage,) = (n for n in gm.graph.nodes if n.op == "call_module" and meta(n).stage == 4)
    release.args = (release.args[0], [])
    stage.prepend(release)
    return gm


@breaks("folds", "expected: folds of trainable weights", "found:    layers.0.w is frozen")
def a_fold_of_a_frozen_weight() -> fx.GraphModule:
    gm = streamed()
    freeze(gm, "layers.0.w")
    return gm


@breaks("folds", "expected: one fold of layers.1.w a step", "found:    a second one")
def a_second_fold() -> fx.GraphModule:
    gm = streamed(*info(two_blocks()).params)
    fold = calls(gm, FOLD)[2]
    folded = items(fold)
    assert meta(folded[0]).name == "layers.1.w"
    with gm.graph.inserting_after(folded[-1]):
        again = ir.call(gm.graph, FOLD, (folded, *fold.args[1:]), source="test", stage=3)
    point = again
    for i, item in enumerate(folded):
        with gm.graph.inserting_after(point):
            point = ir.getitem(gm.graph, again, i)
        annotate(point, kind=ir.Kind.WEIGHT, name=meta(item).name)
        item.replace_all_uses_with(point, delete_user_cb=lambda u: u is not again)
    return gm


@breaks("folds", "expected: one fold of wte a step", "found:    a second one")
def a_second_write_back_of_a_weight_that_is_written_every_third_step() -> fx.GraphModule:
    gm = every_third(outlined())
    (weight,) = items(calls(gm, FOLD)[-1])
    assert meta(weight).name == "wte"
    with gm.graph.inserting_after(weight):
        ir.call(gm.graph, WRITEBACK, ([weight], 3), source="test", stage=4)
    return gm


@breaks("folds", "expected: a write-back of layers.0.w", "found:    none")
def no_write_back_in_any_step() -> fx.GraphModule:
    gm = every_third(outlined())
    drop_write_back(gm, 2)
    return gm


@breaks("folds", "expected: a write-back of layers.0.w", "found:    none")
def no_write_back() -> fx.GraphModule:
    gm = streamed()
    drop_write_back(gm, 2)
    return gm


def drop_write_back(gm: fx.GraphModule, stage: int) -> None:
    (back,) = (n for n in calls(gm, WRITEBACK) if meta(n).stage == stage)
    for release in calls(gm, RELEASE):
        kept = [u for u in release.args[1] if back not in u.all_input_nodes]
        release.args = (release.args[0], kept)
    for item in items(back):
        gm.graph.erase_node(item)
    gm.graph.erase_node(back)


@breaks("folds", "uses the weight as it was fetched", "use the result of the fold")
def a_use_of_the_weight_before_its_fold() -> fx.GraphModule:
    gm = streamed()
    fold = calls(gm, FOLD)[1]
    (stage,) = (n for n in gm.graph.nodes if n.op == "call_module" and meta(n).stage == 2)
    stage.replace_input_with(items(fold)[0], fold.args[0][0])
    return gm


@breaks("folds", "expected: a fold of layers.1.w", "found:    none", "at the end of the step")
def no_fold() -> fx.GraphModule:
    gm = streamed()
    drop_write_back(gm, 3)
    fold = calls(gm, FOLD)[2]
    for item in items(fold):
        item.replace_all_uses_with(fold.args[0][item.args[1]])
        gm.graph.erase_node(item)
    gm.graph.erase_node(fold)
    return gm


@breaks("schedule", "expected: device slots within 8191 bytes", "found:    12288 bytes")
def too_little_room() -> fx.GraphModule:
    gm = scheduled()
    found = info(gm).schedule
    assert found is not None
    info(gm).schedule = replace(found, capacity={"device": 8191})
    return gm


@breaks("schedule", "expected: a schedule without races", "'fold 2' may start before 'fetch 2'")
def a_missing_event() -> fx.GraphModule:
    gm = scheduled()
    found = info(gm).schedule
    assert found is not None
    kept = tuple(e for e in found.events if (e.before, e.after) != ("fetch 2", "fold 2"))
    assert len(kept) == len(found.events) - 1
    info(gm).schedule = replace(found, events=kept)
    return gm


def coded(*resident: str) -> fx.GraphModule:
    """Return a graph whose matrices are stored in bfloat16."""
    gm = outlined()
    info(gm).params = with_format(info(gm).params, torch.bfloat16)
    return offloaded(gm, *resident)


@breaks("slots", "expected: a release of its slot", "found:    none")
def decoded_memory_that_is_not_released() -> fx.GraphModule:
    gm = coded("wte", "layers.0.w", "layers.1.w")
    gm.graph.erase_node(calls(gm, RELEASE)[0])
    return gm


@breaks("codecs", "layers.1.w decoded", "what is stored of it", "decode the weight first")
def a_use_of_what_is_stored() -> fx.GraphModule:
    gm = coded()
    decode = next(n for n in calls(gm, DECODE) if meta(n).name == "layers.1.w")
    (stage,) = (n for n in gm.graph.nodes if n.op == "call_module" and meta(n).stage == 3)
    stage.replace_input_with(decode, decode.args[0])
    return gm


@breaks("codecs", "terms of trainable weights", "layers.0.w is frozen")
def terms_of_a_frozen_weight() -> fx.GraphModule:
    gm = coded()
    freeze(gm, "layers.0.w")
    return gm


@breaks("codecs", "one fold of wte a step", "a second one", "where a weight is first visited")
def a_second_decoding_with_terms() -> fx.GraphModule:
    gm = coded()
    first, second = (n for n in calls(gm, DECODE) if meta(n).name == "wte")
    second.args = (*second.args, *first.args[4:])
    return gm


@breaks("codecs", "a new stored value of layers.1.w", "encode the weight and write it back")
def an_update_that_is_not_stored() -> fx.GraphModule:
    gm = coded()
    (written,) = (n for n in calls(gm, WRITEBACK) if "layers.1.w" in map(weight, n.args[0]))
    encode = next(n for n in calls(gm, ENCODE) if meta(n).name == "layers.1.w")
    written.args = ([encode.args[0] if n is encode else n for n in written.args[0]],)
    gm.graph.erase_node(encode)
    return gm


@breaks("folds", "a fold of layers.1.w", "found:    none")
def an_update_that_is_not_decoded() -> fx.GraphModule:
    gm = coded()
    decode = next(n for n in calls(gm, DECODE) if meta(n).name == "layers.1.w")
    decode.args = decode.args[:4]
    return gm


def weight(node: fx.Node) -> str:
    return str(meta(node).name)


@pytest.mark.parametrize(("rule", "make", "messages"), BREAKS, ids=[b[1].__name__ for b in BREAKS])
def test_a_broken_rule_is_told(rule: str, make: Make, messages: tuple[str, ...]) -> None:
    gm = make()
    gm.recompile()
    alone = Verifier([r for r in RULES if r.name == rule])  # others may be broken as well
    with pytest.raises(VerifyError, match=f"breaks the rule '{rule}'") as caught:
        alone.check(gm, after="test")
    with pytest.raises(VerifyError):
        Verifier().check(gm, after="test")
    for message in messages:
        assert message in str(caught.value)


def test_every_rule_is_broken() -> None:
    public = {
        name
        for name, f in vars(rules_transfers).items()
        if inspect.isgeneratorfunction(f) and f.__module__ == rules_transfers.__name__
    }
    assert {rule for rule, _, _ in BREAKS} == public


@pytest.mark.parametrize("resident", [(), ("wte",), ("layers.0.w", "layers.1.bias")])
def test_sound_graphs_pass(resident: tuple[str, ...]) -> None:
    Verifier().check(streamed(*resident), after="offload")
    gm = two_blocks()
    freeze(gm, "layers.0.w")
    Verifier().check(offloaded(ready_for("offload", gm), *resident), after="offload")
    if not resident:
        for slots in (2, 3, 5):
            Verifier().check(scheduled(slots * 4096), after="schedule")


def test_rows_of_transfers_are_tensors() -> None:
    gm = streamed()
    for node in calls(gm, FETCH):
        assert [v.shape for v in node.meta["val"]] == [n.meta["val"].shape for n in node.args[0]]
    for node in calls(gm, RELEASE):
        assert (node.meta["val"].dtype, tuple(node.meta["val"].shape)) == (torch.uint8, (0,))
