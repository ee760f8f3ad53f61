"""chunk: what a table in pieces is used for is computed piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from zograph.ir import call, output
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.pieces import has_rows, pieces_of

aten = torch.ops.aten

VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
KEEPS_LAST = {
    aten.clone.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.slice.Tensor,
    aten.to.dtype,
    aten._to_copy.default,
}
"""Operators that treat all columns alike where the number of columns stays the same."""

Step = Callable[[fx.Node, int, int], fx.Node]
"""Applies an operator to the columns [start, stop) of what it was applied to as a whole."""


@dataclass(frozen=True)
class Chunk(Pass):
    """Multiply by a table, look it up and take the loss over its rows one piece at a time.

    Before::

        %wte: f32[50, 8] = aten.cat([%wte[0:25], %wte[25:50]])
        %logits: f32[s0, 50] = aten.linear(%x, %wte)
        %loss: f32[] = aten.cross_entropy_loss(%logits, %labels)

    After::

        %linear: f32[s0, 25] = aten.linear(%x, %wte[0:25])
        %amax: f32[s0] = aten.amax(%linear, [-1])                # and the sum of exponentials
        %linear_1: f32[s0, 25] = aten.linear(%x, %wte[25:50])
        %amax_1: f32[s0] = aten.amax(%linear_1, [-1])            # joined with those before
        %loss: f32[] = ...                                       # from maximum, sum and label

    Requires: ``normalized``. Ensures: fact ``chunked``; linear layers and lookups use the pieces
    of a table (:mod:`zograph.pieces`) and no whole one; a cross entropy over classes that are such
    rows keeps a running maximum and sum, so that logits of all classes exist only where they are
    an output. A frozen table that is only looked up stays whole where its rows are read alone.
    Other uses put the pieces together. Numerics: reassociates; which tables are in pieces is fixed
    by the model. Cost: O(pieces) nodes. Raises: nothing.
    Reference: Milakov and Gimelshein 2018 (online normaliser).
    """

    name: ClassVar[str] = "chunk"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"normalized"}),
        provides=frozenset({"chunked"}),
        numerics="reassociates",
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        tables = [n for n in gm.graph.nodes if pieces_of(n) is not None]
        products = lookups = losses = 0
        for table in tables:
            for user in list(table.users):
                if user.target is aten.linear.default and user.args[1] is table:
                    losses += chunk_linear(gm, user)
                    products += 1
                elif user.target is aten.embedding.default and user.args[0] is table:
                    if ctx.by_rows and all(has_rows(gm, p) for p in pieces_of(table) or ()):
                        continue
                    chunk_embedding(gm, user)
                    lookups += 1
        if products or lookups:
            in_order(gm)
            gm.graph.eliminate_dead_code()
            gm.recompile()
        notes = []
        if products or lookups:
            notes.append(f"{products} products, {lookups} lookups, {losses} losses by pieces")
        if whole := [t for t in tables if t.users]:
            notes.append(f"{len(whole)} tables put together for other uses")
        return PassResult(gm, bool(products or lookups), tuple(notes))


def emit(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call that takes over the metadata of the node that it serves."""
    return call(like.graph, target, args, kwargs, source=f"chunk<{like.name}", like=like)


def spans(pieces: list[fx.Node]) -> list[tuple[int, int]]:
    """Return the rows of each piece."""
    found, row = [], 0
    for piece in pieces:
        height = piece.meta["val"].shape[0]
        found.append((row, row + height))
        row += height
    return found


def chunk_embedding(gm: fx.GraphModule, node: fx.Node) -> None:
    """Look each index up in the piece that has its row; NaN if none has.

    A batch on the CPU is refused before that; one on a device is not read for it.
    """
    index, found = node.args[1], None
    pieces = pieces_of(node.args[0]) or []
    with gm.graph.inserting_before(node):
        for piece in pieces:
            height = piece.meta["val"].shape[0]
            inside, local = locate(node, index, height)
            looked_up = emit(node, aten.embedding.default, piece, local)
            mask = emit(node, aten.unsqueeze.default, inside, -1)
            if found is None:
                found = emit(node, aten.where.ScalarOther, mask, looked_up, math.nan)
            else:
                found = emit(node, aten.where.self, mask, looked_up, found)
            index = emit(node, aten.sub.Tensor, index, height)
    assert found is not None
    node.replace_all_uses_with(found)
    gm.graph.erase_node(node)


