"""What a model holds, and what its forward takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from zograph.errors import BatchError, ModelError
from zograph.ir import ParamInfo
from zograph.noise import parameter_key


def parameter_table(model: nn.Module) -> dict[str, ParamInfo]:
    """List the model's distinct parameters under their first names.

    Raises
    ------
    ModelError
        If a trainable parameter is not of a real floating dtype, or none is trainable.
    """
    table = {}
    for name, p in model.named_parameters():
        if p.requires_grad and not p.is_floating_point():
            raise ModelError(
                f"parameter {name!r} is trainable but {p.dtype}: zeroth-order steps move real "
                f"floating-point weights only. Call .requires_grad_(False) on it, or store it "
                f"as two real parameters."
            )
        decay = p.ndim > 1 and not name.endswith("bias")
        shape, key = tuple(p.shape), parameter_key(name)
        table[name] = ParamInfo(name, shape, p.dtype, p.requires_grad, decay, key)
    if not any(p.trainable for p in table.values()):
        raise ModelError(
            f"{type(model).__name__} has no trainable parameter. Set requires_grad on those "
            f"that the step should move."
        )
    return table


def check_keys(function: Callable[..., Any], batch: Mapping[str, Any], skip: int = 0) -> None:
    """Refuse a batch with missing, unknown or evidently misspelt keys.

    Raises
    ------
    BatchError
        With the accepted names and the closest match.
    """
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    where = getattr(function, "__qualname__", str(function))
    for key in batch:
        close = difflib.get_close_matches(key, [n for n in names if n not in batch], 1, 0.8)
        if key not in names and (close or not open_ended):
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise BatchError(f"{where} takes no {key!r}.{meant} It takes: {', '.join(names)}.")
    for p in parameters:
        required = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if required and p.name not in batch:
            raise BatchError(f"the batch lacks {p.name!r}, which {where} needs.")


def fits(function: Callable[..., Any], batch: Mapping[str, Any]) -> bool:
    """Whether ``function(model, **batch)`` has all its arguments."""
    try:
        inspect.signature(function).bind(None, **batch)
    except TypeError:
        return False
    return True
