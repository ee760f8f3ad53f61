"""The verifier: a table of small rules that a graph must keep after every pass.

A rule is a generator of :class:`Fault`. :data:`zograph.rules.RULES` is the default table; a
later stage of the compiler adds rules by passing a longer one to :class:`Verifier`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from zograph import ir, printer
from zograph.errors import VerifyError
from zograph.fake_replay import Replay


@dataclass(frozen=True)
class Fault:
    """One broken rule: where, what should be there, what is, and what to do."""

    node: fx.Node | None
    expected: str
    found: str
    advice: str


@dataclass
class Scope:
    """What a rule sees: one graph, either the main one or a stage body.

    Attributes
    ----------
    gm
        The graph to check.
    info
        The record of the main graph.
    top
        Whether this is the main graph.
    replay
        The record of replayed nodes, shared by all checks of one verifier.
    """

    gm: fx.GraphModule
    info: ir.GraphInfo
    top: bool
    replay: Replay

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The graph's nodes in order."""
        return list(self.gm.graph.nodes)

    @cached_property
    def metas(self) -> dict[fx.Node, ir.NodeMeta]:
        """Each node's metadata."""
        return {n: ir.meta(n) for n in self.nodes}

    @cached_property
    def calls(self) -> list[fx.Node]:
        """The nodes that call a function."""
        return [n for n in self.nodes if n.op == "call_function"]

    @cached_property
    def _names(self) -> printer.Printer:
        """The names and symbols of this graph's canonical text."""
        names = printer.Printer(self.gm)
        for _ in names.lines(self.gm):
            pass
        return names

    def name(self, node: fx.Node) -> str:
        """The node's canonical name, for messages."""
        return self._names.name(node)

    def type(self, val: object) -> str:
        """The text of a fake value's type, for messages."""
        return self._names.type(val)


Check = Callable[[Scope], Iterator[Fault]]


@dataclass(frozen=True)
class Rule:
    """A named check. `top_only` rules do not look into stage bodies."""

    name: str
    check: Check
    top_only: bool = False


class Verifier:
    """Checks graphs against a table of rules, incrementally.

    One verifier serves one compilation: nodes that stay as they were are not replayed
    again, and a stage body is checked once however many stages share it.

    Parameters
    ----------
    rules
        The rules, in order of checking; the first fault is raised.

    Examples
    --------
    >>> import torch
    >>> from zograph.testing import GraphBuilder
    >>> b = GraphBuilder()
    >>> gm = b.build(b.call(torch.ops.aten.sum.default, b.input("x", (2,))))
    >>> Verifier().check(gm, after="capture")
    """

    def __init__(self, rules: Sequence[Rule] | None = None) -> None:
        from zograph.rules import RULES  # the rules need Fault and Scope of this module

        self.rules = RULES if rules is None else tuple(rules)
        self.replay = Replay()

    def check(self, gm: fx.GraphModule, *, after: str, skip: Collection[str] = ()) -> None:
        """Check a graph, and the stage bodies and cells in it.

        Parameters
        ----------
        gm
            The graph; it is not changed.
        after
            Name of the pass that made it, for the message.
        skip
            Names of rules that do not hold yet (of a graph just captured, for example).

        Raises
        ------
        VerifyError
            With the pass, the rule, the node, what was expected and found, what to do, and
            the graph around the node.
        """
        record = ir.info(gm)
        for module in printer.graphs(gm):
            scope = Scope(module, record, module is gm, self.replay)
            for rule in self.rules:
                if rule.name in skip or (rule.top_only and not scope.top):
                    continue
                for fault in rule.check(scope):
                    raise VerifyError(explain(scope, rule.name, after, fault))


def explain(scope: Scope, rule: str, after: str, fault: Fault) -> str:
    """Return the message of a fault: pass, rule, node, expected, found, advice, graph."""
    place = "" if scope.top else " in a stage body or cell"
    where = "" if fault.node is None else f" at {scope.name(fault.node)}"
    lines = [
        f"after {after}: the graph breaks the rule '{rule}'{where}{place}",
        f"  expected: {fault.expected}",
        f"  found:    {fault.found}",
        f"  to do:    {fault.advice}",
    ]
    if fault.node is not None:
        if source := ir.meta(fault.node).source:
            lines.append(f"  made by:  {source}")
        lines += ["  graph around it:", printer.around(scope.gm, fault.node)]
    return "\n".join(lines)
