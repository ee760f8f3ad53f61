"""gather: of a frozen table that is only looked up, the rows are read and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from zograph.ir import KEY, Kind, call, meta
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.pieces import has_rows, pieces_of
from zograph.transfers import GATHER

EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True)
class Gather(Pass):
    """Look frozen tables up where they are stored, and pass the rows to the stage.

    Before::

        %stage: (f32[s0, s1, 8],) = body0(%wte, %ids)            # stage=1, 99 rows of %wte
          %embedding: f32[s0, s1, 8] = aten.embedding(%wte, %ids)

    After::

        %gather: f32[s0, s1, 8] = zograph.gather([%wte], %ids)   # stage=1
        %stage: (f32[s0, s1, 8],) = body0(%gather)               # stage=1

    Requires: ``outlined``. Ensures: fact ``gathered``; where the context says that weights are
    streamed and rows can be read, no stage takes a frozen table of which it only looks up rows
    that an input or an earlier stage names, in pieces or not. A trainable table is updated whole,
    so it is fetched whole; so is one that is stored in a format, whose rows may share a scale.
    Numerics: bitwise. Cost: reads rows instead of a table. Raises: nothing.
    """

    name: ClassVar[str] = "gather"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"outlined"}), provides=frozenset({"gathered"})
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if not ctx.by_rows:
            return PassResult(gm, False, ("tables are on the device, or fetched whole",))
        calls: dict[str, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            if meta(node).kind == Kind.STAGE:
                calls.setdefault(str(node.target), []).append(node)
        found = sum(gather_in(gm, body, nodes) for body, nodes in calls.items())
        gm.recompile()
        return PassResult(gm, bool(found), (f"{found} lookups read rows",) if found else ())


def gather_in(gm: fx.GraphModule, name: str, calls: list[fx.Node]) -> int:
    """Turn the lookups of one stage body into arguments of its calls; return their number."""
    body = gm.get_submodule(name)
    assert isinstance(body, fx.GraphModule)
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    place = {n: i for i, n in enumerate(inputs)}
    found = 0
    for table in dict.fromkeys(n.args[0] for n in body.graph.nodes if n.target is EMBEDDING):
        parts = pieces_of(table) or [table]
        lookups = list(table.users)
        stored = all(p in place and all(has_rows(gm, c.args[place[p]]) for c in calls)
                     for p in parts)  # fmt: skip
        if not stored or not all(is_lookup(n, table, place) for n in lookups):
            continue
        for index in dict.fromkeys(n.args[1] for n in lookups):
            same = [n for n in lookups if n.args[1] is index]
            with body.graph.inserting_after(inputs[-1]):
                rows = body.graph.placeholder(f"rows_{found}")
            rows.meta = {"val": same[0].meta["val"], KEY: meta(same[0])}
            inputs.append(rows)
            for node in same:
                node.replace_all_uses_with(rows)
                body.graph.erase_node(node)
            for stage in calls:
                add_gather(gm, stage, [place[p] for p in parts], place[index])
            found += 1
        if table not in place:
            body.graph.erase_node(table)
    dropped = {i for n, i in place.items() if not n.users} if found else set()
    for i in dropped:
        body.graph.erase_node(inputs[i])
    for stage in calls if dropped else ():
        stage.args = tuple(a for i, a in enumerate(stage.args) if i not in dropped)
    body.recompile()
    return found


def is_lookup(node: fx.Node, table: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether a node reads rows of a table that an argument of the stage names."""
    return node.target is EMBEDDING and node.args[0] is table and node.args[1] in place


def add_gather(gm: fx.GraphModule, stage: fx.Node, parts: list[int], index: int) -> None:
    """Look the rows up ahead of a stage and add them to its arguments."""
    with gm.graph.inserting_before(stage):
        rows = call(
            gm.graph,
            GATHER,
            ([stage.args[i] for i in parts], stage.args[index]),
            source=f"gather<{stage.name}",
            stage=meta(stage).stage,
            hoisted=meta(stage).hoisted,
        )
    stage.args = (*stage.args, rows)