def locate(like: fx.Node, index: Any, height: int) -> tuple[fx.Node, fx.Node]:
    """Return which indices are rows of a piece, and indices that are in any case."""
    low = emit(like, aten.ge.Scalar, index, 0)
    high = emit(like, aten.lt.Scalar, index, height)
    inside = emit(like, aten.logical_and.default, low, high)
    return inside, emit(like, aten.clamp.default, index, 0, height - 1)


def chunk_linear(gm: fx.GraphModule, node: fx.Node) -> int:
    """Multiply by the pieces, and take the losses over the result; return their number."""
    x, table, *rest = node.args
    pieces = pieces_of(table) or []
    losses = losses_of(node)
    running = {loss: Running(loss, steps) for loss, steps in losses.items()}
    parts = []
    with gm.graph.inserting_before(node):
        for piece, (start, stop) in zip(pieces, spans(pieces), strict=True):
            bias = [columns(node, b, start, stop) for b in rest]
            parts.append(emit(node, aten.linear.default, x, piece, *bias))
            for total in running.values():
                total.add(parts[-1], start, stop)
        for loss, total in running.items():
            loss.replace_all_uses_with(total.result())
            gm.graph.erase_node(loss)
        whole = emit(node, aten.cat.default, parts, len(node.meta["val"].shape) - 1)
    node.replace_all_uses_with(whole)
    gm.graph.erase_node(node)
    return len(losses)


def columns(like: fx.Node, node: Any, start: int, stop: int) -> Any:
    """Return the last dimension's [start, stop) of an operand that has all columns."""
    if not isinstance(node, fx.Node):
        return node
    last = len(node.meta["val"].shape) - 1
    return emit(like, aten.slice.Tensor, node, last, start, stop)


def losses_of(logits: fx.Node) -> dict[fx.Node, list[Step]]:
    """Return the cross entropies over a node's columns, and what lies between."""
    found: dict[fx.Node, list[Step]] = {}
    stack: list[tuple[fx.Node, list[Step]]] = [(logits, [])]
    while stack:
        at, steps = stack.pop()
        for user in at.users:
            if is_loss(user, at):
                found[user] = steps
            elif (step := by_columns(user, at)) is not None:
                stack.append((user, [*steps, step]))
    return found


def is_loss(node: fx.Node, logits: fx.Node) -> bool:
    """Whether a node is a plain cross entropy of rows of logits and labels."""
    if node.target is not aten.cross_entropy_loss.default or node.args[0] is not logits:
        return False
    _, labels, weight, _, _, smoothing = arguments(node)
    integers = not labels.meta["val"].is_floating_point()
    return len(logits.meta["val"].shape) == 2 and integers and weight is None and not smoothing


def arguments(loss: fx.Node) -> list[Any]:
    """Return logits, labels, weight, reduction, ignored label and smoothing of a cross entropy."""
    found = []
    for i, wanted in enumerate(loss.target._schema.arguments):  # type: ignore[union-attr]
        given = loss.kwargs.get(wanted.name, wanted.default_value)
        found.append(loss.args[i] if i < len(loss.args) else given)
    return found


def by_columns(node: fx.Node, source: fx.Node) -> Step | None:
    """Return how to apply an operator to some columns, None if it does not treat them alike."""
    width, val = source.meta["val"].shape[-1], node.meta.get("val")
    target = node.target
    if not isinstance(val, torch.Tensor) or not val.dim() or val.shape[-1] != width:
        return None
    first = node.args[0] if node.args else None
    if target in VIEWS and first is source:
        lead = list(node.args[1])[:-1]  # type: ignore[arg-type]
        return lambda part, a, b: emit(node, target, part, [*lead, b - a])
    if target not in KEEPS_LAST and not is_pointwise(target):
        return None

    def operand(arg: fx.Node, part: fx.Node, a: int, b: int) -> Any:
        if arg is source:
            return part
        shape = arg.meta["val"].shape if isinstance(arg.meta["val"], torch.Tensor) else ()
        full = len(shape) > 0 and shape[-1] == width
        return columns(node, arg, a, b) if full else arg

    def step(part: fx.Node, a: int, b: int) -> fx.Node:
        args = fx.node.map_arg(node.args, lambda n: operand(n, part, a, b))
        return emit(node, target, *args, **node.kwargs)

    return step


