"""Reads a graph into a scene: its plumbing left out, every body in the place of its call."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from zograph.ir import Kind, info, is_shape, meta, op_name
from zograph.passes.partition import structure
from zograph.printer import Printer, body_of
from zograph.transfers import DECODE, ENCODE, FETCH, FOLD, RELEASE, WAIT, WRITEBACK
from zograph.viz.scene import Edge, Item, ItemKind, Move, Scene, Stage

VIEWS = {"view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
VIEWS |= {"alias", "contiguous", "expand", "permute", "t", "transpose"}
"""Operators that only reshape: the picture has them as part of an arrow."""

TERMS = ("seeds", "coefs", "scales")
MOVES: dict[Any, str] = {
    FETCH: "fetch",
    WAIT: "wait",
    DECODE: "decode",
    FOLD: "fold",
    ENCODE: "encode",
    WRITEBACK: "write back",
    RELEASE: "release",
}
TASKS = {"fetch": ("read", "fetch"), "write back": ("writeback", "write")}
"""Of what moves bytes: what the schedule calls its tasks, see :mod:`zograph.passes.schedule`."""
SIGNS = ("+", "-")


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: a box and its port, or a parameter that no box shows yet."""

    item: str = ""
    port: str = ""
    views: tuple[str, ...] = ()
    param: str = ""
    noise: str = ""
    """Of a noise input: what its stage's box says of it."""
    pair: bool = False
    """Both copies of a weight: the next getitem tells which one."""


def read(gm: fx.GraphModule) -> Scene:
    """Read a graph, outlined or flat, at any point of the pipeline."""
    return Reader(gm).read()


