"""`zograph.plan`: what a step would take on a device, from a model's config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import transformers
from torch import fx, nn

from zograph.capture import capture
from zograph.device import DeviceSpec
from zograph.errors import CaptureError
from zograph.ir import clone
from zograph.observers import Observers
from zograph.options import parse_memory
from zograph.passes import PassContext
from zograph.pipeline import default_passes, run
from zograph.planner import Request, choose
from zograph.plans import Plan, plan_of
from zograph.signature import signatures, sizes


def plan(
    model_or_config: Any,
    *,
    batch: Mapping[str, Any],
    memory: int | float | str | None,
    device: DeviceSpec | None = None,
    storage: Literal["host", "disk"] = "host",
    auto_class: Any = None,
    loss_fn: Any = None,
    directions: int = 1,
) -> Plan:
    """Plan a step on paper: no weight is made, read or moved.

    Parameters
    ----------
    model_or_config
        A model (on any device, the meta device too), or a config of transformers; its `dtype`
        is the weights'.
    batch
        Only shapes and dtypes matter; tensors may be on the meta device.
    memory
        As in :func:`zograph.compile`; a fraction is of the device's memory.
    device
        By default this machine, measured.
    storage
        Where streamed weights live: ``host`` or ``disk``.
    auto_class
        For a config: ``transformers.AutoModelForCausalLM`` by default.
    loss_fn, directions
        As in :func:`zograph.compile`.

    Raises
    ------
    PlanError
        If the budget is too small; its `minimum` is the least that is enough.
    CaptureError
        If the model cannot be captured.
    """
    model = model_or_config
    if not isinstance(model, nn.Module):
        model = empty_model(model_or_config, auto_class or transformers.AutoModelForCausalLM)
    spec = device or DeviceSpec.measure()
    found, frame = captured(model, batch, loss_fn)
    front, back = default_passes().replace("lower").split("offload")

    def outlined(cut: int | None) -> fx.GraphModule:
        ctx = PassContext(directions=directions, cut=cut)
        return run(clone(found), front, ctx, Observers.silent())

    budget = parse_memory(memory, spec.memory)
    request = Request(budget, (frame,) * directions, storage, spec)
    layout = choose(outlined, request)
    ctx = PassContext(directions=directions, cut=layout.cut, layout=layout)
    gm = run(outlined(layout.cut), back, ctx, Observers.silent())
    return plan_of(gm)


def empty_model(config: Any, auto_class: Any) -> nn.Module:
    """Build a config's model without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = auto_class.from_config(config)
    return model.eval()


def captured(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: Any
) -> tuple[fx.GraphModule, dict[Any, int]]:
    """Capture a model's loss at the first level that serves a batch; return its sizes too."""
    failure: CaptureError | None = None
    for signature in signatures(batch):
        try:
            found = capture(model, batch, signature, loss_fn=loss_fn)
        except CaptureError as error:
            failure = error
            continue
        known = sizes(signature, batch)
        if found.admits(known):
            return found.gm, {symbol: known[name] for name, symbol in found.symbols.items()}
    assert failure is not None, "the static level admits its own batch"
    raise failure
