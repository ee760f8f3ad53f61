"""partition: cut the graph into stages at the model's repeated blocks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
import torch
from torch import fx

from zograph.fixed_points.nodes import is_of_solve, is_solve
from zograph.ir import (
    Kind,
    ParamInfo,
    annotate,
    depends_on,
    info,
    is_shape,
    meta,
    op_name,
    placeholders,
)
from zograph.passes.base import Contract, Pass, PassContext, PassResult

FIRST = 1
"""Number of the first stage; 0 is kept for what :class:`Hoist` gathers."""

Stack = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Partition(Pass):
    """Tag every node with the stage that runs it.

    Before::

        %layer_norm: f32[s0, 8] = aten.layer_norm(%add, ...)     # in layers.0
        %linear: f32[s0, 8] = aten.linear(%layer_norm, %fc1)     # in layers.0

    After::

        %layer_norm: f32[s0, 8] = aten.layer_norm(%add, ...)     # stage=2
        %linear: f32[s0, 8] = aten.linear(%layer_norm, %fc1)     # stage=2

    A block is a child of a list of modules, two of which are of one class with submodules
    and weights (found from the module stack that export records at every call). Where the
    outermost such list holds no two blocks of equal structure but a list inside does, the
    inner one is taken. What stands between blocks gets stages of its own, and so does each piece
    of a large table, and each fixed point with its results. Where the context sets a `cut`, stages
    are cut further between operators, so that the weights of one stage take at most that many
    bytes, or those of a single operator.

    Requires: ``normalized``. Ensures: fact ``partitioned``; stage numbers grow along every
    edge (cycles between blocks are merged by networkx condensation); nodes stand in stage
    order; ``GraphInfo.stages`` names each stage. Numerics: bitwise. Cost: O(nodes).
    Raises: nothing; a model without blocks is one stage.
    """

    name: ClassVar[str] = "partition"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"normalized"}), provides=frozenset({"partitioned"})
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if any(meta(n).stage is not None for n in gm.graph.nodes):
            return PassResult(gm, False, ("already partitioned",))
        nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        weighted = depends_on(placeholders(gm, Kind.PARAMETER))
        labels = label_blocks([n for n in nodes if n in weighted])
        stage_of, names = number_stages(nodes, labels)
        stage_of, names = cut_stages(nodes, stage_of, names, ctx.cut, info(gm).params)
        glue = glue_nodes(nodes)
        for node in nodes:
            annotate(node, stage=None if node in glue else stage_of[node])
        in_stage_order(gm, stage_of)
        info(gm).stages = names
        gm.recompile()
        return PassResult(gm, True, (f"{len(names)} stages",))


def containers(stack: Stack) -> list[tuple[str, str]]:
    """List (container path, block path) for each numbered module on the way in."""
    found = []
    for path, _ in stack:
        match = re.fullmatch(r"(.*)\.(\d+)(@\d+)?", path)
        if match:
            found.append((match[1], path))
    return found


def label_blocks(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Map nodes inside a repeated block to the path of that block's call."""
    members: dict[str, dict[str, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    inside: dict[str, str | None] = {}
    classes: dict[str, str] = {}
    for node in nodes:
        stack, outer = meta(node).module, None
        classes.update(stack)
        for container, block in containers(stack):
            members[container][block].append(node)
            inside.setdefault(container, outer)
            outer = container
    repeated = {c: blocks for c, blocks in members.items() if is_repeated(blocks, classes)}
    uniform = {c for c, blocks in repeated.items() if has_equal_pair(blocks.values())}

    def outer_of(container: str) -> list[str]:
        chain, at = [], inside[container]
        while at is not None:
            chain.append(at)
            at = inside[at]
        return chain

    chosen: dict[str, None] = {}
    for container in repeated:  # outermost first: a stack lists outer modules first
        above = [c for c in outer_of(container) if c in repeated]
        blocked = any(c in chosen for c in above)
        better_inside = container not in uniform and any(container in outer_of(c) for c in uniform)
        if not blocked and not better_inside:
            chosen[container] = None
    return {n: b for c in chosen for b, found in repeated[c].items() for n in found}


def is_repeated(blocks: dict[str, list[fx.Node]], classes: dict[str, str]) -> bool:
    """Whether two blocks are of one class that has submodules and weights."""
    count: dict[str, int] = defaultdict(int)
    for block, nodes in blocks.items():
        has_children = any(meta(n).module and meta(n).module[-1][0] != block for n in nodes)
        weights = any(s.op == "placeholder" for n in nodes for s in n.all_input_nodes)
        if has_children and weights:
            count[classes[block]] += 1
    return any(n >= 2 for n in count.values())


def has_equal_pair(blocks: Iterable[list[fx.Node]]) -> bool:
    """Whether two blocks compute the same operators on the same shapes and edges."""
    forms = [structure(nodes) for nodes in blocks]
    return len(set(forms)) < len(forms)


def structure(nodes: list[fx.Node]) -> tuple[Any, ...]:
    """Describe a list of nodes up to renaming: operators, shapes, edges, external inputs."""
    index: dict[fx.Node, int] = {n: i for i, n in enumerate(nodes)}
    external: dict[fx.Node, int] = {}

    def show(arg: Any) -> str:
        if arg in index:
            return f"%{index[arg]}"
        return f"in{external.setdefault(arg, len(external))}:{form(arg.meta['val'])}"

    return tuple(
        (op_name(n), str(fx.node.map_arg((n.args, n.kwargs), show)), form(n.meta["val"]))
        for n in nodes
    )


def form(val: Any) -> str:
    """Describe a fake value: dtype, shape and strides; of a cell, what it computes."""
    if isinstance(val, fx.GraphModule):
        return str(body_form(val))
    if isinstance(val, torch.Tensor):
        return f"{val.dtype}{tuple(val.shape)}{tuple(val.stride())}"
    if isinstance(val, (tuple, list)):
        return str([form(v) for v in val])
    return str(val)


def body_form(body: fx.GraphModule) -> tuple[Any, ...]:
    """Describe a body up to the names of its nodes: equal forms compile to equal code."""
    nodes = list(body.graph.nodes)
    inputs = tuple(form(n.meta["val"]) for n in nodes if n.op == "placeholder")
    attributes = tuple(id(getattr(body, str(n.target))) for n in nodes if n.op == "get_attr")
    inside = [n for n in nodes if n.op not in ("placeholder", "get_attr", "output")]
    index = {n: i for i, n in enumerate(nodes)}
    uses = tuple(tuple(index[s] for s in n.all_input_nodes) for n in nodes)
    return inputs, attributes, structure(inside), uses


def number_stages(
    nodes: list[fx.Node], labels: dict[fx.Node, str]
) -> tuple[dict[fx.Node, int], dict[int, str]]:
    """Give each node a stage number that grows along every edge, and name the stages.

    Nodes outside blocks join the gap behind the last block that reaches them; casts and
    views of weights, which nothing but weights reaches, join their first user.
    """
    in_order = dict.fromkeys(labels[n] for n in nodes if n in labels)
    position = {label: i for i, label in enumerate(in_order)}
    slot: dict[fx.Node, int] = {}  # block i -> 2 i + 1, the gap behind it -> 2 i + 2
    for node in nodes:
        before = [slot[s] for s in node.all_input_nodes if s in slot]
        latest = max(before, default=0)
        if node in labels:
            slot[node] = 2 * position[labels[node]] + 1
        else:
            slot[node] = latest + latest % 2
    alone = weight_only(nodes)
    for node in reversed(nodes):
        if node in alone and node not in labels:
            slot[node] = min((slot[u] for u in node.users if u in slot), default=slot[node])

    edges = nx.DiGraph()
    edges.add_nodes_from(sorted(set(slot.values())))
    edges.add_edges_from((slot[s], slot[n]) for n in nodes for s in n.all_input_nodes if s in slot)
    edges.remove_edges_from(nx.selfloop_edges(edges))
    merged = nx.condensation(edges)
    least = {c: min(merged.nodes[c]["members"]) for c in merged}
    order = list(nx.lexicographical_topological_sort(merged, key=least.__getitem__))
    rank = {c: FIRST + i for i, c in enumerate(order)}
    of_slot = {m: rank[c] for c in merged for m in merged.nodes[c]["members"]}
    paths = list(position)
    names = {}
    for component in order:
        blocks = sorted(m for m in merged.nodes[component]["members"] if m % 2)
        inner = [paths[m // 2].removeprefix("L__self__").removeprefix("model.") for m in blocks]
        names[rank[component]] = ", ".join(inner) or gap_name(least[component], len(paths))
    return {n: of_slot[s] for n, s in slot.items()}, names


def cut_stages(
    nodes: list[fx.Node],
    stage_of: dict[fx.Node, int],
    names: dict[int, str],
    cut: int | None,
    params: Mapping[str, ParamInfo],
) -> tuple[dict[fx.Node, int], dict[int, str]]:
    """Cut stages into parts whose weights take at most `cut` bytes, or serve one operator.

    Without a `cut`, only the pieces of tables are cut from each other, and fixed points from what
    stands around them.
    """
    alone = weight_only(nodes)
    parts: dict[int, list[list[fx.Node]]] = {}
    for stage in names:
        parts[stage] = [[]]
        held: dict[fx.Node, int] = {}
        solving = False
        for node in nodes:
            if stage_of[node] != stage or node in alone:
                continue
            weights = weights_of(node, alone)
            border = is_solve(node) or (solving and not is_of_solve(node))
            solving = is_of_solve(node)
            if (parts[stage][-1] and border) or (held and is_cut(held, weights, cut, params)):
                parts[stage].append([])
                held = {}
            held |= weights
            parts[stage][-1].append(node)
    number, cut_stage, cut_names = FIRST, {}, {}
    for stage, pieces in parts.items():
        for i, piece in enumerate(pieces):
            part = f", part {i + 1} of {len(pieces)}" if len(pieces) > 1 else ""
            cut_names[number] = f"{names[stage]}{part}"
            cut_stage.update(dict.fromkeys(piece, number))
            number += 1
    for node in reversed(nodes):  # what only weights reach joins its first user
        if node in alone:
            users = [cut_stage[u] for u in node.users if u in cut_stage]
            cut_stage[node] = min(users, default=number - 1)
    return cut_stage, cut_names


def is_cut(
    held: dict[fx.Node, int],
    weights: dict[fx.Node, int],
    cut: int | None,
    params: Mapping[str, ParamInfo],
) -> bool:
    """Whether an operator's weights go into another part than those that are held."""

    def in_pieces(nodes: Iterable[fx.Node]) -> bool:
        return any(params[str(meta(n).name)].of is not None for n in nodes)

    new = weights.keys() - held.keys()
    if cut is not None and new and sum((held | weights).values()) > cut:
        return True
    return in_pieces(new) and in_pieces(held)


def weights_of(node: fx.Node, alone: set[fx.Node]) -> dict[fx.Node, int]:
    """Return the parameters that an operator uses, directly or through `alone`, with bytes."""
    found: dict[fx.Node, int] = {}
    stack = list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        if meta(source).kind == Kind.PARAMETER:
            val = source.meta["val"]
            found[source] = val.numel() * val.dtype.itemsize
        elif source in alone:
            stack.extend(source.all_input_nodes)
    return found


def weight_only(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes that nothing but parameters, buffers and constants reaches."""
    stored = (Kind.PARAMETER, Kind.BUFFER, Kind.CONSTANT)
    found: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if sources and all(s in found or meta(s).kind in stored for s in sources):
            found.add(node)
    return found


def glue_nodes(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return the size arithmetic: scalars computed from the sizes of inputs alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        if is_shape(node) and all(
            s.op == "placeholder" or s in found for s in node.all_input_nodes
        ):
            found.add(node)
    return found


def gap_name(slot: int, blocks: int) -> str:
    """Name a stage between blocks."""
    if not blocks:
        return "model"
    return "head" if slot == 2 * blocks else "stem" if slot == 0 else f"between {slot // 2}"


def in_stage_order(gm: fx.GraphModule, stage_of: dict[fx.Node, int]) -> None:
    """Reorder the nodes by stage, keeping the old order within a stage."""
    nodes = [n for n in gm.graph.nodes if n in stage_of]
    ordered = sorted(nodes, key=lambda n: 0 if meta(n).stage is None else stage_of[n])
    if ordered != nodes:
        out = gm.graph.output_node()
        for node in ordered:
            out.prepend(node)
