"""Large tables in pieces: rows of an embedding or a head that are stored and moved on their own.

A table outside of the repeated blocks may be many times larger than any weight inside them, and
would then decide how much memory a step takes. So it is a row of pieces, each no larger than the
largest weight of a block. A piece has a place of its own in store, slots and graph; its noise goes
on where the piece before it ends, so the parameter's noise and values are what they would be in
one. Where tables are cut follows from the model alone, never from a budget.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from zograph.ir import KEY, Kind, NodeMeta, ParamInfo, fake_mode, info, meta, placeholders

LEAST = 16 << 20
"""Bytes up to which a table is left whole."""

NUMBERED = re.compile(r"(^|\.)\d+\.")
"""The name of a parameter inside a list of modules."""

CAST = torch.ops.aten._to_copy.default
CAT = torch.ops.aten.cat.default


def cut_tables(table: Mapping[str, ParamInfo]) -> dict[str, ParamInfo]:
    """Put pieces in the place of the large tables among a model's parameters.

    Examples
    --------
    >>> from zograph.ir import ParamInfo
    >>> wte = ParamInfo("wte", (50_000, 1024), torch.float32, True, True, 7)
    >>> [(p.row, p.shape[0]) for p in cut_tables({"wte": wte}).values()][-2:]
    [(42306, 3846), (46152, 3848)]
    """
    inside = [p.bytes for name, p in table.items() if NUMBERED.search(name)]
    limit = max([LEAST, *inside])
    found: dict[str, ParamInfo] = {}
    for name, param in table.items():
        large = param.bytes > limit and len(param.shape) > 1 and not NUMBERED.search(name)
        count = min(-(-param.bytes // limit), param.shape[0]) if large else 1
        found |= {p.name: p for p in rows(param, count)} if count > 1 else {name: param}
    return found


def rows(param: ParamInfo, count: int) -> list[ParamInfo]:
    """Cut a parameter into `count` pieces of equally many rows; the last one may have fewer."""
    height = -(-param.shape[0] // count)
    found = []
    for row in range(0, param.shape[0], height):
        end = min(row + height, param.shape[0])
        shape = (end - row, *param.shape[1:])
        name = f"{param.name}[{row}:{end}]"
        found.append(replace(param, name=name, shape=shape, of=param.name, row=row))
    return found


def enter_in_pieces(gm: fx.GraphModule) -> None:
    """Let the large tables of a captured graph enter in pieces, put together behind their casts."""
    pieces: dict[str, list[ParamInfo]] = {}
    info(gm).params = cut_tables(info(gm).params)
    for param in info(gm).params.values():
        if param.of is not None:
            pieces.setdefault(param.of, []).append(param)
    for node in placeholders(gm, Kind.PARAMETER):
        if (parts := pieces.get(str(meta(node).name))) is not None:
            _replace(gm, node, parts)


def _replace(gm: fx.GraphModule, table: fx.Node, parts: list[ParamInfo]) -> None:
    nodes = []
    for part in parts:
        with gm.graph.inserting_before(table), fake_mode(gm):
            node = gm.graph.placeholder(f"{table.name}_{part.row}")
            node.meta["val"] = torch.empty(
                part.shape, dtype=part.dtype, device=table.meta["val"].device
            )
        node.meta[KEY] = replace(meta(table), name=part.name)
        nodes.append(node)
    for user in list(table.users):
        if user.target is CAST and set(user.kwargs) == {"dtype"}:
            casts = []
            for node in nodes:
                with gm.graph.inserting_before(user):
                    casts.append(gm.graph.node_copy(user, lambda _, n=node: n))  # type: ignore[misc]
                dtype = user.meta["val"].dtype
                casts[-1].meta = {KEY: meta(user), "val": node.meta["val"].to(dtype)}
            _whole(gm, user, casts)
    if table.users:
        _whole(gm, table, nodes)
    else:
        gm.graph.erase_node(table)


def _whole(gm: fx.GraphModule, node: fx.Node, parts: list[fx.Node]) -> None:
    """Put a table together from its pieces in the place of the one that stood for it."""
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    with gm.graph.inserting_before(first if node.op == "placeholder" else node):
        whole = gm.graph.call_function(CAT, (parts,))
    whole.meta = {"val": node.meta["val"], KEY: NodeMeta(source=f"capture<{node.name}")}
    node.replace_all_uses_with(whole)
    gm.graph.erase_node(node)


def pieces_of(node: object) -> list[fx.Node] | None:
    """Return the pieces, or their casts, that a node puts together, None if it is no such node."""
    if not isinstance(node, fx.Node) or node.target is not CAT or len(node.args) != 1:
        return None
    parts = list(node.all_input_nodes)
    bare = [p.all_input_nodes[0] if p.target is CAST else p for p in parts]
    whole = all(meta(p).kind == Kind.PARAMETER for p in bare)
    return parts if whole and len(parts) == len(node.args[0]) else None  # type: ignore[arg-type]


def has_rows(gm: fx.GraphModule, arg: object) -> bool:
    """Whether a node is a parameter of which rows can be read where it is stored."""
    if not isinstance(arg, fx.Node) or meta(arg).kind != Kind.PARAMETER:
        return False
    return info(gm).params[str(meta(arg).name)].by_rows
