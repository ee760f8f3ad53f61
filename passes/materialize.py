"""materialize: make both perturbed copies of a weight at once, and only what is used."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from zograph.ir import call, getitem, meta
from zograph.passes.base import Contract, Pass, PassContext, PassResult

aten, zo = torch.ops.aten, torch.ops.zograph

SINGLE: dict[Any, Any] = {
    zo.materialize.default: zo.materialize_one.default,
    zo.materialize_rows.default: zo.materialize_rows_one.default,
}
"""What makes one copy instead of two."""


@dataclass(frozen=True)
class Materialize(Pass):
    """Merge the two perturbed copies of a weight into one call; gather before perturbing.

    Before::

        %w_p: f32[99, 8] = zograph.materialize_one(%w, ..., 1)       # branch=+
        %e_p: f32[s0, 8] = aten.embedding(%w_p, %ids)                # branch=+
        %w_m: f32[99, 8] = zograph.materialize_one(%w, ..., -1)      # branch=-
        %e_m: f32[s0, 8] = aten.embedding(%w_m, %ids)                # branch=-

    After::

        %e: (f32[s0, 8], f32[s0, 8]) = zograph.materialize_rows(%w, %ids, ...)
        %e_p: f32[s0, 8] = getitem(%e, 0)                            # branch=+
        %e_m: f32[s0, 8] = getitem(%e, 1)                            # branch=-

    Requires: ``dual``. Ensures: fact ``materialized``; one noise evaluation per weight
    element and stage serves both branches; an embedding that is only gathered from is
    perturbed in the gathered rows only. Numerics: bitwise. Cost: reads a weight once,
    writes two copies that die at their last use. Raises: nothing.
    """

    pairs: bool = True
    """False keeps one call per branch: half the scratch, twice the noise."""

    name: ClassVar[str] = "materialize"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"dual"}), provides=frozenset({"materialized"})
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        rows = sum(gather_rows(gm, node) for node in single_calls(gm, zo.materialize_one.default))
        gm.graph.eliminate_dead_code()
        pairs = merge_pairs(gm) if self.pairs else 0
        gm.recompile()
        notes = []
        if rows:
            notes.append(f"{rows} gathers perturb their rows only")
        if pairs:
            notes.append(f"{pairs} pairs made at once")
        return PassResult(gm, bool(rows or pairs), tuple(notes))


def single_calls(gm: fx.GraphModule, target: torch._ops.OpOverload) -> list[fx.Node]:
    """List the calls of one operator, in order."""
    return [n for n in gm.graph.nodes if n.target is target]


def gather_rows(gm: fx.GraphModule, copy: fx.Node) -> int:
    """Let the embeddings that gather from a perturbed copy gather from the base instead."""
    weight, *rest = copy.args
    gathers = [u for u in copy.users if u.target is aten.embedding.default and u.args[0] is copy]
    for node in gathers:
        with gm.graph.inserting_before(node):
            made = call(
                gm.graph,
                zo.materialize_rows_one.default,
                (weight, node.args[1], *rest),
                source=f"materialize<{node.name}",
                like=node,
            )
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    return len(gathers)


def split_pairs(gm: fx.GraphModule, limit: int) -> int:
    """Make the two copies of a weight one after the other where one takes more than `limit` bytes.

    The inverse of :func:`merge_pairs`: half the scratch memory, more noise, the same bits.
    """
    found = 0
    for node in beyond(gm, limit):
        for half in halves_of(node):
            with gm.graph.inserting_before(first_user(half)):
                sign = 1 if half.args[1] == 0 else -1
                one = call(
                    gm.graph,
                    SINGLE[node.target],
                    (*node.args, sign),
                    source=f"materialize<{node.name}",
                    like=half,
                )
            half.replace_all_uses_with(one)
            gm.graph.erase_node(half)
        gm.graph.erase_node(node)
        found += 1
    if found:
        gm.recompile()
    return found


def beyond(gm: fx.GraphModule, limit: int) -> list[fx.Node]:
    """List the calls that make two copies, one of which takes more than `limit` bytes."""
    pairs = [n for n in gm.graph.nodes if n.target in SINGLE]
    return [n for n in pairs if any(copy_bytes(h) > limit for h in halves_of(n))]


def halves_of(node: fx.Node) -> list[fx.Node]:
    """Return the copies that a call makes."""
    return [u for u in node.users if u.target is operator.getitem]


def copy_bytes(node: fx.Node) -> int:
    """Return the size of a perturbed copy; gathered rows count as nothing."""
    val = node.meta["val"]
    numel = val.numel()
    return numel * int(val.dtype.itemsize) if isinstance(numel, int) else 0


def first_user(node: fx.Node) -> fx.Node:
    """Return the user that stands first in the graph."""
    return min(node.users)


def merge_pairs(gm: fx.GraphModule) -> int:
    """Replace calls that differ in nothing but the sign by one call that returns both."""
    both = {
        zo.materialize_one.default: zo.materialize.default,
        zo.materialize_rows_one.default: zo.materialize_rows.default,
    }
    first: dict[tuple[object, ...], fx.Node] = {}
    merged = 0
    for node in list(gm.graph.nodes):
        if node.target not in both:
            continue
        *args, _sign = node.args
        other = first.setdefault((node.target, meta(node).stage, *args), node)
        if other is node:
            continue
        with gm.graph.inserting_before(other):
            pair = call(
                gm.graph,
                both[node.target],
                tuple(args),
                source=f"materialize<{other.name}",
                like=other,
                branch=None,
            )
            for half in (other, node):
                index = 0 if half.args[-1] == 1 else 1
                item = getitem(gm.graph, pair, index, branch=meta(half).branch)
                half.replace_all_uses_with(item)
        gm.graph.erase_node(other)
        gm.graph.erase_node(node)
        merged += 1
    return merged
