"""Which compiled graph serves a batch; captures, plans and compiles it at the first need."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from zograph.bounds import Bound, check_bounds, find_bounds
from zograph.capture import Capture, capture
from zograph.costs import check_sizes
from zograph.device import DeviceSpec
from zograph.elision import PERIODS, choose_period
from zograph.errors import CaptureError
from zograph.fixed_points.comparing import Choice
from zograph.fixed_points.comparing import choose as choose_solver
from zograph.ir import clone, info, meta
from zograph.layout import Layout
from zograph.looks import shared_results
from zograph.memory import give_back, keep_little, uncollected
from zograph.observers import Observers
from zograph.options import Options
from zograph.parameters import check_keys
from zograph.passes import PassContext
from zograph.passes.anderson import open_points
from zograph.passes.schedule import predicted_seconds
from zograph.pipeline import Pipeline, run
from zograph.planner import Request, choose
from zograph.runtime import Program, Runner
from zograph.signature import Signature, flatten, signatures, sizes
from zograph.traced import LossFn
from zograph.weights import Weights

MANY_CAPTURES = 8

Frames = tuple[dict[sympy.Symbol, int], ...]
"""The sizes of every forward that shares one pass through a graph."""

Key = tuple[Signature, bool, bool]
"""A signature, whether both branches are wanted, and whether the loss is the model's own."""


@dataclass(eq=False)
class Compiled:
    """One compiled graph with what it takes to feed it."""

    capture: Capture
    gm: fx.GraphModule
    runner: Runner
    keys: dict[str, torch.Tensor]
    """The tables of noise keys, by the name of the input that takes them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds for ``capture`` and for each pass by name."""


@dataclass(eq=False)
class Captured:
    """One captured graph, and what has been compiled of it."""

    capture: Capture
    bounds: tuple[Bound, ...]
    dual: bool
    seconds: float
    compiled: dict[Any, Compiled] = field(default_factory=dict)
    bodies: dict[Any, Any] = field(default_factory=dict)
    """Lowered stage bodies by their form: graphs cut alike share them."""

    def frame(self, batch: Mapping[str, Any]) -> dict[sympy.Symbol, int]:
        """Return the number for each symbol of the graph in a batch."""
        known = sizes(self.capture.signature, batch)
        return {symbol: known[name] for name, symbol in self.capture.symbols.items()}


