"""Checks a graph after every pass; a broken rule names the pass, the node and the way out.

Rules are functions in :data:`RULES`. The replay on fake values is incremental: a node is
replayed again only if its operator, arguments or values changed since it was last verified.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils import _pytree as pytree

from zograph import printer
from zograph.errors import VerifyError
from zograph.ir import Kind, evaluate, fake_mode, info, meta, op_name
from zograph.randomness import is_random


class Verifier:
    """Verifies graphs, remembering which nodes it has replayed.

    Examples
    --------
    >>> from zograph.testing import GraphBuilder
    >>> b = GraphBuilder()
    >>> x = b.input("x", (2, 3))
    >>> Verifier().check(b.build(b.call(torch.ops.aten.sum.default, x)), after="hand")
    """

    def __init__(self) -> None:
        self._replayed: dict[fx.Node, tuple[Any, ...]] = {}

    def check(self, gm: fx.GraphModule, *, after: str) -> None:
        """Check every rule on the graph and, once each, on its stage bodies.

        Parameters
        ----------
        after
            Name of the pass that left the graph so; it stands in the message.

        Raises
        ------
        VerifyError
            At the first broken rule.
        """
        for graph in (gm, *printer.bodies(gm)):
            subject = Subject(graph, after, info(gm).facts)
            for rule in RULES:
                rule(subject)
            self._replay(subject)

    def _replay(self, subject: Subject) -> None:
        """Values agree with a replay on fake tensors."""
        env = fake_mode(subject.gm).shape_env
        with contextlib.nullcontext() if env is None else env.suppress_guards():
            self._replay_changed(subject)

    def _replay_changed(self, subject: Subject) -> None:
        for node in subject.calls():
            if node.op != "call_function" or any(s.op == "get_attr" for s in node.all_input_nodes):
                continue
            if not node.users:
                continue
            sources = tuple(id(s.meta["val"]) for s in node.all_input_nodes)
            state = (node.target, str(node.args), str(node.kwargs), id(node.meta["val"]), sources)
            if self._replayed.get(node) == state:
                continue
            found = node.meta["val"]
            if not getattr(node.target, "__module__", "").startswith("torch._higher_order_ops"):
                assert callable(node.target)
                expected = evaluate(node.target, node.args, node.kwargs)
                if not agree(expected, found):
                    subject.fail(
                        node,
                        f"value {show(expected)}",
                        f"{show(found)} in meta['val']",
                        "give new nodes their value with zograph.ir.call, and recompute the "
                        "values behind a node that changes shape or dtype",
                    )
            self._replayed[node] = state


class Subject:
    """A graph under a rule."""

    def __init__(self, gm: fx.GraphModule, after: str, facts: frozenset[str]) -> None:
        self.gm, self.after, self.facts = gm, after, facts

    def calls(self) -> Iterator[fx.Node]:
        """Yield what is neither a placeholder, an attribute nor the output."""
        for node in self.gm.graph.nodes:
            if node.op in ("call_function", "call_module"):
                yield node

    def fail(self, node: fx.Node, expected: str, found: str, hint: str) -> None:
        """Raise with the pass, node, expectation, finding, advice and the graph around."""
        raise VerifyError(
            f"after {self.after}: {op_name(node)} ({node.name}, from {meta(node).source or '?'})\n"
            f"  expected: {expected}\n  found: {found}\n  what to do: {hint}\n"
            f"{printer.around(self.gm, node)}"
        )


def agree(a: Any, b: Any) -> bool:
    """Whether two fake values have equal dtype, shape and strides for all sizes."""
    xs, ys = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(xs) == len(ys) and all(map(_leaf_agrees, xs, ys))


def _leaf_agrees(x: Any, y: Any) -> bool:
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        if isinstance(x, torch.SymInt) or isinstance(y, torch.SymInt):
            unbacked = isinstance(x, torch.SymInt) and free_unbacked_symbols(x)
            return bool(unbacked) or statically_known_true(x == y)
        return type(x) is type(y) and bool(x == y or x is y)
    if (x.dtype, x.device, x.ndim) != (y.dtype, y.device, y.ndim):
        return False
    if free_unbacked_symbols(x) or free_unbacked_symbols(y):
        return True
    sizes = zip((*x.shape, *x.stride()), (*y.shape, *y.stride()), strict=True)
    return all(
        m == n if type(m) is type(n) is int else statically_known_true(m == n) for m, n in sizes
    )


def show(val: Any) -> str:
    """Describe a fake value in a message."""
    if isinstance(val, torch.Tensor):
        dtype = str(val.dtype).removeprefix("torch.")
        return f"{dtype}{list(val.shape)} strides {list(val.stride())}"
    if isinstance(val, (tuple, list)):
        return f"({', '.join(map(show, val))})"
    return repr(val)


def lint(subject: Subject) -> None:
    """The graph is well-formed for torch.fx and returns one tuple."""
    try:
        subject.gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise VerifyError(
            f"after {subject.after}: torch.fx finds the graph malformed: {error}\n"
            f"  what to do: insert nodes before their users"
        ) from error
    outputs = [n for n in subject.gm.graph.nodes if n.op == "output"]
    if len(outputs) != 1 or not isinstance(outputs[0].args[0], tuple):
        raise VerifyError(
            f"after {subject.after}: expected one output that is a tuple, found "
            f"{[n.args[0] for n in outputs]}\n  what to do: keep the output node and its tuple"
        )


def has_values(subject: Subject) -> None:
    """Every node but attributes, the output and a capture's assertions has a value."""
    for node in subject.gm.graph.nodes:
        if node.op not in ("get_attr", "output") and node.users and "val" not in node.meta:
            hint = "make nodes with zograph.ir.call or zograph.ir.placeholder"
            subject.fail(node, "a fake value in meta['val']", "none", hint)


