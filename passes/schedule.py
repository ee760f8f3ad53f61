"""schedule: when every transfer and stage runs, on which stream, through which slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
from torch import fx

from zograph import schedule as scheduling
from zograph.elision import mean_terms
from zograph.ir import Kind, info, meta, output
from zograph.layout import Layout
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.schedule import Stream, Task, Unit
from zograph.stores.base import padded
from zograph.transfers import DECODE, ENCODE, FETCH, FOLD, RELEASE, WRITEBACK, weight_names

STAGING_DEPTH = 2
"""Buffers between host memory and a disk, in each direction, where a GPU computes."""


@dataclass(frozen=True)
class Schedule(Pass):
    """Order the graph for overlap: fetches move up to where their slot is free.

    Before::

        %stage: (f32[s0, 8],) = body0(%x, %fold[0], ...)                         # stage=2
        %release: u8[0] = zograph.release([%fold[0]], [%stage[0]])               # stage=2
        %fetch_1: (f32[8, 8],) = zograph.fetch([%w1], [])                        # stage=3

    After::

        %fetch_1: (f32[8, 8],) = zograph.fetch([%w1], [%release_of_stage_1])     # stage=3
        %stage: (f32[s0, 8],) = body0(%x, %fold[0], ...)                         # stage=2
        %release: u8[0] = zograph.release([%fold[0]], [%stage[0]])               # stage=2

    Requires: ``offloaded``. Ensures: fact ``scheduled``; ``GraphInfo.schedule`` holds order,
    events, slots and the predicted timeline (:mod:`zograph.schedule`); a fetch that fills a slot
    anew uses the token of the release before it. Does nothing where all weights are resident.
    Numerics: bitwise. Cost: list scheduling, a second for thousands of tasks. Raises: nothing.
    References: Graham 1966 (list scheduling); Wang et al. 2025 (ZO2), section 5.
    """

    name: ClassVar[str] = "schedule"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"offloaded"}), provides=frozenset({"scheduled"})
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if ctx.layout is None:
            return PassResult(gm, False, ("all weights stay on the device: nothing to order",))
        if info(gm).schedule is not None:
            return PassResult(gm, False, ("already scheduled",))
        tasks = Tasks(gm, ctx.layout, ctx.directions)
        found = scheduling.schedule(tasks.dag, tasks.units, tasks.capacity())
        info(gm).schedule, info(gm).layout = found, ctx.layout
        refills = add_refills(gm, found)
        in_order_of_start(gm, tasks.nodes, found)
        gm.recompile()
        return PassResult(gm, True, (f"{len(tasks.nodes)} tasks, {refills} slots filled anew",))


def predicted_seconds(gm: fx.GraphModule, layout: Layout, directions: int) -> float:
    """Return how long a step of an offloaded graph takes in its best order."""
    tasks = Tasks(gm, layout, directions)
    return scheduling.schedule(tasks.dag, tasks.units, tasks.capacity()).seconds


class Tasks:
    """The step as a graph of tasks: what moves, what computes, how long it takes."""

    def __init__(self, gm: fx.GraphModule, layout: Layout, directions: int) -> None:
        self.params, self.layout, self.directions = info(gm).params, layout, directions
        self.uses = {u.stage: u for u in layout.uses}
        self.dag = nx.DiGraph()
        self.units: dict[str, Unit] = {}
        self.nodes: dict[str, fx.Node] = {}
        staged = layout.tier == "disk" and layout.spec.kind == "cuda"
        self.add_fetch = self.fetch_staged if staged else self.fetch_at_once
        self.add_write = self.write_staged if staged else self.write_at_once
        disk = layout.tier == "disk"
        self.inward = Stream.READ if disk and not staged else Stream.TO_DEVICE
        self.outward = Stream.WRITE if disk and not staged else Stream.TO_HOST
        after: dict[fx.Node, tuple[str, ...]] = {}
        for node in gm.graph.nodes:
            before = tuple(dict.fromkeys(t for s in node.all_input_nodes for t in after.get(s, ())))
            after[node] = self.add(node, before)

    def capacity(self) -> dict[str, int]:
        """Return the bytes of each arena."""
        found = {"device": self.layout.slots}
        if any(u.arena == "decoded" for u in self.units.values()):
            found["decoded"] = self.layout.decoded
        staging = [u.bytes for u in self.units.values() if u.arena == "staging"]
        return found | ({"staging": 2 * STAGING_DEPTH * max(staging)} if staging else {})

    def add(self, node: fx.Node, before: tuple[str, ...]) -> tuple[str, ...]:
        """Add a node's task, if it is one; return the tasks that its users depend on."""
        stage = meta(node).stage
        if node.target is FETCH:
            names = weight_names(node)
            sizes = [padded(self.params[n].stored_bytes) for n in names]
            self.units[unit(stage)] = Unit(unit(stage), "device", sum(sizes))
            return self.add_fetch(node, unit(stage), names, before)
        if node.target is FOLD:
            names = weight_names(node)
            terms = mean_terms(self.directions, self.layout.fold_every)
            count = round(terms * sum(self.numel(n) for n in names))
            seconds = self.layout.spec.seconds((), fold=count)
            slot = (unit(stage),) if unit(stage) in self.units else ()
            return self.task(node, f"fold {stage}", Stream.COMPUTE, seconds, before, writes=slot)
        if node.target is DECODE:
            return self.add_decode(node, before)
        if node.target is ENCODE:
            return self.add_encode(node, before)
        if node.target is WRITEBACK:
            return self.add_write(node, unit(stage), weight_names(node), before)
        if meta(node).kind == Kind.STAGE:
            assert stage is not None
            cost = self.uses[stage].cost
            seconds = self.layout.spec.seconds(cost.work, noise=cost.noise)
            held = tuple(u for u in (unit(stage), decoded(stage)) if u in self.units)
            return self.task(node, f"body {stage}", Stream.COMPUTE, seconds, before, reads=held)
        return before

    def add_decode(self, node: fx.Node, before: tuple[str, ...]) -> tuple[str, ...]:
        """Add a weight to what a stage decodes, in memory of the stage's own."""
        stage, (name,) = meta(node).stage, weight_names(node)
        own, task, param = decoded(stage), f"decode {stage}", self.params[name]
        size, seconds = 0, 0.0
        if task in self.dag:
            size, seconds = self.units[own].bytes, self.dag.nodes[task]["task"].seconds
        self.units[own] = Unit(own, "decoded", size + padded(param.bytes))
        terms = mean_terms(self.directions, self.layout.fold_every) if param.trainable else 0
        moved = (str(param.dtype).removeprefix("torch."), 0, param.bytes + param.stored_bytes)
        seconds += self.layout.spec.seconds((moved,), fold=round(terms * self.numel(name)))
        held = (unit(stage),) if unit(stage) in self.units else ()
        fields = {"fills": own, "reads": held}
        return self.task(
            self.nodes.get(task, node), task, Stream.COMPUTE, seconds, before, **fields
        )

    def add_encode(self, node: fx.Node, before: tuple[str, ...]) -> tuple[str, ...]:
        """Add a weight to what a stage encodes, into its slot or where the weight stands."""
        stage, (name,) = meta(node).stage, weight_names(node)
        task, param = f"encode {stage}", self.params[name]
        seconds = self.dag.nodes[task]["task"].seconds if task in self.dag else 0.0
        moved = (str(param.dtype).removeprefix("torch."), 0, param.bytes + param.stored_bytes)
        seconds += self.layout.spec.seconds((moved,)) / self.layout.fold_every
        held = (unit(stage),) if unit(stage) in self.units else ()
        fields = {"writes": held, "reads": (decoded(stage),)}
        return self.task(
            self.nodes.get(task, node), task, Stream.COMPUTE, seconds, before, **fields
        )

    def fetch_at_once(
        self, node: fx.Node, name: str, cells: tuple[str, ...], before: tuple[str, ...]
    ) -> tuple[str, ...]:
        seconds = self.seconds(name, self.inward)
        fields = {"fills": name, "loads": cells}
        return self.task(node, f"fetch {name}", self.inward, seconds, before, **fields)

    def fetch_staged(
        self, node: fx.Node, name: str, cells: tuple[str, ...], before: tuple[str, ...]
    ) -> tuple[str, ...]:
        buffer = self.staging(name, "in")
        seconds = self.seconds(name, Stream.READ)
        fields = {"fills": buffer, "loads": cells}
        read = self.task(node, f"read {name}", Stream.READ, seconds, before, **fields)
        seconds = self.seconds(name, Stream.TO_DEVICE)
        fields = {"fills": name, "reads": (buffer,)}
        return self.task(node, f"fetch {name}", Stream.TO_DEVICE, seconds, read, **fields)

    def write_at_once(
        self, node: fx.Node, name: str, cells: tuple[str, ...], before: tuple[str, ...]
    ) -> tuple[str, ...]:
        seconds = self.seconds(name, self.outward) / self.layout.fold_every
        fields = {"reads": (name,), "stores": cells}
        return self.task(node, f"writeback {name}", self.outward, seconds, before, **fields)

    def write_staged(
        self, node: fx.Node, name: str, cells: tuple[str, ...], before: tuple[str, ...]
    ) -> tuple[str, ...]:
        buffer = self.staging(name, "out")
        seconds = self.seconds(name, Stream.TO_HOST) / self.layout.fold_every
        fields = {"fills": buffer, "reads": (name,)}
        save = self.task(node, f"writeback {name}", Stream.TO_HOST, seconds, before, **fields)
        seconds = self.seconds(name, Stream.WRITE) / self.layout.fold_every
        fields = {"reads": (buffer,), "stores": cells}
        return self.task(node, f"write {name}", Stream.WRITE, seconds, save, **fields)

    def staging(self, name: str, way: str) -> str:
        """Add a buffer in pinned host memory for a unit on its way."""
        buffer = f"{name} {way}"
        self.units[buffer] = Unit(buffer, "staging", self.units[name].bytes)
        return buffer

    def task(
        self,
        node: fx.Node,
        name: str,
        stream: Stream,
        seconds: float,
        before: Iterable[str],
        **fields: Any,
    ) -> tuple[str, ...]:
        self.dag.add_node(name, task=Task(name, stream, seconds, **fields))
        self.dag.add_edges_from((b, name) for b in before)
        self.nodes[name] = node
        return (name,)

    def seconds(self, name: str, stream: Stream) -> float:
        """Return how long a unit takes on a transfer stream, while the other way is busy too."""
        spec = self.layout.spec
        disk = stream in (Stream.READ, Stream.WRITE)
        both = spec.disk_both if disk else spec.link_both
        alone = {
            Stream.READ: spec.read,
            Stream.WRITE: spec.write,
            Stream.TO_DEVICE: spec.to_device,
            Stream.TO_HOST: spec.to_host,
        }[stream]
        return self.units[name].bytes / min(alone, both / 2)

    def numel(self, name: str) -> int:
        return self.params[name].bytes // self.params[name].dtype.itemsize


