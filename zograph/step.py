"""The compiled zeroth-order step: what :func:`zograph.compile` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from zograph.errors import BatchError
from zograph.export import LazyStateDict, save_pretrained, save_streamed
from zograph.fixed_points import Choice
from zograph.graphs import Captured, Compiled, Graphs, choices_of
from zograph.history import Terms
from zograph.ir import info
from zograph.options import Options, check_lr
from zograph.parameters import fits
from zograph.plans import Plan, plan_of
from zograph.records import Outcome, StepRecord
from zograph.runtime import Frame, Runner
from zograph.schedule import Schedule
from zograph.seedlog import LogFile
from zograph.starting import open_run, recorded_choices, warn_of_eval_mode
from zograph.traced import Evaluation
from zograph.trajectory.control import State
from zograph.trajectory.path import Trajectory


class ZOStep:
    """One zeroth-order step of a model, compiled; see :func:`zograph.compile`.

    Attributes
    ----------
    last : StepRecord or None
        The record of the newest step; None before the first. On a GPU, reading it waits.
    lr : float
        The learning rate of the next step; assign to it for a schedule.
    """

    def __init__(
        self, model: nn.Module, lr: float, options: Options, logged: LogFile | None = None
    ) -> None:
        self.model = model
        self.options = options
        self._unchecked: list[Outcome] = []
        self._lr = check_lr(lr)
        warn_of_eval_mode(model)
        self._trajectory = Trajectory(options, logged)
        self._weights, self._log = open_run(model, self._lr, options, logged)
        self._steps = self._weights.history.newest
        self._outcome = logged.last() if logged else None
        self._graphs = Graphs(model, options, self._weights, recorded_choices(logged))
        self._running: Runner | None = None

    def __repr__(self) -> str:
        o = self.options
        return (
            f"ZOStep({type(self.model).__name__}, step={self._steps}, lr={self._lr}, eps={o.eps}, "
            f"method={o.method!r}, backend={o.backend!r}, device='{o.device}')"
        )

    @property
    def last(self) -> StepRecord | None:
        """The record of the newest step; None before the first."""
        return None if self._outcome is None else self._outcome.record

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = check_lr(value)

    @property
    def fold_every(self) -> int | None:
        """Steps from one write of a streamed weight to the next; None: not decided yet."""
        return self._weights.history.every if self._graphs.decided else None

    @property
    def solvers(self) -> dict[str, Choice]:
        """How fixed points that leave their solver open are solved, and what was measured of each.

        By the path of the calling module. One that is not in it is solved by Anderson mixing.
        """
        return dict(self._graphs.choices)

    @property
    def mixing(self) -> State | None:
        """What the gate of `anderson` has decided so far; None without that option."""
        return None if self.options.anderson is None else self._trajectory.state

    @property
    def graph(self) -> fx.GraphModule:
        """The graph of the last used capture, as the runtime executes it.

        Raises
        ------
        RuntimeError
            Before the first step or :meth:`prepare`.
        """
        return self._last_compiled().gm

    @property
    def streamed(self) -> bool:
        """Whether weights stream through a budget or from a disk."""
        return self._graphs.streamed

    @property
    def measured(self) -> dict[str, tuple[float, float]]:
        """Start and end in seconds of each task's last run, while weights are streamed."""
        return self._last_compiled().runner.measured

    @property
    def moved_bytes(self) -> dict[str, int]:
        """Bytes that each transfer stream has moved since :meth:`synchronize` or the first step."""
        return self._last_compiled().runner.moved_bytes

    @property
    def schedule(self) -> Schedule:
        """When the tasks of the last used capture run: order, events, slots, timeline.

        Raises
        ------
        RuntimeError
            Before the first step or :meth:`prepare`, or where nothing is streamed.
        """
        found = info(self.graph).schedule
        if found is None:
            raise RuntimeError("all weights stay on the device: pass memory= to stream them")
        return found

    @property
    def plan(self) -> Plan:
        """What a step of the last used capture takes; see :class:`zograph.Plan`.

        Raises
        ------
        RuntimeError
            As :attr:`schedule` does.
        """
        self.schedule  # noqa: B018  (it raises)
        return plan_of(self.graph)

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Seconds that the last used graph took: ``capture``, then each pass by name."""
        return dict(self._last_compiled().seconds)

    def _last_compiled(self) -> Compiled:
        if self._graphs.last is None:
            raise RuntimeError("nothing is compiled yet: run a step or step.prepare(**batch)")
        return self._graphs.last

    def prepare(self, **batch: Any) -> None:
        """Capture and compile for a batch; run nothing but what measures fixed points, if any.

        Raises
        ------
        BatchError, CaptureError
            As a step on this batch would.
        """
        captured = self._graphs.training(batch)
        self._decide(captured, batch)
        self._graphs.compiled(captured, (captured.frame(batch),) * self.options.directions)

    def __call__(
        self, *, batches: Sequence[Mapping[str, Any]] | None = None, **batch: Any
    ) -> torch.Tensor:
        """Run one step: a dual forward per direction, then a pending update.

        Parameters
        ----------
        **batch
            What the model (or `loss_fn`) takes.
        batches
            Instead of one batch, several: their mean loss is the step's loss.

        Returns
        -------
        torch.Tensor
            0-dim float32 on the device: the mean of the branch losses.

        Raises
        ------
        LossError
            If a loss is not finite and ``on_nan="raise"``. The weights stay as they were. On a
            GPU, which is not waited for, a later call or :meth:`synchronize` raises it.
        BatchError, CaptureError, ParameterChangedError
            Before anything ran.
        """
        if batches is None:
            batches = [batch]
        elif batch or not batches:
            raise BatchError("pass either one batch as keywords or a non-empty batches=[...]")
        self._check_losses()
        self._weights.conceal()
        self._weights.check()
        groups: dict[Captured, list[Mapping[str, Any]]] = {}
        for one in batches:
            groups.setdefault(self._graphs.training(one), []).append(one)
        served = [self._serve(captured, group) for captured, group in groups.items()]
        seeds = self._trajectory.seeds(self._steps)
        losses = self._measure(served, seeds)
        return self._finish(seeds, losses)

    def _serve(
        self, captured: Captured, batches: Sequence[Mapping[str, Any]]
    ) -> tuple[Compiled, list[dict[str, Any]]]:
        """Return the compiled graph for batches of one capture, and their leaves."""
        leaves = [self._graphs.leaves(captured, batch) for batch in batches]
        self._decide(captured, batches[0])
        frames = tuple(captured.frame(batch) for batch in batches) * self.options.directions
        return self._graphs.compiled(captured, frames), leaves

    def _decide(self, captured: Captured, batch: Mapping[str, Any]) -> None:
        """Measure the fixed points that leave their solver open, before the first step alone."""
        trial = None if self._steps else self._graphs.trial(captured, batch)
        if trial is None:
            return
        frame = trial.program.frame(self._graphs.leaves(captured, batch), {})
        (findings,) = self._run(trial, [frame])
        choices = self._graphs.choices | choices_of(trial, findings)
        if self._log is not None:
            self._log.decide(solvers={name: asdict(c) for name, c in choices.items()})
        self._graphs.choices = choices

    def _noise(self, compiled: Compiled, seed: int) -> dict[str, torch.Tensor]:
        """Bind the noise inputs of a graph for one direction."""
        none = Terms.of(())
        noise = {"seeds": none.seeds, "coefs": none.coefs, "scales": none.scales}
        noise["seed"] = torch.tensor(seed, dtype=torch.int64)
        noise["eps"] = torch.tensor(self.options.eps, dtype=torch.float32)
        device = self.options.device
        return {n: t.to(device, non_blocking=True) for n, t in noise.items()} | compiled.keys

    def _measure(
        self, served: Sequence[tuple[Compiled, list[dict[str, Any]]]], seeds: Sequence[int]
    ) -> torch.Tensor:
        """Return loss+ and loss- of every direction, each the mean over the batches.

        float32 [directions, 2], on the device; added up in float64.
        """
        sums: list[Any] = [0.0 for _ in seeds]
        for compiled, batches in served:
            noises = [self._noise(compiled, seed) for seed in seeds]
            program = compiled.runner.program
            frames = [program.frame(leaves, noise) for noise in noises for leaves in batches]
            for i, losses in enumerate(self._run(compiled.runner, frames)):
                sums[i // len(batches)] = sums[i // len(batches)] + torch.stack(losses).double()
        n = sum(len(batches) for _, batches in served)
        return (torch.stack(sums) / n).float()

    def _run(self, runner: Runner, frames: Sequence[Frame]) -> list[tuple[Any, ...]]:
        """Run forwards through a graph; give back the slots of the graph that ran before it."""
        if self._running is not runner and self._running is not None:
            self._running.drain()
            self._running.close()
        self._running = runner
        found = runner.run(frames)
        self._weights.clipped.check()
        return found

    def _finish(self, seeds: Sequence[int], losses: torch.Tensor) -> torch.Tensor:
        """Turn the losses into pending terms and a record."""
        o = self.options
        found = Outcome(self._steps, seeds, losses, lr=self._lr, eps=o.eps, decay=o.weight_decay)
        if o.on_nan == "raise" and found.lazy:
            self._unchecked.append(found)
        elif o.on_nan == "raise":
            found.check()
        mixing = self._trajectory.follow(found)
        if self._log is not None:
            self._log.add(found)
        self._trajectory.state = mixing
        skipped = not found.lazy and found.record.skipped
        self._weights.owe(Terms.of(()) if skipped else found.terms())
        self._outcome = found
        self._steps += 1
        return found.loss()

    def _check_losses(self, *, wait: bool = False) -> None:
        """See that the losses of earlier steps were finite, of those that a GPU is done with.

        Raises
        ------
        LossError
            If one was not; its step moved nothing.
        """
        while self._unchecked and (wait or self._unchecked[0].ready()):
            self._unchecked.pop(0).check()

    def evaluate(self, **batch: Any) -> Any:
        """Run the model at its current weights through the same machinery, without noise.

        Returns
        -------
        The model's own output (for transformers: loss if the batch has labels, logits and
        so on). With a `loss_fn`, an :class:`zograph.Evaluation` of loss and output; its loss
        is None where the batch fits the model but not `loss_fn`.
        """
        self._weights.conceal()
        self._weights.check()
        loss_fn = self.options.loss_fn
        bare = loss_fn is not None and not fits(loss_fn, batch)
        captured = self._graphs.evaluation(batch, None if bare else loss_fn)
        leaves = self._graphs.leaves(captured, batch)
        self._decide(captured, batch)
        compiled = self._graphs.compiled(captured, (captured.frame(batch),))
        frame = compiled.runner.program.frame(leaves, {})
        (results,) = self._run(compiled.runner, [frame])
        out = self._graphs.output(compiled, results)
        return Evaluation(None, out) if bare else out

    def synchronize(self) -> None:
        """Make every update visible in the model's parameters (in the work file, on a disk).

        Raises
        ------
        StoreError
            If the disk fails. Nothing is lost: call it again when there is space.
        """
        if self._running is not None:
            self._running.drain()
            self._running.close()
        self._check_losses(wait=True)
        self._weights.settle()
        self._weights.show()
        self._weights.clipped.check(wait=True)
        if self._log is not None:
            self._log.flush()

    def save(self, path: str | Path) -> None:
        """Write the seed log so far, whole or not at all.

        Raises
        ------
        StoreError
            If there is such a file already, or it cannot be written.
        RuntimeError
            If the step was compiled without `log`, or with ``fold_every="auto"`` and has not run.
        """
        if self._log is None:
            raise RuntimeError("there is no log: pass log=path to zograph.compile")
        self._log.copy_to(Path(path))

    def close(self) -> None:
        """Give back threads, slots, the log and the work folder; twice is fine.

        A fresh work folder is removed with all updates in it: save the model first. The step
        cannot be used any more if its weights were on a disk.
        """
        if self._running is not None:
            self._running.close()
        if self._log is not None:
            self._log.close()
        self._weights.store.close()

    def __enter__(self) -> ZOStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> Mapping[str, Any]:
        """Return the model's state dict with every update in it.

        Of a model on a disk, a mapping that reads a tensor when it is asked for.
        """
        self.synchronize()
        if self._weights.elsewhere:
            return LazyStateDict(self.model, self._weights.parameter)
        return dict(self.model.state_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as transformers does (or as safetensors), whole or not at all.

        A model on a disk is written one tensor after the other.

        Raises
        ------
        OSError
            If the folder cannot be written; nothing half-written stays behind.
        """
        self.synchronize()
        if self._weights.elsewhere:
            save_streamed(self.model, self._weights.parameter, Path(folder))
        else:
            save_pretrained(self.model, Path(folder))

    def draw(self, path: str | Path, *, fold: bool = True) -> Path:
        """Draw the graph of the last used capture; see :func:`zograph.viz.draw`."""
        from zograph import viz  # graphviz is wanted here alone

        return viz.draw(self.graph, path, fold=fold)
