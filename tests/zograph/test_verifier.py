"""Every rule meets a graph that breaks it, and its message."""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from tests.passes.graphs import ready_for, two_blocks
from zograph import ir, printer
from zograph.errors import VerifyError, first_line
from zograph.ir import KEY, Kind, annotate, info, meta
from zograph.rules import RULES
from zograph.testing import GraphBuilder
from zograph.verifier import Fault, Rule, Scope, Verifier

aten, zo = torch.ops.aten, torch.ops.zograph

BREAKS: list[tuple[str, Callable[[], fx.GraphModule], str]] = []
Make = Callable[[], fx.GraphModule]


def breaks(rule: str, message: str) -> Callable[[Make], Make]:
    """Register a function that makes a graph breaking `rule`."""

    def register(make: Make) -> Make:
        BREAKS.append((rule, make, message))
        return make

    return register


def find(gm: fx.GraphModule, target: object, index: int = 0) -> fx.Node:
    """Return the call of an operator, by its place among them."""
    return [n for n in gm.graph.nodes if n.target is target][index]


def dual(until: str = "materialize") -> fx.GraphModule:
    """Build the graph as it stands before a pass."""
    return ready_for(until, two_blocks())


@breaks("lint", "used before it has been defined")
def use_before_definition() -> fx.GraphModule:
    gm = two_blocks()
    first, second = find(gm, aten.linear.default), find(gm, aten.linear.default, 1)
    second.append(first)
    return gm


@breaks("output", "expected: a tuple, the loss first")
def bare_output() -> fx.GraphModule:
    gm = two_blocks()
    ir.output(gm).args = (ir.output(gm).args[0][0],)  # type: ignore[index]
    return gm


@breaks("output", "found:    nodes behind the output")
def node_behind_output() -> fx.GraphModule:
    gm = two_blocks()
    with gm.graph.inserting_after(ir.output(gm)):
        x = find(gm, aten.relu.default)
        ir.call(gm.graph, aten.relu.default, (x,), source="test")
    return gm


@breaks("metadata", 'a fake value in node.meta["val"]')
def no_value() -> fx.GraphModule:
    gm = two_blocks()
    del find(gm, aten.linear.default).meta["val"]
    return gm


@breaks("metadata", "a NodeMeta")
def no_record() -> fx.GraphModule:
    gm = two_blocks()
    del find(gm, aten.linear.default).meta[KEY]
    return gm


@breaks("metadata", "the name it binds")
def nameless_placeholder() -> fx.GraphModule:
    gm = two_blocks()
    annotate(next(iter(gm.graph.nodes)), name=None)
    return gm


@breaks("metadata", "found:    ids twice")
def one_input_twice() -> fx.GraphModule:
    gm = two_blocks()
    annotate(ir.placeholders(gm, Kind.INPUT)[1], name="ids")
    return gm


@breaks("arity", "found:    3 positional arguments")
def too_many_arguments() -> fx.GraphModule:
    gm = two_blocks()
    node = find(gm, aten.mean.default)
    node.args = (*node.args, 0, 1)
    return gm


@breaks("arity", "found:    an unknown argument inplace")
def unknown_argument() -> fx.GraphModule:
    gm = two_blocks()
    find(gm, aten.relu.default).kwargs = {"inplace": False}
    return gm


@breaks("arity", "found:    weight given twice")
def argument_twice() -> fx.GraphModule:
    gm = two_blocks()
    node = find(gm, aten.linear.default)
    node.kwargs = {"weight": node.args[1]}
    return gm


@breaks("arity", "found:    no argument weight")
def argument_missing() -> fx.GraphModule:
    gm = two_blocks()
    node = find(gm, aten.linear.default)
    node.args = node.args[:1]
    return gm


@breaks("functional", "aten.relu_ writes in place")
def write_in_place() -> fx.GraphModule:
    gm = two_blocks()
    find(gm, aten.relu.default).target = aten.relu_.default
    return gm


