"""Which operators draw random numbers."""

from __future__ import annotations

import torch
from torch import fx


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers (attention with dropout_p = 0 does not)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for i, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(given != 0.0)
    return True
