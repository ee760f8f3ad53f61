"""normalize: one plain form for every captured graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zograph.errors import PassError
from zograph.ir import (
    Kind,
    annotate,
    call,
    evaluate,
    info,
    meta,
    op_name,
    output,
    placeholders,
)
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.printer import cells
from zograph.randomness import is_random

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}

# Operators that return their first argument unchanged whenever dtype, device, shape and
# strides come out the same.
COPIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.expand.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.view.default,
    aten._to_copy.default,
}

DROPOUTS = {
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
}

NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Normalize(Pass):
    """Drop what computes nothing, merge what computes the same, keep composite operators.

    Before::

        %a: f32[5, 8] = aten.linear(%x, %w)
        %b: f32[5, 8] = aten.dropout(%a, 0.1, False)
        %n: int(s0) = aten.sym_size.int(%b, 0)
        %c: f32[5, 8] = aten.view(%b, [%n, 8])

    After::

        %a: f32[5, 8] = aten.linear(%x, %w)

    Requires: a graph as :func:`zograph.capture.capture` leaves it. Ensures: fact
    ``normalized``; no assertion, alias, no-op cast, inactive dropout, dead or twice computed
    node; sizes of inputs are read once, at the top; a narrow loss is reduced in float32.
    Numerics: bitwise, except that a loss in float16 or bfloat16 becomes float32.
    Cost: O(nodes). Raises: PassError on an operator that draws random numbers.
    """

    name: ClassVar[str] = "normalize"
    contract: ClassVar[Contract] = Contract(provides=frozenset({"normalized"}), numerics="bitwise")

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        counts = {
            "assertions dropped": drop_assertions(gm),
            "copies dropped": drop_copies(gm),
            "sizes read once": share_sizes(gm),
        }
        reject_random(gm)
        counts["repeated nodes merged"] = merge_repeated(gm)
        counts["nodes of cells dropped"] = sum(normalize_cell(cell) for cell in cells(gm))
        counts["inputs of the loss cast to float32"] = reduce_loss_in_float32(gm)
        modified = gm.graph.eliminate_dead_code() or any(counts.values())
        gm.recompile()
        return PassResult(gm, modified, tuple(f"{n} {what}" for what, n in counts.items() if n))


def normalize_cell(cell: fx.GraphModule) -> int:
    """Do the same in the cell of a fixed point; return the number of nodes that are gone."""
    before = len(cell.graph.nodes)
    drop_assertions(cell)
    drop_copies(cell)
    reject_random(cell)
    merge_repeated(cell)
    cell.graph.eliminate_dead_code()
    cell.recompile()
    return before - len(cell.graph.nodes)


def drop_assertions(gm: fx.GraphModule) -> int:
    """Erase runtime assertions: what they guard was checked when the batch was matched."""
    found = [n for n in gm.graph.nodes if n.target in ASSERTIONS]
    for node in found:
        gm.graph.erase_node(node)
    return len(found)


def same_value(a: Any, b: Any) -> bool:
    """Whether two fake tensors agree in dtype, device, shape and strides for all sizes."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if (a.dtype, a.device, a.ndim) != (b.dtype, b.device, b.ndim):
        return False
    pairs = zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)
    return all(statically_known_true(x == y) for x, y in pairs)


def drop_copies(gm: fx.GraphModule) -> int:
    """Replace copies, no-op views and inactive dropout by their argument.

    Inactive dropout gives its argument as it is, though a trace may have noted other strides:
    what is computed from it is evaluated anew.
    """
    dropped, stale = 0, set[fx.Node]()
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node in stale:
            val = evaluate(node.target, node.args, node.kwargs)
            if not same_value(val, node.meta["val"]):
                node.meta["val"] = val
                stale |= set(node.users)
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        same = same_value(node.meta["val"], node.args[0].meta["val"])
        inactive = node.target in DROPOUTS and node.args[2] is False
        if inactive or (node.target in COPIES and same):
            stale |= set() if same else set(node.users)
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            dropped += 1
    return dropped