@breaks("functional", "a method call")
def method_call() -> fx.GraphModule:
    gm = two_blocks()
    relu = find(gm, aten.relu.default)
    with gm.graph.inserting_after(relu):
        new = gm.graph.call_method("relu", (relu.args[0],))
    new.meta = dict(relu.meta)
    relu.replace_all_uses_with(new)
    gm.graph.erase_node(relu)
    return gm


@breaks("random", "aten.rand_like draws from a generator")
def random_operator() -> fx.GraphModule:
    gm = two_blocks()
    find(gm, aten.relu.default).target = aten.rand_like.default
    return gm


@breaks("dead", "found:    no user")
def dead_call() -> fx.GraphModule:
    gm = two_blocks()
    relu = find(gm, aten.relu.default)
    with gm.graph.inserting_after(relu):
        ir.call(gm.graph, aten.abs.default, (relu,), source="test")
    return gm


@breaks("values", r"f32\[3, 1\]\n  found:    f16\[3, 1\] \(another dtype\)")
def stale_dtype() -> fx.GraphModule:
    gm = two_blocks()
    relu = find(gm, aten.relu.default)
    relu.meta["val"] = relu.meta["val"].to(torch.float16)
    return gm


@breaks("values", r"f32\[3, 4\]\n  found:    f32\[3, 7\] \(another shape\)")
def stale_shape() -> fx.GraphModule:
    gm = two_blocks()
    linear, head = find(gm, aten.linear.default), find(gm, aten.linear.default, 2)
    linear.meta["val"] = head.meta["val"]
    return gm


@breaks("values", r"of stride \(4, 1\)\n  found: .* of stride \(1, 3\) \(another stride\)")
def stale_stride() -> fx.GraphModule:
    gm = two_blocks()
    linear = find(gm, aten.linear.default)
    linear.meta["val"] = linear.meta["val"].t().clone().t()
    linear.meta["val"] = linear.meta["val"].new_empty((4, 3)).t()
    return gm


@breaks("values", r"int\(s0\)\n  found:    int\(s1\) \(another value\)")
def stale_size() -> fx.GraphModule:
    b = GraphBuilder()
    x = b.input("x", ("batch", "time"))
    size, other = b.call(aten.sym_size.int, x, 0), b.call(aten.sym_size.int, x, 1)
    gm = b.build(b.call(aten.sum.default, b.call(aten.new_zeros.default, x, [size, other])))
    size.meta["val"] = other.meta["val"]
    return gm


@breaks("values", "a call that its arguments allow")
def impossible_call() -> fx.GraphModule:
    gm = two_blocks()
    node = find(gm, aten.linear.default)
    node.args = (node.args[0], node.args[0], node.args[2])
    return gm


@breaks("dtypes", "expected: operands of one dtype\n  found:    bfloat16 and float32")
def mixed_dtypes() -> fx.GraphModule:
    b = GraphBuilder()
    x, w = b.input("x", (2, 3)), b.param("w", (4, 3), dtype=torch.bfloat16)
    return b.build(b.call(aten.sum.default, b.call(aten.linear.default, x, w)))


@breaks("stage calls", "expected: 11 arguments")
def body_arguments_missing() -> fx.GraphModule:
    gm = dual("lower")
    node = [n for n in gm.graph.nodes if n.op == "call_module"][2]
    node.args = node.args[:-1]
    return gm


@breaks("stage calls", r"argument 0 of type f32\[4, 4\]\n  found:    f32\[7, 4\]")
def body_arguments_wrong() -> fx.GraphModule:
    gm = dual("lower")
    node = [n for n in gm.graph.nodes if n.op == "call_module"][2]
    node.args = (ir.placeholders(gm)[0], *node.args[1:])
    return gm


@breaks("stage calls", r"results .*\n  found: .*another structure")
def body_results_wrong() -> fx.GraphModule:
    gm = dual("lower")
    node = [n for n in gm.graph.nodes if n.op == "call_module"][2]
    node.meta["val"] = node.meta["val"][:1]
    return gm