class Graphs:
    """The captures of one model, by signature.

    Which graph serves a batch depends on that batch alone: the levels of
    :mod:`zograph.signature` are tried in order, and a capture's success is a function of
    its signature. Under a budget a graph is planned for the batch's sizes.

    Parameters
    ----------
    choices
        What was measured of fixed points before, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        weights: Weights,
        choices: Mapping[str, Choice] | None = None,
    ) -> None:
        self.model = model
        self.choices = dict(choices or {})
        """What was measured of fixed points that leave their solver open, by name."""
        self.options = options
        self.weights = weights
        self.last: Compiled | None = None
        self.decided = options.fold_every != "auto" or not self.streamed
        """Whether the fold period is known; ``auto`` is decided with the first step's plan."""
        self._known: dict[Key, list[Captured | CaptureError]] = {}
        """What each signature gave: one capture or error, or one for each set of decisions."""
        self._warned = False
        self._spec: DeviceSpec | None = None
        if options.device.type == "cpu":
            keep_little(options.memory)

    @property
    def streamed(self) -> bool:
        """Whether weights pass through a layout: a budget is set, or they live on a disk."""
        return self.options.memory is not None or self.weights.store.tier == "disk"

    @property
    def by_rows(self) -> bool:
        """Whether rows of a stored table can be read: into a GPU, tables go whole."""
        return self.streamed and self.options.device.type == "cpu"

    @property
    def spec(self) -> DeviceSpec:
        """What this machine can do, measured once and kept."""
        if self._spec is None:
            self._spec = DeviceSpec.measure(self.options.device, self.weights.folder)
        return self._spec

    def training(self, batch: Mapping[str, Any]) -> Captured:
        """Return the captured loss for a batch.

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

    def evaluation(self, batch: Mapping[str, Any], loss_fn: LossFn | None) -> Captured:
        """Return the captured plain forward for a batch; labels are optional."""
        if loss_fn is None:
            check_keys(self.model.forward, batch)
        return self._serve(batch, loss_fn, dual=False)

    def _serve(self, batch: Mapping[str, Any], loss_fn: LossFn | None, *, dual: bool) -> Captured:
        failure: CaptureError | None = None
        for signature in signatures(batch, dynamic=self.options.dynamic):
            key = (signature, dual, loss_fn is None)
            try:
                captured = self._admitting(key, batch, loss_fn)
            except CaptureError as error:
                failure = error
            else:
                if captured is not None:
                    return captured
        assert failure is not None, "the last level admits its own batch"
        raise failure

    def _admitting(
        self, key: Key, batch: Mapping[str, Any], loss_fn: LossFn | None
    ) -> Captured | None:
        """Return the capture of one signature that admits a batch, if there can be one.

        Raises
        ------
        CaptureError
            If the forward has no graph at this level.
        """
        signature, dual, _ = key
        known = self._known.setdefault(key, [])
        for found in known:
            if isinstance(found, CaptureError):
                raise found
            if found.capture.admits(batch):
                return found
        if known and signature.level != "values":
            return None
        try:
            made = self._capture(batch, signature, loss_fn, dual)
        except CaptureError as error:
            if signature.level != "values":  # there, other values may do
                known.append(error)
            raise
        known.append(made)
        self._warn_of_many()
        return made if made.capture.admits(batch) else None

    def _warn_of_many(self) -> None:
        count = sum(isinstance(c, Captured) for known in self._known.values() for c in known)
        if count > MANY_CAPTURES and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.model).__name__} has been captured for {count} kinds of batches, each "
                f"compiled by itself. Pad batches to a few fixed shapes; where the forward "
                f"decides by values, let them decide alike.",
                stacklevel=4,
            )

    def _capture(
        self, batch: Mapping[str, Any], signature: Signature, loss_fn: LossFn | None, dual: bool
    ) -> Captured:
        options, start = self.options, time.perf_counter()
        found = capture(
            self.model,
            batch,
            signature,
            loss_fn=loss_fn,
            want_loss=dual,
            device=options.device,
            compute_dtype=options.compute_dtype,
        )
        if self.streamed:
            check_sizes(found.gm)
        seconds = time.perf_counter() - start
        info(found.gm).params.update(self.weights.table)
        for name, tensor in found.constants.items():
            self.weights.constants[name] = tensor.to(options.device)
        bounds = find_bounds(found.gm)
        if self.streamed:
            give_back(collect=True)
        return Captured(found, bounds, dual, seconds)

    def compiled(self, captured: Captured, frames: Frames) -> Compiled:
        """Return the compiled graph for forwards of these sizes.

        Raises
        ------
        PlanError
            If they do not fit the budget.
        """
        key = tuple(tuple(f.values()) for f in frames) if self.streamed else None
        if key not in captured.compiled:
            passes = self.options.passes if captured.dual else self.options.passes.for_evaluation()
            captured.compiled[key] = self._compile(captured, frames, passes, Observers())
        self.last = captured.compiled[key]
        return self.last

    def trial(self, captured: Captured, batch: Mapping[str, Any]) -> Runner | None:
        """Return what measures the fixed points that a capture leaves open; None if there are none.

        Its results are for :func:`choices_of`. It computes what an evaluation of the batch does up
        to the last of them, under the same budget.

        Raises
        ------
        PlanError
            If that does not fit the budget.
        """
        passes = self.options.passes.for_trial()
        if captured.compiled or passes is None:
            return None  # what has been compiled is decided
        if not open_points(captured.capture.gm, self.choices):
            return None
        one = replace(captured, dual=False)
        return self._compile(one, (captured.frame(batch),), passes, Observers.silent()).runner

    @shared_results()
    def _compile(
        self, captured: Captured, frames: Frames, passes: Pipeline, observers: Observers
    ) -> Compiled:
        options, start = self.options, time.perf_counter()
        seconds, layout = {"capture": captured.seconds}, None
        if self.streamed:
            layout = self._plan(captured, passes, frames)
            seconds["plan"] = time.perf_counter() - start
        ctx = self._context(
            cut=None if layout is None else layout.cut, layout=layout, lowered=captured.bodies
        )
        gm = run(clone(captured.capture.gm), passes, ctx, observers)
        seconds.update(observers.timings)
        if self.streamed:
            give_back(collect=True)
        runner = Runner(Program(gm), self.weights)
        keys = {name: table.to(options.device) for name, table in key_tables(gm).items()}
        return Compiled(captured.capture, gm, runner, keys, seconds)

    def _context(self, **more: Any) -> PassContext:
        o = self.options
        period = self.weights.history.every if self.decided else PERIODS[-1]
        return PassContext(
            o.distribution,
            o.backend,
            o.directions,
            period,
            rounding=o.rounding,
            solvers={name: choice.solver for name, choice in self.choices.items()},
            eps=o.eps,
            mixing=o.anderson,
            by_rows=self.by_rows,
            **more,
        )

    @uncollected()
    def _plan(self, captured: Captured, passes: Pipeline, frames: Frames) -> Layout:
        front, back = passes.split("offload")

        def outlined(cut: int | None) -> fx.GraphModule:
            ctx = self._context(cut=cut)
            return run(clone(captured.capture.gm), front, ctx, Observers.silent())

        weights = self.weights
        request = Request(
            self.options.memory,
            frames,
            weights.store.tier,
            self.spec,
            weights.on_device(),
            weights.history.every,
        )
        found = choose(outlined, request)
        if not self.decided and captured.dual:
            ctx = self._context(cut=found.cut, layout=found)
            gm = run(outlined(found.cut), back.split("schedule")[0], ctx, Observers.silent())
            period = choose_period(
                lambda k: predicted_seconds(gm, replace(found, fold_every=k), ctx.directions)
            )
            weights.history.every, self.decided = period, True
            if period > 1:
                return choose(outlined, replace(request, fold_every=period))
        return found

    def leaves(self, captured: Captured, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch's leaves by path, tensors on the device, indices checked.

        Raises
        ------
        BatchError
            If an index on the CPU is outside the table that it indexes.
        """
        pairs, _ = flatten(batch)
        check_bounds(captured.bounds, dict(pairs))
        device = self.options.device
        return {
            p: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x
            for p, x in pairs
        }

    def output(self, compiled: Compiled, results: tuple[Any, ...]) -> Any:
        """Rebuild the model's own output from a graph's flat results."""
        record = info(compiled.gm)
        constants = iter(record.out_constants)
        leaves = [next(constants) if i is None else results[i] for i in record.out_leaves]
        assert record.out_spec is not None
        return pytree.tree_unflatten(leaves, record.out_spec)


def choices_of(trial: Runner, findings: Sequence[torch.Tensor]) -> dict[str, Choice]:
    """Return the solvers of the fixed points that a trial has measured, by name."""
    names = [str(meta(node).name) for node in trial.program.results]
    return dict(zip(names, map(choose_solver, findings), strict=True))


def key_tables(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return each stage's table of noise keys, by input name.

    int64 [parameters, 2]: the key, and the index of the first element (not 0 for a piece).
    """
    params, tables = info(gm).params, info(gm).keys.items()
    rows = {stage: [(params[n].key, params[n].first) for n in names] for stage, names in tables}
    return {f"keys.{stage}": torch.tensor(table) for stage, table in rows.items()}
