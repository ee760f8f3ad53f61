"""The rules on a graph's form: whole, typed, functional, nothing dead, values that agree."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from zograph import ir, printer
from zograph.errors import first_line
from zograph.fake_replay import difference
from zograph.randomness import is_random
from zograph.rules_cells import cells
from zograph.rules_step import branches, facts, hoisted, paired, stages
from zograph.rules_transfers import codecs, folds, schedule, slots
from zograph.verifier import Fault, Rule, Scope

aten = torch.ops.aten

PRODUCTS: dict[Any, int] = {
    aten.addmm.default: 3,
    aten.baddbmm.default: 3,
    aten.bmm.default: 2,
    aten.conv1d.default: 3,
    aten.conv2d.default: 3,
    aten.conv3d.default: 3,
    aten.convolution.default: 3,
    aten.linear.default: 3,
    aten.matmul.default: 2,
    aten.mm.default: 2,
    aten.scaled_dot_product_attention.default: 3,
}
"""Operators whose first arguments, this many, must have one dtype."""


def lint(scope: Scope) -> Iterator[Fault]:
    """Nodes belong to the graph, stand in order, have names of their own and real targets."""
    try:
        scope.gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        message = first_line(error)
        node = next((n for n in scope.nodes if f"'{n.name}'" in message), None)
        yield Fault(node, "a graph that torch.fx accepts", message, "insert a node before its uses")


def output(scope: Scope) -> Iterator[Fault]:
    """There is one output, the last node, and it returns a tuple of nodes."""
    outputs = [n for n in scope.nodes if n.op == "output"]
    if len(outputs) != 1 or scope.nodes[-1] is not outputs[0]:
        found = f"{len(outputs)} outputs" if len(outputs) != 1 else "nodes behind the output"
        yield Fault(None, "one output node, the last", found, "return all results in one tuple")
    elif not isinstance(outputs[0].args[0], (tuple, list)):
        advice = "set output.args = ((loss, ...),)"
        yield Fault(outputs[0], "a tuple, the loss first", "a single value", advice)


def metadata(scope: Scope) -> Iterator[Fault]:
    """Every node has a value and a record; placeholders say what they bind."""
    advice = "make nodes with zograph.ir.call, or copy node.meta"
    bound: set[tuple[ir.Kind, str | None]] = set()
    for node in scope.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta and node.op != "get_attr":
            yield Fault(node, 'a fake value in node.meta["val"]', "none", advice)
        record = node.meta.get(ir.KEY)
        if not isinstance(record, ir.NodeMeta):
            if node.op != "get_attr":
                yield Fault(node, 'a NodeMeta in node.meta["zograph"]', repr(record), advice)
        elif node.op == "placeholder" and scope.top:
            binds = (record.kind, record.name)
            if record.name is None or record.kind in (ir.Kind.OP, ir.Kind.STAGE, ir.Kind.OUTPUT):
                found = f"kind {record.kind}, name {record.name}"
                advice = "make placeholders with zograph.ir.placeholder"
                yield Fault(node, "a placeholder's kind and the name it binds", found, advice)
            elif binds in bound:
                yield Fault(node, "one placeholder per name", f"{record.name} twice", "share it")
            elif record.kind in (ir.Kind.INPUT, ir.Kind.NOISE):  # tied weights may come twice
                bound.add(binds)


def arity(scope: Scope) -> Iterator[Fault]:
    """Calls of operators have the arguments that their schemas name."""
    for node in scope.calls:
        if not isinstance(node.target, OpOverload):
            continue
        positional, names, required = _schema(node.target)
        given = set(names[: len(node.args)]) | set(node.kwargs)
        if len(node.args) > positional:
            found = f"{len(node.args)} positional arguments"
        elif unknown := sorted(set(node.kwargs) - set(names)):
            found = f"an unknown argument {unknown[0]}"
        elif twice := sorted(set(names[: len(node.args)]) & set(node.kwargs)):
            found = f"{twice[0]} given twice"
        elif missing := [n for n in required if n not in given]:
            found = f"no argument {missing[0]}"
        else:
            continue
        yield Fault(node, str(node.target._schema), found, "pass what the schema names")


def functional(scope: Scope) -> Iterator[Fault]:
    """No operator writes to its arguments, so no write can move across a read."""
    for node in scope.nodes:
        if node.op == "call_method":
            yield Fault(node, "calls of operators", "a method call", "call the ATen operator")
    for node in scope.calls:
        if isinstance(node.target, OpOverload) and _is_mutable(node.target):
            advice = "use the functional form of the operator; writes belong to the runtime"
            yield Fault(node, "a functional graph", f"{ir.op_name(node)} writes in place", advice)


def random(scope: Scope) -> Iterator[Fault]:
    """No operator draws from a generator: equal calls would be merged, order would matter."""
    for node in scope.calls:
        if is_random(node):
            advice = "use a zograph:: noise operator, which is a pure function of its seed"
            found = f"{ir.op_name(node)} draws from a generator"
            yield Fault(node, "no bare random operator", found, advice)


def dead(scope: Scope) -> Iterator[Fault]:
    """Every call without effects is used."""
    for node in scope.nodes:
        if node.op == "placeholder" or node.op == "output" or node.users:
            continue
        if not node.is_impure(impure_random=False):
            advice = "call gm.graph.eliminate_dead_code() at the end of the pass"
            yield Fault(node, "a use of every value", "no user", advice)


def values(scope: Scope) -> Iterator[Fault]:
    """Every value is what a fake replay of the call gives."""
    for node in scope.calls:
        if isinstance(node.target, HigherOrderOperator) or scope.replay.known(node):
            continue
        try:
            expected = scope.replay.result(node)
        except Exception as error:  # noqa: BLE001  (an operator may raise anything; it is shown)
            message = f"{type(error).__name__}: {first_line(error)}"
            yield Fault(node, "a call that its arguments allow", message, "mend the arguments")
            continue
        found = node.meta["val"]
        if (what := difference(expected, found)) is not None:
            texts = [scope.type(expected), scope.type(found)]
            if what in ("stride", "device"):
                values = zip(texts, (expected, found), strict=True)
                texts = [f"{t} of {what} {_detail(v, what)}" for t, v in values]
            advice = (
                "recompute it: node.meta['val'] = ir.evaluate(node.target, node.args, node.kwargs)"
            )
            yield Fault(node, texts[0], f"{texts[1]} (another {what})", advice)
        scope.replay.remember(node)


def dtypes(scope: Scope) -> Iterator[Fault]:
    """Products have operands of one dtype: real kernels demand it, fake ones do not."""
    for node in scope.calls:
        operands = node.args[: PRODUCTS.get(node.target, 0)]
        found = {n.meta["val"].dtype for n in operands if isinstance(n, fx.Node)}
        if len(found) > 1:
            text = " and ".join(sorted(str(d).removeprefix("torch.") for d in found))
            advice = (
                "cast one of them; with compute_dtype, pass floating inputs of the batch in that "
                "dtype or cast them in forward"
            )
            yield Fault(node, "operands of one dtype", text, advice)


def calls_of_bodies(scope: Scope) -> Iterator[Fault]:
    """Stage calls pass what the body's placeholders expect and carry what it returns."""
    for node in scope.nodes:
        body = printer.body_of(scope.gm, node)
        if body is None or scope.replay.known(node):
            continue
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        if len(inputs) != len(node.args) or node.kwargs:
            found = f"{len(node.args)} arguments, {len(node.kwargs)} of them by keyword"
            advice = "pass one positional argument per placeholder of the body"
            yield Fault(node, f"{len(inputs)} arguments", found, advice)
            continue
        want = [n.meta["val"] for n in inputs]
        result = ir.value(ir.output(body).args[0])
        advice = "share a body between stages of equal structure only"
        for i, (expected, found) in enumerate(zip(want, ir.value(node.args), strict=True)):
            if (what := difference(expected, found)) is not None:
                texts = scope.type(expected), scope.type(found)
                where = f"argument {i} of type"
                yield Fault(node, f"{where} {texts[0]}", f"{texts[1]} (another {what})", advice)
        if (what := difference(tuple(result), node.meta["val"])) is not None:
            texts = scope.type(tuple(result)), scope.type(node.meta["val"])
            yield Fault(node, f"results {texts[0]}", f"{texts[1]} (another {what})", advice)
        scope.replay.remember(node)