@breaks("branches", r"a node of branch - that uses its own branch\n  found:    a use of branch \+")
def branches_mixed() -> fx.GraphModule:
    gm = dual()
    plus, minus = find(gm, aten.mul.Tensor, 0), find(gm, aten.mul.Tensor, 1)
    assert (meta(plus).branch, meta(minus).branch) == ("+", "-")
    minus.args = (find(gm, aten.linear.default, 0), minus.args[1])
    return gm


@breaks("branches", r"a node of no branch .*\n  found:    a use of branch \+ and -")
def branches_joined() -> fx.GraphModule:
    gm = dual()
    out = ir.output(gm)
    plus, minus = out.args[0]  # type: ignore[misc]
    with gm.graph.inserting_before(out):
        both = ir.call(gm.graph, aten.add.Tensor, (plus, minus), source="test")
    out.args = ((both, minus),)
    return gm


@breaks("branches", r"found:    a use of branch \+")
def branch_lost_on_the_way() -> fx.GraphModule:
    gm = branches_mixed()
    linear = find(gm, aten.mul.Tensor, 1).args[0]
    assert isinstance(linear, fx.Node)
    annotate(linear, branch=None)  # its weight is of branch + all the same
    return gm


@breaks("paired noise", "1 on branch . and 2 on branch .|2 on branch . and 0|1 on branch . and 0")
def other_slot() -> fx.GraphModule:
    gm = dual()
    node = find(gm, zo.materialize_one.default)
    slot = [a.name for a in node.target._schema.arguments].index("slot")  # type: ignore[union-attr]
    node.args = (*node.args[:slot], 1, *node.args[slot + 1 :])
    return gm


@breaks("paired noise", r"the sign of branch \+\n  found:    sign -1")
def other_sign() -> fx.GraphModule:
    gm = dual()
    node = find(gm, zo.materialize_one.default)
    node.args = (*node.args[:-1], -1)
    return gm


@breaks("paired noise", "both halves of the noise of %wte")
def half_used() -> fx.GraphModule:
    gm = dual("outline")
    pair = find(gm, zo.materialize_rows.default)
    minus = next(u for u in pair.users if u.args[1] == 1)
    minus.args = (pair, 0)
    return gm


@breaks("hoisted", "the trainable parameter wte")
def hoisted_weight() -> fx.GraphModule:
    gm = two_blocks()
    annotate(find(gm, aten.embedding.default), hoisted=True)
    return gm


@breaks("hoisted", "the trainable parameter wte")
def hoisted_result_of_a_stage() -> fx.GraphModule:
    gm = dual("lower")
    annotate(find(gm, operator.getitem, 2), hoisted=True)
    return gm


@breaks("hoisted", "found:    branch +")
def hoisted_branch() -> fx.GraphModule:
    gm = two_blocks()
    annotate(find(gm, aten.relu.default), hoisted=True, branch="+")
    return gm


@breaks("stages", "found:    a use of %linear of stage 9")
def later_stage() -> fx.GraphModule:
    gm = two_blocks()
    annotate(find(gm, aten.linear.default), stage=9)
    annotate(find(gm, aten.mul.Tensor), stage=2)
    return gm


@breaks("stages", "a stage of GraphInfo.stages")
def nameless_stage() -> fx.GraphModule:
    gm = two_blocks()
    info(gm).stages = {1: "model"}
    annotate(find(gm, aten.linear.default), stage=2)
    return gm


@breaks("facts", "a known parameter")
def unknown_parameter() -> fx.GraphModule:
    gm = two_blocks()
    del info(gm).params["wte"]
    return gm


@breaks("facts", "as in GraphInfo.params")
def parameter_of_another_shape() -> fx.GraphModule:
    gm = two_blocks()
    info(gm).params["wte"] = replace(info(gm).params["wte"], shape=(8, 4))
    return gm