class Reader:
    """One walk over a graph, in its order."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.scene = Scene(params=info(gm).params)
        self.printer = Printer(gm)
        self.bodies = {n: b for n in gm.graph.nodes if (b := body_of(gm, n)) is not None}
        self.counts: dict[int | None, int] = {}
        self.weights: dict[tuple[int | None, str, str], Item] = {}
        self.lists: dict[fx.Node, list[Origin | None]] = {}

    def read(self) -> Scene:
        """Return the scene."""
        self._stages()
        known: dict[fx.Node, Origin | None] = {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                known[node] = self._placeholder(node)
            elif node.op == "output":
                self._results(node, known)
            elif node in self.bodies:
                self._body(node, known)
            elif node.target in MOVES:
                self._transfer(node, known)
            elif node not in known:
                known[node] = self._node(node, meta(node).stage, known)
        used = {e.source for e in self.scene.edges}
        self.scene.items = {
            i.id: i for i in self.scene.items.values() if i.kind != "stored" or i.id in used
        }
        return self.scene

    def _stages(self) -> None:
        """Find the stages and what makes two of them equal."""
        paths = info(self.gm).stages
        nodes: dict[int, list[fx.Node]] = {}
        numbers: dict[fx.GraphModule, str] = {}
        idle: dict[int, Stage] = {}
        for node in self.gm.graph.nodes:
            stage = meta(node).stage
            if stage is None or node.op in ("placeholder", "output"):
                continue
            if node in self.bodies:
                form = numbers.setdefault(self.bodies[node], f"body {len(numbers)}")
                self.scene.stages[stage] = Stage(
                    stage, paths.get(stage, ""), form, first_path=paths.get(stage, "")
                )
            elif node.target in MOVES:
                path = paths.get(stage, "")
                idle.setdefault(stage, Stage(stage, path, "transfers", first_path=path))
            elif meta(node).source not in ("outline", "offload"):
                nodes.setdefault(stage, []).append(node)
        for stage, inside in nodes.items():
            whole = all("val" in x.meta for n in inside for x in (n, *n.all_input_nodes))
            flat: object = structure(inside) if whole else stage
            path = paths.get(stage, "")
            self.scene.stages.setdefault(stage, Stage(stage, path, flat, first_path=path))
        self.scene.stages = dict(sorted((idle | self.scene.stages).items()))

    def _placeholder(self, node: fx.Node) -> Origin | None:
        record = meta(node)
        name, text = record.name or node.name, self._type(node)
        if record.kind == Kind.PARAMETER and name in self.scene.params:
            return Origin(param=name)
        if record.kind == Kind.NOISE:
            size = text.partition("[")[2].rstrip("]")
            if name in TERMS and size == "0":
                return Origin()  # all terms are folded
            name = "pending terms" if name in TERMS else name
            name = f"{name}: {record.mixing}" if record.mixing else name
            return Origin(noise=f"{name} [{size}]" if size else name)
        kind: ItemKind = "stored" if record.kind in (Kind.BUFFER, Kind.CONSTANT) else "input"
        name = re.sub(r"^\['([^']*)'\]", r"\1", name)
        item = self._add(Item(f"{kind}_{len(self.scene.items)}", kind, lines=[name, text]))
        return Origin(item=item.id)

    def _body(self, call: fx.Node, known: dict[fx.Node, Origin | None]) -> None:
        """Walk a body with the origins of the call's arguments; its results go to the call's."""
        inner: dict[fx.Node, Origin | None] = {}
        arguments = iter(call.args)
        for node in self.bodies[call].graph.nodes:
            if node.op == "placeholder":
                argument = next(arguments, None)
                inner[node] = known.get(argument) if isinstance(argument, fx.Node) else None
            elif node.op == "output":
                results = node.args[0] if isinstance(node.args[0], (tuple, list)) else node.args
                for user in call.users:
                    index = user.args[1] if len(user.args) > 1 else None
                    if isinstance(index, int) and index < len(results):
                        known[user] = inner.get(results[index])
            else:
                inner[node] = self._node(node, meta(call).stage, inner)

    def _transfer(self, node: fx.Node, known: dict[fx.Node, Origin | None]) -> None:
        """Add to what happens to a stage's weights; they stay the same weights for the picture."""
        first, stage = node.args[0], meta(node).stage
        single = node.target in (DECODE, ENCODE)
        if isinstance(first, fx.Node):
            origins = [known.get(first)] if single else self.lists[first]
        else:
            assert isinstance(first, (list, tuple))
            origins = [known.get(n) if isinstance(n, fx.Node) else None for n in first]
        self.lists[node] = origins
        if single:
            known[node] = origins[0]
        for user in () if single else node.users:
            index = user.args[1] if len(user.args) > 1 else None
            if isinstance(index, int):
                known[user] = origins[index]
        strip = self._strip(stage)
        what = MOVES[node.target]
        names = [o.param for o in origins if o is not None]
        size = sum(self.scene.params[n].stored_bytes for n in names if n in self.scene.params)
        if what == "fold":
            size = self._terms(node.args[1])
        elif single:  # one node for each weight
            size += strip.moves[what].high if what in strip.moves else 0
        elif what not in TASKS:
            size = 0
        strip.moves[what] = Move(what, size, size, self._streams(what, stage))
        if stage in self.scene.stages and self.scene.stages[stage].form == "transfers":
            for name in names:
                self._weights(name, stage, "plain")
        for token in node.all_input_nodes if what == "fetch" else ():
            if token.target is not RELEASE:
                continue
            source = self._strip(meta(token).stage)
            self.scene.edges[Edge(source.id, strip.id, "release")] = None

    def _strip(self, stage: int | None) -> Item:
        """Return the box of what happens to a stage's weights, making it at its first use."""
        name = id_of(stage, "moves")
        return self.scene.items.get(name) or self._add(Item(name, "transfers", stage))

    def _terms(self, node: Any) -> int:
        """Return how many terms a fold applies."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return int(value.shape[0]) if isinstance(value, torch.Tensor) else 1

    def _streams(self, what: str, stage: int | None) -> tuple[str, ...]:
        """Return the streams that a stage's bytes pass through, if a schedule says."""
        found = info(self.gm).schedule
        if found is None:
            return ()
        names = [f"{task} {stage}" for task in TASKS.get(what, ())]
        return tuple(str(found.tasks[n].stream) for n in names if n in found.tasks)

    def _node(
        self, node: fx.Node, stage: int | None, known: dict[fx.Node, Origin | None]
    ) -> Origin | None:
        position = self.counts[stage] = self.counts.get(stage, -1) + 1
        name = str(getattr(node.target, "_opname", op_name(node)))
        first = known.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if node.op == "get_attr" or is_shape(node):
            return None
        if op_name(node).startswith("zograph.materialize") and first is not None and first.param:
            return self._materialize(node, stage, position, known)
        if name == "getitem" and first is not None:
            sign = SIGNS[node.args[1] == 1] if first.pair else first.port
            return replace(first, port=sign, pair=False)
        if name in VIEWS and first is not None:
            return replace(first, views=(*first.views, name))
        item = self._add(Item(id_of(stage, position), "op", stage, lines=[name.strip("_") or name]))
        item.branch, item.hoisted = meta(node).branch, meta(node).hoisted
        for source in node.all_input_nodes:
            self._edge(known.get(source), item, self._type(source), stage)
        return Origin(item=item.id)

    def _materialize(
        self,
        node: fx.Node,
        stage: int | None,
        position: int,
        known: dict[fx.Node, Origin | None],
    ) -> Origin:
        """Give a weight its box; the two calls of unpaired copies share one."""
        rows, single = "rows" in op_name(node), op_name(node).endswith("_one")
        origins = [o for n in node.all_input_nodes if (o := known.get(n)) is not None]
        gather = next((o for o in origins[1:2] if rows), None)
        item = self._weights(origins[0].param, stage, "rows" if rows else "full")
        sign = ("+" if node.args[-1] == 1 else "-") if single else ""
        item.ports = sorted({*item.ports, *(sign or "+-")})
        if gather is not None:
            self._edge(gather, item, self._type(node.args[1]), stage)
        noise = self.scene.items.get(id_of(stage, "noise"))
        noise = noise or self._add(Item(id_of(stage, "noise"), "noise", stage))
        noise.lines = list(dict.fromkeys([*noise.lines, *(o.noise for o in origins if o.noise)]))
        self.scene.edges[Edge(noise.id, item.id)] = None
        return Origin(item=item.id, port=sign, pair=not single)

    def _weights(self, name: str, stage: int | None, how: str) -> Item:
        """Return the box of a parameter in a stage, making it at its first use."""
        item = self.weights.get((stage, name, how))
        if item is None:
            param = self.scene.params[name]
            count = sum(s == stage for s, _, _ in self.weights)
            item = self._add(Item(id_of(stage, f"w{count}"), "weights", stage, params=[param]))
            item.rows = how == "rows"
            self.weights[stage, name, how] = item
            if stage in self.scene.stages:
                self.scene.stages[stage].params[name] = param
        return item

    def _add(self, item: Item) -> Item:
        self.scene.items[item.id] = item
        return item

    def _results(self, node: fx.Node, known: dict[fx.Node, Origin | None]) -> None:
        for i, result in enumerate(pytree.tree_leaves(node.args)):
            if isinstance(result, fx.Node):
                branch = meta(result).branch
                loss = info(self.gm).has_loss and (i == 0 or branch is not None)
                name = f"loss {branch or ''}".strip() if loss else f"output {i}"
                lines = [name, self._type(result)]
                item = self._add(Item(f"result_{i}", "result", branch=branch, lines=lines))
                self._edge(known.get(result), item, lines[1], None)

    def _edge(self, origin: Origin | None, item: Item, type: str, stage: int | None) -> None:
        if origin is not None and origin.param:
            origin = replace(origin, item=self._weights(origin.param, stage, "plain").id)
        if origin is not None and origin.item:
            edge = Edge(origin.item, item.id, origin.port, type, origin.views)
            self.scene.edges[edge] = None

    def _type(self, node: Any) -> str:
        has_value = isinstance(node, fx.Node) and "val" in node.meta
        return self.printer.type(node.meta["val"]) if has_value else "?"


def id_of(stage: int | None, place: object) -> str:
    """Name a box by its stage and its place there; equal stages have equal places."""
    return f"s{'' if stage is None else stage}_{place}"
