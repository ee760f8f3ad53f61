"""Captures shared between equal models: tests that stream a model many times capture it once.

A capture holds no weights, and is a function of the model's structure, how its tables are cut, the
signature and a few options (docs/numerics.md, clause 3). Capturing itself is tested where nothing
is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from zograph import pieces
from zograph.capture import Capture, capture
from zograph.ir import clone
from zograph.signature import Signature

Known = dict[tuple[Any, ...], Capture]


def structure(model: nn.Module) -> tuple[Any, ...]:
    """What a capture depends on in a model."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    owners: dict[int, str] = {}
    described = [
        (name, owners.setdefault(id(t), name), tuple(t.shape), t.dtype, t.device, t.requires_grad)
        for name, t in tensors
    ]
    config = getattr(model, "config", None)
    return type(model), repr(model), str(config), tuple(described)


def shared(known: Known) -> Any:
    """Return a function that captures as `zograph.capture.capture` does, equal models once."""

    def capture_once(
        model: nn.Module, batch: Mapping[str, Any], sig: Signature, **options: Any
    ) -> Capture:
        cut = (pieces.LEAST, pieces.NUMBERED)
        key = (structure(model), cut, sig, *sorted(options.items(), key=lambda item: item[0]))
        if key not in known:
            known[key] = capture(model, batch, sig, **options)
        found = known[key]
        return replace(found, gm=clone(found.gm), constants=dict(found.constants))

    return capture_once