@breaks("facts", "one key for each of")
def keys_of_another_length() -> fx.GraphModule:
    gm = dual()
    info(gm).keys[1] = ("wte", "other")
    return gm


@breaks("facts", r"two losses, of branch \+ and -")
def one_loss_twice() -> fx.GraphModule:
    gm = dual()
    minus = ir.output(gm).args[0][1]  # type: ignore[index]
    ir.output(gm).args = ((minus, minus),)
    gm.graph.eliminate_dead_code()
    return gm


@breaks("facts", r"the output that GraphInfo.out_leaves names \(index 2\)")
def output_dropped() -> fx.GraphModule:
    gm = two_blocks()
    info(gm).out_leaves = (1, 2)
    return gm


@breaks("facts", "stage calls and size arithmetic only")
def op_outside_stages() -> fx.GraphModule:
    gm = two_blocks()
    info(gm).facts |= {"outlined"}
    return gm


@pytest.mark.parametrize(("rule", "make", "message"), BREAKS, ids=[b[1].__name__ for b in BREAKS])
def test_broken_graph(rule: str, make: Make, message: str) -> None:
    skip = [r.name for r in RULES if r.name != rule]
    with pytest.raises(VerifyError) as caught:
        Verifier().check(make(), after="my_pass", skip=skip)
    text = str(caught.value)
    assert text.startswith(f"after my_pass: the graph breaks the rule '{rule}'")
    assert message in text or re.search(message, text)
    assert re.search(r"  expected: .+\n  found:    .+\n  to do:    .+", text)
    # The whole table finds a fault too, whichever rule is first to see it.
    with pytest.raises(VerifyError):
        Verifier().check(make(), after="my_pass")


def test_every_rule_is_broken_here() -> None:
    elsewhere = {"slots", "folds", "codecs", "schedule"}  # test_rules_transfers.py breaks these
    elsewhere |= {"cells"}  # tests/passes/test_anderson.py
    assert {b[0] for b in BREAKS} | elsewhere == {r.name for r in RULES}


def test_the_message_holds_the_graph() -> None:
    with pytest.raises(VerifyError) as caught:
        Verifier().check(stale_dtype(), after="my_pass")
    assert str(caught.value).splitlines() == [
        "after my_pass: the graph breaks the rule 'values' at %relu",
        "  expected: f32[3, 1]",
        "  found:    f16[3, 1] (another dtype)",
        "  to do:    recompute it: node.meta['val'] = ir.evaluate(node.target, node.args, "
        "node.kwargs)",
        "  made by:  builder",
        "  graph around it:",
        "    %ids: i64[3] = input",
        "    %scale: f32[3, 1] = input",
        "    %embedding: f32[3, 4] = aten.embedding(%wte, %ids)",
        "--> %relu: f16[3, 1] = aten.relu(%scale)",
        "    %linear: f32[3, 4] = aten.linear(%embedding, %layers.0.w, %layers.0.bias)",
        "    %mul: f32[3, 4] = aten.mul.Tensor(%linear, %relu)",
        "    %linear_1: f32[3, 4] = aten.linear(%mul, %layers.1.w, %layers.1.bias)",
    ]


@pytest.mark.parametrize(
    "until", ["partition", "hoist", "dual_perturbation", "materialize", "outline", "lower"]
)
def test_good_graphs_pass(until: str) -> None:
    Verifier().check(ready_for(until, two_blocks()), after=until)


def test_a_broken_body_is_seen_once_reached() -> None:
    gm = dual("lower")
    body = list(printer.bodies(gm))[2]
    annotate(find(body, aten.linear.default), hoisted=True)
    with pytest.raises(VerifyError, match=r"the rule 'hoisted' at %linear in a stage body"):
        Verifier().check(gm, after="outline")


