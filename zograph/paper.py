"""`zograph.plan`: what a step would take on a device, from a model's config alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import fx, nn

from zograph import schedule as scheduling
from zograph.capture import capture
from zograph.costs import check_sizes
from zograph.device import DeviceSpec
from zograph.errors import CaptureError
from zograph.formats import parse_transfer_dtype, with_format
from zograph.ir import ParamInfo, clone, info, module
from zograph.layout import Layout, Tier
from zograph.looks import shared_results
from zograph.memory import uncollected
from zograph.observers import Observers
from zograph.options import parse_memory
from zograph.passes import PassContext
from zograph.passes.schedule import Tasks
from zograph.pipeline import default_passes, run
from zograph.planner import Request, Ways, chosen
from zograph.plans import Plan, describe
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
    transfer_dtype: torch.dtype | str | None = None,
) -> Plan:
    """Plan a step on paper: no weight is made, read or moved.

    For several budgets or devices, :class:`Paper` captures the model once.

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
    loss_fn, directions, transfer_dtype
        As in :func:`zograph.compile`.

    Raises
    ------
    PlanError
        If the budget is too small; its `minimum` is the least that is enough.
    CaptureError
        If the model cannot be captured, or chooses sizes by what it computes.
    """
    paper = Paper(
        model_or_config,
        batch=batch,
        auto_class=auto_class,
        loss_fn=loss_fn,
        directions=directions,
        transfer_dtype=transfer_dtype,
    )
    return paper.plan(memory, device, storage)


class Paper:
    """A model's step on paper: captured and measured once, planned as often as asked.

    Parameters
    ----------
    model_or_config, batch, auto_class, loss_fn, directions, transfer_dtype
        As in :func:`plan`.

    Raises
    ------
    CaptureError
        If the model cannot be captured, or chooses sizes by what it computes.

    Examples
    --------
    >>> import torch, transformers
    >>> from zograph.device import DeviceSpec
    >>> config = transformers.OPTConfig(
    ...     vocab_size=64, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32,
    ...     num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
    ... )
    >>> tokens = torch.zeros(1, 16, dtype=torch.int64)
    >>> paper = Paper(config, batch={"input_ids": tokens, "labels": tokens})
    >>> card = DeviceSpec.preset("a100-40gb")
    >>> paper.plan("minimum", card).device_bytes < paper.plan(None, card).device_bytes
    True
    """

    def __init__(
        self,
        model_or_config: Any,
        *,
        batch: Mapping[str, Any],
        auto_class: Any = None,
        loss_fn: Any = None,
        directions: int = 1,
        transfer_dtype: torch.dtype | str | None = None,
    ) -> None:
        model = model_or_config
        if not isinstance(model, nn.Module):
            if auto_class is None:
                from transformers import AutoModelForCausalLM as auto_class
            model = empty_model(model, auto_class)
        self.directions = directions
        self._captured, frame = captured(model, batch, loss_fn)
        check_sizes(self._captured)
        form = parse_transfer_dtype(transfer_dtype, torch.device("cpu"))
        info(self._captured).params = with_format(info(self._captured).params, form)
        self._front, back = default_passes().replace("lower").split("offload")
        self._offload = back.split("schedule")[0]
        self._frames = (frame,) * directions
        self._ways: dict[bool, Ways] = {}
        self._offloaded: dict[Any, fx.GraphModule] = {}

    @property
    def params(self) -> dict[str, ParamInfo]:
        """The model's parameters by name."""
        return info(self._captured).params

    def plan(
        self,
        memory: int | float | str | None,
        device: DeviceSpec | None = None,
        storage: Tier = "host",
    ) -> Plan:
        """Plan the step under a budget; parameters and errors as in :func:`plan`."""
        return self.draft(memory, device, storage)[0]

    @uncollected()
    def draft(
        self,
        memory: int | float | str | None,
        device: DeviceSpec | None = None,
        storage: Tier = "host",
    ) -> tuple[Plan, scheduling.Schedule]:
        """Plan the step and return its schedule too."""
        spec = device or DeviceSpec.measure()
        budget = parse_memory(memory, spec.memory)
        request = Request(budget, self._frames, storage, spec)
        streamed = budget is not None or storage == "disk"
        by_rows = streamed and spec.kind == "cpu"
        with shared_results():
            layout = chosen(self.ways(by_rows), request)
            gm = self._moving(layout, by_rows)
        tasks = Tasks(gm, layout, self.directions)
        found = scheduling.schedule(tasks.dag, tasks.units, tasks.capacity())
        return describe(gm, layout, found), found

    def ways(self, by_rows: bool) -> Ways:
        """Return the ways to run the step, whether or not rows of stored tables can be read."""

        def outlined(cut: int | None) -> fx.GraphModule:
            ctx = PassContext(directions=self.directions, cut=cut, by_rows=by_rows)
            return run(clone(self._captured), self._front, ctx, Observers.silent())

        return self._ways.setdefault(by_rows, Ways(outlined, self._frames))

    def _moving(self, layout: Layout, by_rows: bool) -> fx.GraphModule:
        """Return the graph with the transfers of a layout; rates have no say in them."""
        key = (by_rows, layout.cut, layout.pair, layout.resident)
        if key not in self._offloaded:
            gm = twin(self.ways(by_rows).at(layout.cut)[0].gm)
            ctx = PassContext(
                directions=self.directions, cut=layout.cut, layout=layout, by_rows=by_rows
            )
            self._offloaded[key] = run(gm, self._offload, ctx, Observers.silent())
        return self._offloaded[key]


def twin(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy an outlined graph with its stage bodies; fake values are shared, records are not."""
    result = clone(gm)
    for name, body in gm.named_children():
        if isinstance(body, fx.GraphModule):
            result.set_submodule(name, module(body, copy.deepcopy(body.graph)))
    return result


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
        if found.admits(batch):
            known = sizes(signature, batch)
            return found.gm, {symbol: known[name] for name, symbol in found.symbols.items()}
    assert failure is not None, "the last level admits its own batch"
    raise failure