@cache
def _schema(target: OpOverload) -> tuple[int, list[str], list[str]]:
    """How many arguments may be positional, all names in order, names without default."""
    arguments = target._schema.arguments
    positional = sum(not a.kwarg_only for a in arguments)
    required = [a.name for a in arguments if not a.has_default_value()]
    return positional, [a.name for a in arguments], required


@cache
def _is_mutable(target: OpOverload) -> bool:
    return bool(target._schema.is_mutable)


@cache
def _draws(target: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in target.tags


def _detail(val: Any, what: str) -> object:
    if not isinstance(val, torch.Tensor):
        return "?"
    return tuple(val.stride()) if what == "stride" else val.device


RULES: tuple[Rule, ...] = (
    Rule("lint", lint),
    Rule("output", output),
    Rule("metadata", metadata),
    Rule("arity", arity),
    Rule("functional", functional),
    Rule("random", random),
    Rule("dead", dead),
    Rule("cells", cells),
    Rule("values", values),
    Rule("dtypes", dtypes),
    Rule("stage calls", calls_of_bodies),
    Rule("branches", branches),
    Rule("paired noise", paired),
    Rule("hoisted", hoisted),
    Rule("stages", stages, top_only=True),
    Rule("facts", facts, top_only=True),
    Rule("slots", slots, top_only=True),
    Rule("folds", folds, top_only=True),
    Rule("codecs", codecs, top_only=True),
    Rule("schedule", schedule, top_only=True),
)
"""The default table of :class:`zograph.verifier.Verifier`."""