def nothing_dead(subject: Subject) -> None:
    """No call is unused (a fresh capture still holds assertions)."""
    for node in subject.calls():
        if not node.users and "normalized" in subject.facts:
            subject.fail(node, "a user", "none", "end the pass with eliminate_dead_code()")


def arity(subject: Subject) -> None:
    """Calls of operators fit the operator's schema."""
    for node in subject.calls():
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema.arguments
        known = {a.name for a in schema}
        required = [
            a.name
            for i, a in enumerate(schema)
            if i >= len(node.args) and not a.has_default_value() and a.name not in node.kwargs
        ]
        unknown = sorted(set(node.kwargs) - known)
        if len(node.args) > len(schema) or required or unknown:
            found = f"{len(node.args)} positional, {sorted(node.kwargs)} by name"
            subject.fail(node, str(node.target._schema), found, "pass what the schema asks for")


def functional(subject: Subject) -> None:
    """Nothing is written in place, so no order but that of the edges matters."""
    for node in subject.calls():
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            subject.fail(
                node,
                "a functional operator",
                f"{node.target}, which writes in place",
                "use the operator's functional form",
            )


def no_random(subject: Subject) -> None:
    """No bare random operator: merging equal nodes would merge draws."""
    if "normalized" in subject.facts:
        for node in subject.calls():
            if is_random(node):
                subject.fail(
                    node,
                    "no random draw",
                    op_name(node),
                    "draw through zograph::materialize, a function of seed and key",
                )


def branches_apart(subject: Subject) -> None:
    """No node of one branch uses a node of the other."""
    for node in subject.calls():
        branch = meta(node).branch
        for source in node.all_input_nodes:
            other = meta(source).branch
            if branch and other and other != branch:
                subject.fail(
                    node,
                    f"inputs of branch {branch} or shared",
                    f"{source.name} of branch {other}",
                    "map the arguments of a copy to the copies of its own branch",
                )


def branches_paired(subject: Subject) -> None:
    """What one branch perturbs by +z the other perturbs by -z, with the same key and seed."""
    if "dual" not in subject.facts:
        return
    signs: dict[tuple[Any, ...], dict[int, fx.Node]] = {}
    singles = (
        torch.ops.zograph.materialize_one.default,
        torch.ops.zograph.materialize_rows_one.default,
    )
    for node in subject.calls():
        if node.target in singles:
            *args, sign = node.args
            assert isinstance(sign, int)
            signs.setdefault((node.target, meta(node).stage, *args), {})[sign] = node
            if (sign == 1) != (meta(node).branch == "+"):
                subject.fail(
                    node,
                    "sign 1 in branch + and -1 in branch -",
                    f"sign {sign} in branch {meta(node).branch}",
                    "keep them together",
                )
    for found in signs.values():
        if len(found) != 2:
            (node,) = found.values()
            subject.fail(
                node,
                "the same call with the other sign",
                "none",
                "perturb a weight in both branches, from one base, key and seed",
            )


def hoisted_are_shared(subject: Subject) -> None:
    """A hoisted node uses hoisted nodes, inputs and frozen weights only."""
    params = info(subject.gm).params
    for node in subject.calls():
        if not meta(node).hoisted or meta(node).source == "outline":
            continue
        for source in node.all_input_nodes:
            record = meta(source)
            trainable = record.kind == Kind.PARAMETER and record.name in params
            if (trainable and params[str(record.name)].trainable) or (
                record.kind == Kind.OP and not record.hoisted
            ):
                subject.fail(
                    node,
                    "inputs that no trainable weight reaches",
                    source.name,
                    "clear `hoisted` on it, or hoist its inputs first",
                )


def stages_in_order(subject: Subject) -> None:
    """No node uses a value of a later stage."""
    for node in subject.calls():
        stage = meta(node).stage
        for source in node.all_input_nodes:
            other = meta(source).stage
            if stage is not None and other is not None and other > stage:
                subject.fail(
                    node,
                    f"inputs of stage {stage} or earlier",
                    f"{source.name} of stage {other}",
                    "tag the node with that stage",
                )


RULES: tuple[Callable[[Subject], None], ...] = (
    lint,
    has_values,
    nothing_dead,
    arity,
    functional,
    no_random,
    branches_apart,
    branches_paired,
    hoisted_are_shared,
    stages_in_order,
)