def share_sizes(gm: fx.GraphModule) -> int:
    """Read each symbolic size from one input, at the top, and use that everywhere."""
    readers: dict[Any, fx.Node] = {}
    wanted = [n for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    exprs = {n.meta["val"].node.expr for n in wanted}
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    for source in placeholders(gm, Kind.INPUT):
        val = source.meta["val"]
        for dim, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            expr = expression(size)
            if expr not in exprs or not expr.is_symbol or expr in readers:
                continue
            old = [n for n in source.users if n.target is aten.sym_size.int and n.args[1] == dim]
            if old:
                readers[expr] = old[0]
                first.prepend(old[0])
            else:
                with gm.graph.inserting_before(first):
                    args = (source, dim)
                    readers[expr] = call(gm.graph, aten.sym_size.int, args, source="normalize")
    replaced = 0
    for node in wanted:
        reader = readers.get(node.meta["val"].node.expr)
        if reader is not None and reader is not node and node.op != "placeholder":
            node.replace_all_uses_with(reader)
            gm.graph.erase_node(node)
            replaced += 1
    return replaced


def expression(size: Any) -> Any:
    """Return the sympy expression of a symbolic size, None of a fixed one."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def reject_random(gm: fx.GraphModule) -> None:
    """Refuse operators that draw random numbers: the two branches must see the same function."""
    for node in gm.graph.nodes:
        if is_random(node):
            where = meta(node).module[-1] if meta(node).module else ("the model", "")
            raise PassError(
                f"normalize: {op_name(node)} in {where[0]} ({where[1]}) draws random numbers in "
                f"eval mode. The losses of the two branches would differ by the draw. Remove it "
                f"or make the numbers an input of the batch."
            )


def merge_repeated(gm: fx.GraphModule) -> int:
    """Merge calls of the same operator on the same arguments (common subexpressions)."""
    seen: dict[Any, fx.Node] = {}
    merged = 0

    def freeze(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return tuple(freeze(x) for x in arg)
        if isinstance(arg, dict):
            return tuple(sorted((k, freeze(v)) for k, v in arg.items()))
        return arg if isinstance(arg, fx.Node) else (type(arg).__name__, str(arg))

    for node in list(gm.graph.nodes):
        if node.op != "call_function" or "empty" in op_name(node):
            continue
        key = (node.target, freeze(node.args), freeze(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            merged += 1
    return merged


def reduce_loss_in_float32(gm: fx.GraphModule) -> int:
    """Compute the scalar end of a narrow loss in float32.

    The end is made of the 0-dimensional nodes that lead to the loss; the wider tensors that
    they reduce (logits, say) are cast before the reduction.
    """
    out = output(gm)
    loss = out.args[0][0] if info(gm).has_loss else None  # type: ignore[index]
    if not isinstance(loss, fx.Node) or loss.meta["val"].dtype not in NARROW:
        return 0
    end: list[fx.Node] = []
    stack = [loss]
    while stack:
        node = stack.pop()
        val = node.meta["val"]
        scalar = isinstance(val, torch.Tensor) and val.ndim == 0 and val.dtype in NARROW
        if scalar and node.op == "call_function" and node not in end:
            end.append(node)
            stack.extend(node.all_input_nodes)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    cast: dict[fx.Node, fx.Node] = {}
    for node in sorted(end, key=order.__getitem__):
        for source in node.all_input_nodes:
            val = source.meta["val"]
            if isinstance(val, torch.Tensor) and val.dtype in NARROW and source not in end:
                if source not in cast:
                    with gm.graph.inserting_before(node):
                        cast[source] = call(
                            gm.graph,
                            aten._to_copy.default,
                            (source,),
                            {"dtype": torch.float32},
                            source=f"normalize<{node.name}",
                            module=meta(node).module,
                        )
                node.replace_input_with(source, cast[source])
        node.meta["val"] = evaluate(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        annotate(node, source=f"normalize<{node.name}")
    return len(cast)
