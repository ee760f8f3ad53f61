"""Which compiled graph serves a batch; captures and compiles it at the first need."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from zograph.bounds import Bound, check_bounds, find_bounds
from zograph.capture import Capture, LossFn, capture
from zograph.errors import CaptureError
from zograph.ir import info
from zograph.observers import Observers
from zograph.options import Options
from zograph.parameters import check_keys
from zograph.passes import PassContext
from zograph.pipeline import run
from zograph.runtime import Program
from zograph.signature import Signature, flatten, signatures, sizes

MANY_CAPTURES = 8


@dataclass(eq=False)
class Compiled:
    """One compiled graph with what it takes to feed it."""

    capture: Capture
    program: Program
    bounds: tuple[Bound, ...]
    keys: dict[str, torch.Tensor]
    """The tables of noise keys, by the name of the input that takes them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds for ``capture`` and for each pass by name."""


class Graphs:
    """The captures of one model, by signature.

    Which graph serves a batch depends on that batch alone: the levels of
    :mod:`zograph.signature` are tried in order, and a capture's success is a function of
    its signature.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self.options = options
        self.constants: dict[str, torch.Tensor] = {}
        self.last: Compiled | None = None
        self._known: dict[tuple[Signature, bool, bool], Compiled | CaptureError] = {}
        self._warned = False

    def training(self, batch: Mapping[str, Any]) -> Compiled:
        """Return the two-branch graph for a batch.

        Raises
        ------
        BatchError, CaptureError
            If the batch does not fit the model, or no level gives a graph.
        """
        loss_fn = self.options.loss_fn
        if loss_fn is None:
            check_keys(self.model.forward, batch)
        else:
            check_keys(loss_fn, batch, skip=1)
        return self._serve(batch, loss_fn, dual=True)

    def evaluation(self, batch: Mapping[str, Any], loss_fn: LossFn | None) -> Compiled:
        """Return the plain forward graph for a batch; labels are optional."""
        if loss_fn is None:
            check_keys(self.model.forward, batch)
        return self._serve(batch, loss_fn, dual=False)

    def _serve(self, batch: Mapping[str, Any], loss_fn: LossFn | None, *, dual: bool) -> Compiled:
        failure: CaptureError | None = None
        for signature in signatures(batch, dynamic=self.options.dynamic):
            key = (signature, dual, loss_fn is None)
            found = self._known.get(key)
            if found is None:
                try:
                    found = self._compile(batch, signature, loss_fn, dual)
                except CaptureError as error:
                    found = error
                self._known[key] = found
                self._warn_of_many()
            if isinstance(found, CaptureError):
                failure = found
            elif found.capture.admits(sizes(signature, batch)):
                self.last = found
                return found
        assert failure is not None, "the static level admits its own batch"
        raise failure

    def _warn_of_many(self) -> None:
        count = sum(isinstance(c, Compiled) for c in self._known.values())
        if count > MANY_CAPTURES and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.model).__name__} has been captured for {count} signatures, each "
                f"compiled by itself. Pad batches to a few fixed shapes.",
                stacklevel=4,
            )

    def _compile(
        self, batch: Mapping[str, Any], signature: Signature, loss_fn: LossFn | None, dual: bool
    ) -> Compiled:
        options, start = self.options, time.perf_counter()
        captured = capture(
            self.model,
            batch,
            signature,
            loss_fn=loss_fn,
            want_loss=dual,
            device=options.device,
            compute_dtype=options.compute_dtype,
        )
        seconds = {"capture": time.perf_counter() - start}
        for name, tensor in captured.constants.items():
            self.constants[name] = tensor.to(options.device)
        ctx = PassContext(options.distribution, options.backend)
        passes = options.passes if dual else options.passes.for_evaluation()
        bounds = find_bounds(captured.gm)
        observers = Observers()
        gm = run(captured.gm, passes, ctx, observers)
        seconds.update(observers.timings)
        captured.gm = gm
        return Compiled(captured, Program(gm), bounds, key_tables(gm), seconds)

    def leaves(self, compiled: Compiled, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch's leaves by path, tensors on the device, indices checked.

        Raises
        ------
        BatchError
            If an index on the CPU is outside the table that it indexes.
        """
        pairs, _ = flatten(batch)
        check_bounds(compiled.bounds, dict(pairs))
        device = self.options.device
        return {p: x.to(device) if isinstance(x, torch.Tensor) else x for p, x in pairs}

    def output(self, compiled: Compiled, results: tuple[Any, ...]) -> Any:
        """Rebuild the model's own output from a graph's flat results."""
        record = info(compiled.capture.gm)
        constants = iter(record.out_constants)
        leaves = [next(constants) if i is None else results[i] for i in record.out_leaves]
        assert record.out_spec is not None
        return pytree.tree_unflatten(leaves, record.out_spec)


def key_tables(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return the int64 noise keys of each stage's parameters, by input name."""
    record = info(gm)
    return {
        f"keys.{stage}": torch.tensor([record.params[n].key for n in names], dtype=torch.int64)
        for stage, names in record.keys.items()
    }
