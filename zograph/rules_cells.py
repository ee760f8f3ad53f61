"""The rule on fixed points: a solve and its cell fit each other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from zograph import ir, printer
from zograph.fake_replay import difference
from zograph.fixed_points.nodes import is_solve
from zograph.verifier import Fault, Scope


def cells(scope: Scope) -> Iterator[Fault]:
    """A solve passes what its cell's inputs expect, and the cell returns what it was given."""
    for node in scope.nodes:
        if not is_solve(node) or scope.replay.known(node):
            continue
        first, state, closed = node.args
        cell = printer.cell_of(scope.gm, first) if isinstance(first, fx.Node) else None
        if cell is None:
            advice = "pass the node that stands for the cell's graph (Kind.CELL)"
            yield Fault(node, "a cell as the first argument", str(first), advice)
            continue
        given = [*state, *closed]  # type: ignore[misc]
        inputs = [n for n in cell.graph.nodes if n.op == "placeholder"]
        if len(inputs) != len(given):
            advice = "pass one state or closed-over value per input of the cell"
            yield Fault(node, f"{len(inputs)} values for the cell", f"{len(given)}", advice)
            continue
        advice = "share a cell between solves of equal types only"
        for i, (expected, found) in enumerate(zip(inputs, given, strict=True)):
            yield from _compare(scope, node, f"input {i} of the cell", expected, found, advice)
        results = tuple(ir.output(cell).args[0])  # type: ignore[arg-type]
        if len(results) != len(state):  # type: ignore[arg-type]
            found = f"{len(results)} results"
            yield Fault(node, "a cell with one result per state", found, "mend the cell")
            continue
        for i, (expected, found) in enumerate(zip(inputs, results, strict=False)):
            yield from _compare(scope, node, f"result {i} of the cell", expected, found, "cast it")


def _compare(
    scope: Scope, node: fx.Node, what: str, expected: fx.Node, found: fx.Node, advice: str
) -> Iterator[Fault]:
    vals = expected.meta["val"], found.meta["val"]
    if (how := difference(*vals)) not in (None, "stride"):
        texts = [scope.type(v) for v in vals]
        yield Fault(node, f"{what}: {texts[0]}", f"{texts[1]} (another {how})", advice)
