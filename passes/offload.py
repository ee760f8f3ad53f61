"""offload: weights that do not stay on the device are fetched, folded, written back, released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from zograph.ir import Kind, annotate, call, fake_mode, getitem, info, meta, output, placeholder
from zograph.ir import placeholders as find
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.passes.materialize import split_pairs
from zograph.transfers import (
    DECODE,
    ENCODE,
    FETCH,
    FOLD,
    RELEASE,
    WAIT,
    WRITEBACK,
    is_transfer,
)

PENDING = (
    ("pending.seeds", torch.int64),
    ("pending.coefs", torch.float32),
    ("pending.scales", torch.float32),
)
"""The noise inputs that carry the terms of the step before."""


@dataclass(frozen=True)
class Offload(Pass):
    """Make every transfer and every update of a weight a node.

    Before::

        %stage: (f32[s0, 8],) = body0(%x, %w, ...)                               # stage=2

    After::

        %fetch: (f32[8, 8],) = zograph.fetch([%w], [])                           # stage=2
        %wait: (f32[8, 8],) = zograph.wait(%fetch)                               # stage=2
        %fold: (f32[8, 8],) = zograph.fold([%wait[0]], %pending.seeds, ...)      # stage=2
        %writeback: (f32[8, 8],) = zograph.writeback([%fold[0]])                 # stage=2
        %stage: (f32[s0, 8],) = body0(%x, %fold[0], ...)                         # stage=2
        %release: u8[0] = zograph.release([%fold[0]], [%stage[0], %writeback[0]])  # stage=2

    or, of a weight that is stored in a format, wherever it stands::

        %decode: f32[8, 8] = zograph.decode(%wait[0], ..., %pending.seeds, ...)  # stage=2
        %encode: bf16[8, 8] = zograph.encode(%decode, 'bfloat16')                # stage=2
        %writeback: (bf16[8, 8],) = zograph.writeback([%encode])                 # stage=2

    Requires: ``outlined``. Ensures: fact ``offloaded``; a trainable weight is folded exactly
    once, by the first stage that uses it, and what a later stage fetches is what that one wrote
    back; if it is not written in every step (`fold_every`), every stage that fetches it folds it;
    frozen weights are never folded or written; weights of the layout's `resident` are folded
    where they stand. A weight with a format is decoded wherever it is used, with its fold in the
    same node, and encoded where it would be written. In a step, weights that no stage uses are
    folded at the end.
    Numerics: bitwise, where no terms are pending. Cost: one fetch and at most one write-back per
    stage; O(nodes). Raises: nothing; whether the budget is enough the planner has said.
    Reference: Wang et al. 2025 (ZO2), section 5.
    """

    name: ClassVar[str] = "offload"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"outlined"}), provides=frozenset({"offloaded"})
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if any(is_transfer(n) for n in gm.graph.nodes):
            return PassResult(gm, False, ("transfers are in the graph already",))
        notes = []
        if ctx.layout is not None and ctx.layout.pair is not None:
            bodies = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
            limit = ctx.layout.pair
            split = sum(split_pairs(body_graph(gm, b), limit) for b in sorted(bodies))
            notes.append(f"{split} pairs of copies made one after the other")
        writer = Writer(gm, ctx)
        for node in [n for n in gm.graph.nodes if meta(n).kind == Kind.STAGE]:
            writer.stage(node)
        if "dual" in info(gm).facts:
            writer.unused()
        gm.recompile()
        notes.insert(0, f"{writer.fetched} of {writer.visited} visits of weights are fetched")
        return PassResult(gm, True, tuple(notes))


def body_graph(gm: fx.GraphModule, name: str) -> fx.GraphModule:
    """Return a stage body that is still a graph."""
    body = gm.get_submodule(name)
    assert isinstance(body, fx.GraphModule)
    return body


class Writer:
    """The rewrite's state: where each weight's newest value stands."""

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.ctx = gm, ctx
        self.params = info(gm).params
        self.stored = {str(meta(n).name): n for n in find(gm, Kind.PARAMETER)}
        self.encoded = frozenset(n for n, p in self.params.items() if p.format is not None)
        resident = self.params.keys() if ctx.layout is None else ctx.layout.resident
        self.resident = frozenset(resident)
        self.device = next(iter(self.stored.values())).meta["val"].device
        for name in self.encoded & self.stored.keys():
            self.stored[name].meta["val"] = self.stored_value(name)
        self.pending: list[fx.Node] = []
        self.folded: set[str] = set()
        self.fetched = self.visited = 0

    def stage(self, node: fx.Node) -> None:
        """Fetch and fold what a stage uses before it, write back and release behind it."""
        names = [str(meta(s).name) for s in node.all_input_nodes if meta(s).kind == Kind.PARAMETER]
        number = int(meta(node).stage or 0)
        self.visited += len(names)
        with self.gm.graph.inserting_before(node):
            weights, written = self.prepare(number, names)
        node.args = fx.node.map_arg(node.args, lambda n: weights.get(str(meta(n).name), n)
                                    if meta(n).kind == Kind.PARAMETER else n)  # fmt: skip
        results = sorted(u for u in node.users if isinstance(u.meta["val"], torch.Tensor))
        last = max(node.users, default=node)
        with self.gm.graph.inserting_after(last):
            self.release(number, names, weights, [*results, *written])

    def unused(self) -> None:
        """Fold the trainable weights that no stage has visited, one after the other."""
        rest = [n for n, p in self.params.items() if p.trainable and n not in self.folded]
        number = max(info(self.gm).stages, default=0)
        for name in rest:
            number += 1
            info(self.gm).stages[number] = f"unused {name}"
            self.visited += 1
            if name not in self.stored:  # export drops the inputs that nothing reads
                val = self.stored_value(name)
                self.stored[name] = placeholder(
                    self.gm, name, val, kind=Kind.PARAMETER, source="offload"
                )
            with self.gm.graph.inserting_before(output(self.gm)):
                weights, written = self.prepare(number, [name])
                self.release(number, [name], weights, written)
            if name in self.resident - self.encoded:  # nothing reads the folded weight
                self.gm.graph.erase_node(weights[name])

    def stored_value(self, name: str) -> torch.Tensor:
        """Return a fake of what is stored of a weight."""
        param = self.params[name]
        with fake_mode(self.gm):
            if param.format is not None:
                return param.format.empty(param.shape, self.device)
            return torch.empty(param.shape, dtype=param.dtype, device=self.device)

    def prepare(self, stage: int, names: list[str]) -> tuple[dict[str, fx.Node], list[fx.Node]]:
        """Insert fetch, wait, fold and write-back; return the weights and what is written."""
        weights = {n: self.stored[n] for n in names}
        streamed = [n for n in names if n not in self.resident]
        if streamed:
            self.fetched += len(streamed)
            fetch = self.call(FETCH, ([self.stored[n] for n in streamed], []), stage)
            weights |= self.items(self.call(WAIT, (fetch,), stage), streamed)
        again = {*streamed, *self.encoded} if self.ctx.fold_every > 1 else set()
        fresh = [
            n for n in names if self.params[n].trainable and (n in again or n not in self.folded)
        ]
        first = [n for n in fresh if n not in self.folded]
        self.folded.update(fresh)
        for name in names:
            if name in self.encoded:
                weights[name] = self.decode(stage, name, weights[name], fresh)
        plain = [n for n in fresh if n not in self.encoded]
        if plain:
            keys, slots = self.keys(stage, fresh)
            slots = [s for s, n in zip(slots, fresh, strict=True) if n in plain]
            decay = [self.params[n].decay for n in plain]
            args = ([weights[n] for n in plain], *self.terms(), keys, slots, decay)
            fold = self.call(FOLD, (*args, self.ctx.distribution), stage)
            weights |= self.items(fold, plain)
        self.stored |= {n: weights[n] for n in plain if n in self.resident}
        coded = {n: self.encode(stage, n, weights[n]) for n in first if n in self.encoded}
        if self.ctx.fold_every == 1:
            self.stored |= {n: node for n, node in coded.items() if n in self.resident}
        here = [node for n, node in coded.items() if n in self.resident]
        back = [n for n in first if n not in self.resident]
        if not back:
            return weights, here
        period = (self.ctx.fold_every,) if self.ctx.fold_every > 1 else ()
        written = self.call(WRITEBACK, ([(weights | coded)[n] for n in back], *period), stage)
        kept = self.items(written, back)
        if not period:  # else a later visit starts from the base again
            self.stored |= kept
        return weights, [*kept.values(), *here]

    def release(
        self, stage: int, names: list[str], weights: dict[str, fx.Node], uses: Sequence[fx.Node]
    ) -> None:
        """Say that the slots of a stage are free once `uses` have been computed."""
        passing = [weights[n] for n in names if n not in self.resident or n in self.encoded]
        if passing:
            self.call(RELEASE, (passing, list(uses)), stage)

    def decode(self, stage: int, name: str, stored: fx.Node, fresh: list[str]) -> fx.Node:
        """Insert the decoding of a weight, with its pending terms if it is fresh."""
        param = self.params[name]
        assert param.format is not None
        args: tuple[Any, ...] = (stored, list(param.shape), param.dtype, param.format.name)
        if name in fresh:
            keys, slots = self.keys(stage, fresh)
            rounding = self.ctx.rounding if self.ctx.fold_every == 1 else ""
            args += (rounding, *self.terms(), keys, slots[fresh.index(name)], param.decay)
            args += (self.ctx.distribution,)
        node = self.call(DECODE, args, stage)
        annotate(node, kind=Kind.WEIGHT, name=name)
        return node

    def encode(self, stage: int, name: str, weight: fx.Node) -> fx.Node:
        """Insert the encoding of a weight that is to be stored."""
        form = self.params[name].format
        assert form is not None
        node = self.call(ENCODE, (weight, form.name), stage)
        annotate(node, kind=Kind.WEIGHT, name=name)
        return node

    def call(self, target: Any, args: tuple[Any, ...], stage: int) -> fx.Node:
        return call(self.gm.graph, target, args, source="offload", stage=stage)

    def items(self, node: fx.Node, names: list[str]) -> dict[str, fx.Node]:
        """Take the weights out of a list."""
        found = {}
        for i, name in enumerate(names):
            found[name] = getitem(self.gm.graph, node, i)
            annotate(found[name], kind=Kind.WEIGHT, name=name)
        return found

    def keys(self, stage: int, names: list[str]) -> tuple[fx.Node, list[int]]:
        """Return the stage's table of noise keys and where in it the weights' keys stand."""
        tables = info(self.gm).keys
        wanted = f"keys.{stage}"
        if stage not in tables:
            tables[stage] = tuple(names)
            return self.noise_input(wanted, torch.int64, len(names), 2), list(range(len(names)))
        (node,) = (n for n in find(self.gm, Kind.NOISE) if meta(n).name == wanted)
        return node, [tables[stage].index(n) for n in names]

    def terms(self) -> list[fx.Node]:
        """Return the inputs that carry the pending terms, made at their first use."""
        if not self.pending:
            count = self.ctx.directions * self.ctx.fold_every
            self.pending = [self.noise_input(name, dtype, count) for name, dtype in PENDING]
        return self.pending

    def noise_input(self, name: str, dtype: torch.dtype, *shape: int) -> fx.Node:
        with fake_mode(self.gm):
            val = torch.empty(shape, dtype=dtype, device=self.device)
        return placeholder(self.gm, name, val, kind=Kind.NOISE, source="offload")