def decoded(stage: int | str | None) -> str:
    """Name the memory of what a stage decodes."""
    return f"{stage} decoded"


def unit(stage: int | None) -> str:
    """Name the slot memory of a stage."""
    return str(stage)


def add_refills(gm: fx.GraphModule, found: scheduling.Schedule) -> int:
    """Let a fetch use the tokens of the releases whose slots it fills anew in the same step."""
    releases = {unit(meta(n).stage): n for n in gm.graph.nodes if n.target is RELEASE}
    fetches = sorted(
        (n for n in gm.graph.nodes if n.target is FETCH),
        key=lambda n: found.start[f"fetch {unit(meta(n).stage)}"],
    )
    occupied: list[tuple[int, int, str]] = []
    count = 0
    for node in fetches:
        name = unit(meta(node).stage)
        begin = found.offsets[name]
        end = begin + found.units[name].bytes
        before = [u for a, b, u in occupied if a < end and begin < b]
        node.args = (node.args[0], [releases[u] for u in before])
        occupied = [x for x in occupied if x[2] not in before] + [(begin, end, name)]
        count += bool(before)
    return count


def in_order_of_start(
    gm: fx.GraphModule, nodes: dict[str, fx.Node], found: scheduling.Schedule
) -> None:
    """Reorder the graph by the predicted start of its tasks, every edge kept."""
    start = {node: found.start[name] for name, node in reversed(nodes.items())}
    rank = {n: i for i, n in enumerate(gm.graph.nodes)}
    body = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    edges = nx.DiGraph()
    edges.add_nodes_from(body)
    edges.add_edges_from(
        (s, n) for n in body for s in n.all_input_nodes if s in rank and s in edges
    )
    ready: dict[fx.Node, float] = {}
    for node in nx.topological_sort(edges):  # what is no task follows what it uses
        latest = max((ready[s] for s in edges.predecessors(node)), default=0.0)
        ready[node] = max(latest, start.get(node, latest))
    anchor = output(gm)
    for node in nx.lexicographical_topological_sort(edges, key=lambda n: (ready[n], rank[n])):
        anchor.prepend(node)
