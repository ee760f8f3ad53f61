"""Values that index a table are checked before a step, while the message can still be clear.

An index beyond an embedding or a class beyond the logits would end in an abort of compiled
code or in a device-side assertion. The graph says which inputs index what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from zograph.errors import BatchError
from zograph.ir import Kind, meta

aten = torch.ops.aten

# Operators whose result holds elements of their first argument, and fill values, only.
MOVES = {
    aten.clone.default,
    aten.constant_pad_nd.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.pad.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.to.dtype,
    aten.unsqueeze.default,
    aten.view.default,
    aten._to_copy.default,
}


@dataclass(frozen=True)
class Bound:
    """``0 <= value < limit`` or ``value == ignore`` for every value of one input."""

    path: str
    limit: int
    ignore: int | None
    use: str


def find_bounds(gm: fx.GraphModule) -> tuple[Bound, ...]:
    """List the inputs that index a table of fixed size, directly or after moves."""
    found = {}
    for node in gm.graph.nodes:
        if node.target is aten.embedding.default:
            table, index = node.args[0], node.args[1]
            size, ignore, use = table.meta["val"].shape[0], None, "an embedding"
        elif node.target is aten.cross_entropy_loss.default:
            logits, index = node.args[0], node.args[1]
            size = logits.meta["val"].shape[1 if logits.meta["val"].ndim > 1 else 0]
            ignore = node.args[4] if len(node.args) > 4 else -100
            use = "the classes of the loss"
        else:
            continue
        source = origin(index)
        if source is not None and isinstance(size, int) and integral(index):
            path = str(meta(source).name)
            found[path, use] = Bound(path, size, ignore, use)
    return tuple(found.values())


def integral(node: fx.Node) -> bool:
    """Whether the node holds integers."""
    dtype = node.meta["val"].dtype
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def origin(node: fx.Node) -> fx.Node | None:
    """Return the input whose values the node moves around, if that is all that happens."""
    while node.target in MOVES:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
    return node if meta(node).kind == Kind.INPUT and node.op == "placeholder" else None


def check_bounds(bounds: Iterable[Bound], leaves: Mapping[str, Any]) -> None:
    """Refuse a batch that indexes outside a table. Tensors on a device are not read.

    Raises
    ------
    BatchError
        With the key, the value and the admitted range.
    """
    for bound in bounds:
        values = leaves[bound.path]
        if not isinstance(values, torch.Tensor) or values.device.type != "cpu":
            continue
        bad = (values < 0) | (values >= bound.limit)
        if bound.ignore is not None:
            bad &= values != bound.ignore
        if bool(bad.any()):
            value = int(values[bad][0])
            extra = f" (or {bound.ignore} to ignore)" if bound.ignore is not None else ""
            raise BatchError(
                f"batch{bound.path} holds {value}, but {bound.use} takes 0 to "
                f"{bound.limit - 1}{extra}. Check the tokenizer, num_labels or vocab_size."
            )
