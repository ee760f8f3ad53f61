"""Which calls draw random numbers."""

from __future__ import annotations

import torch
from torch import fx

OFF = {"train": False, "training": False, "dropout_p": 0.0, "dropout": 0.0, "p": 0.0}
"""Arguments whose value switches an operator's randomness off."""


def is_random(node: fx.Node) -> bool:
    """Whether the call draws from a generator (inactive dropout does not)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    given = defaults | given
    return not any(name in given and given[name] == off for name, off in OFF.items())