def test_inactive_randomness_is_allowed() -> None:
    b = GraphBuilder()
    q = b.input("q", (1, 2, 3, 4))
    y = b.call(aten.scaled_dot_product_attention.default, q, q, q)
    y = b.call(aten.dropout.default, y, 0.1, False)
    Verifier().check(b.build(b.call(aten.sum.default, y)), after="capture")
    b = GraphBuilder()
    q = b.input("q", (1, 2, 3, 4))
    y = b.call(aten.scaled_dot_product_attention.default, q, q, q, None, 0.1)
    with pytest.raises(VerifyError, match="draws from a generator"):
        Verifier().check(b.build(b.call(aten.sum.default, y)), after="capture")


def test_unbacked_sizes_are_not_compared() -> None:
    b = GraphBuilder()
    mask = b.input("mask", ("batch",), torch.bool)
    where = b.call(aten.nonzero.default, mask)
    size = b.call(aten.sym_size.int, where, 0)
    out = b.call(aten.add.Tensor, b.call(aten.sum.default, where), size)
    gm = b.build(out)
    Verifier().check(gm, after="capture")
    env = where.meta["val"].fake_mode.shape_env
    before = list(env.guards)
    Verifier().check(gm, after="capture")
    assert list(env.guards) == before


def test_checking_records_no_guard() -> None:
    b = GraphBuilder()
    x = b.input("x", ("batch", "time"))
    gm = b.build(b.call(aten.sum.default, b.call(aten.add.Tensor, x, x)))
    env = x.meta["val"].fake_mode.shape_env
    before = len(env.guards)
    y = b.input("y", ("other", "time"))
    y.graph.erase_node(y)
    Verifier().check(gm, after="capture")
    assert len(env.guards) == before


def test_incremental() -> None:
    gm = two_blocks()
    verifier = Verifier()
    verifier.check(gm, after="a")
    first = verifier.replay.replayed
    assert first < len(printer.summary(gm)) + 3, "equal blocks are replayed once"
    verifier.check(gm, after="b")
    assert verifier.replay.replayed == first
    relu = find(gm, aten.relu.default)
    relu.target = aten.sigmoid.default
    verifier.check(gm, after="c")
    assert verifier.replay.replayed == first + 1
    relu.meta["val"] = relu.meta["val"].double()
    with pytest.raises(VerifyError, match="another dtype"):
        verifier.check(gm, after="d")


def test_own_rules() -> None:
    def no_relu(scope: Scope):  # type: ignore[no-untyped-def]
        for node in scope.calls:
            if node.target is aten.relu.default:
                yield Fault(node, "no relu", "relu", "use gelu")

    verifier = Verifier((*RULES, Rule("no relu", no_relu)))
    with pytest.raises(VerifyError, match="the rule 'no relu' at %relu"):
        verifier.check(two_blocks(), after="mine")
    verifier.check(two_blocks(), after="mine", skip={"no relu"})


def test_cost() -> None:
    b = GraphBuilder()
    x, w = b.input("x", ("batch", 8)), b.param("w", (8, 8))
    for _ in range(500):
        x = b.call(aten.relu.default, b.call(aten.linear.default, x, w))
    gm = b.build(b.call(aten.sum.default, x))
    verifier = Verifier()
    verifier.check(gm, after="first")
    assert verifier.replay.replayed <= 3
    start = time.process_time()
    verifier.check(gm, after="second")
    assert time.process_time() - start < 0.5, "1000 known nodes cost tens of milliseconds"


def test_operators_that_are_plain_functions() -> None:
    b = GraphBuilder()
    x = b.input("x", ("batch", 3))
    n = b.call(aten.sym_size.int, x, 0)
    twice = b.call(operator.mul, n, 2)
    y = b.call(aten.new_zeros.default, x, [twice, 3])
    Verifier().check(b.build(b.call(aten.sum.default, y)), after="capture")


@pytest.mark.parametrize(("said", "line"), [("\n a\nb", "a"), ("a", "a"), ("", ""), (" \n", "")])
def test_the_first_line_of_an_error_may_be_empty(said: str, line: str) -> None:
    assert first_line(ValueError(said)) == line