def is_pointwise(target: Any) -> bool:
    """Whether an operator computes every element from those at its place."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


class Running:
    """A cross entropy over columns that come in turn: maximum, sum and the label's logit so far.

    The logit is NaN as long as no column was the label's, so that a label which is none of the
    classes cannot go unnoticed.
    """

    def __init__(self, loss: fx.Node, steps: list[Step]) -> None:
        self.loss, self.steps = loss, steps
        _, self.labels, _, self.reduction, self.ignored, _ = arguments(loss)
        self.local = self.labels
        self.state: tuple[fx.Node, fx.Node, fx.Node] | None = None

    def add(self, part: fx.Node, start: int, stop: int) -> None:
        """Take the next columns in."""
        do = self.emit
        for step in self.steps:
            part = step(part, start, stop)
        if part.meta["val"].dtype != torch.float32:
            part = self.emit(aten._to_copy.default, part, dtype=torch.float32)
        if self.state is None:
            self.state = tuple(self.full(x) for x in (-math.inf, 0.0, math.nan))  # type: ignore[assignment]
        assert self.state is not None
        most, total, picked = self.state
        larger = do(aten.maximum.default, most, do(aten.amax.default, part, [-1]))
        shifted = do(aten.sub.Tensor, part, do(aten.unsqueeze.default, larger, -1))
        added = do(aten.sum.dim_IntList, do(aten.exp.default, shifted), [-1])
        kept = do(aten.mul.Tensor, total, do(aten.exp.default, do(aten.sub.Tensor, most, larger)))
        inside, local = locate(self.loss, self.local, stop - start)
        column = do(aten.unsqueeze.default, local, -1)
        logit = do(aten.squeeze.dim, do(aten.gather.default, part, 1, column), -1)
        picked = do(aten.where.self, inside, logit, picked)
        self.state = larger, do(aten.add.Tensor, kept, added), picked
        self.local = do(aten.sub.Tensor, self.local, stop - start)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call in the loss's place."""
        return emit(self.loss, target, *args, **kwargs)

    def full(self, value: float) -> fx.Node:
        """Return a float32 vector, one element a label."""
        dtype = torch.float32
        return self.emit(aten.full_like.default, self.labels, value, dtype=dtype)

    def result(self) -> fx.Node:
        """Return the loss."""
        assert self.state is not None
        do = self.emit
        most, total, picked = self.state
        norm = do(aten.add.Tensor, most, do(aten.log.default, total))
        counted = do(aten.ne.Scalar, self.labels, self.ignored)
        each = do(aten.sub.Tensor, norm, picked)
        each = do(aten.where.ScalarOther, counted, each, 0.0)
        found = each if self.reduction == 0 else do(aten.sum.default, each)
        if self.reduction == 1:
            number = do(aten.sum.default, counted, dtype=torch.float32)
            found = do(aten.div.Tensor, found, number)
        dtype = self.loss.meta["val"].dtype
        if dtype == torch.float32:
            return found
        return do(aten._to_copy.default, found, dtype=dtype)


def in_order(gm: fx.GraphModule) -> None:
    """Move what a node uses ahead of it, and leave the order as it is otherwise."""
    anchor = output(gm)
    done: set[fx.Node] = set()
    stack = list(reversed(gm.graph.nodes))
    while stack:
        node = stack.pop()
        missing = [s for s in node.all_input_nodes if s not in done]
        if missing:
            stack += [node, *reversed(missing)]
        elif node not in done:
            done.add(node)
            if node.op not in ("placeholder", "output"):
                anchor.prepend(node)
