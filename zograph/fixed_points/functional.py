"""In-place operators of a traced cell become functional ones."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from zograph.errors import CaptureError


def make_functional(graph: fx.Graph) -> None:
    """Replace every operator that writes to its first argument by the one that does not.

    Before::

        %add: f32[2, 3] = aten.add.Tensor(%z0, %c0)
        %relu_: f32[2, 3] = aten.relu_(%add)

    After::

        %add: f32[2, 3] = aten.add.Tensor(%z0, %c0)
        %relu: f32[2, 3] = aten.relu(%add)

    Raises
    ------
    CaptureError
        If an operator writes to the state, to what the cell closes over, or to a tensor of which
        there are views, or has no functional form.
    """
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        written, functional = node.args[0], _functional(node.target)
        if functional is None or not isinstance(written, fx.Node) or not _is_private(written):
            raise CaptureError(
                f"the cell of a fixed point writes in place ({node.target}) to its state, to a "
                f"tensor that it closes over or to a view. Write new = old + change instead."
            )
        later = {n for n in written.users if n is not node and node < n}
        node.target = functional
        written.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def _functional(target: OpOverload) -> OpOverload | None:
    """Return the operator that returns what `target` writes to its first argument."""
    name, overload = target._opname, target._overloadname
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found = getattr(packet, overload, None)
    if not isinstance(found, OpOverload) or found._schema.is_mutable:
        return None
    same = [a.name for a in found._schema.arguments] == [a.name for a in target._schema.arguments]
    return found if same else None


def _is_private(node: fx.Node) -> bool:
    """Whether the cell has made the value, and nothing else in it shares its memory."""
    if node.op != "call_function" or _aliases(node):
        return False
    return not any(_aliases(u) for u in node.users if not _writes(u))


def _aliases(node: fx.Node) -> bool:
    """Whether a call's result may share memory with an argument."""
    if not isinstance(node.target, OpOverload):
        return True
    return any(r.alias_info is not None for r in node.target._schema.returns)
