"""Runs a scheduled graph: each transfer, fold and stage is a task, in the order of its schedule.

A :class:`Program` is the graph as tasks; a :class:`Frame` holds the values of one forward
through it. Several frames (micro-batches, directions) advance together: every one runs stage k
before any runs stage k + 1, so that a weight is visited once per step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from zograph.engine.cuda import CudaSession
from zograph.engine.threads import Session
from zograph.ir import Kind, info, meta, output, placeholders
from zograph.layout import Layout, most_copies
from zograph.memory import give_back
from zograph.pool import pool
from zograph.schedule import Stream
from zograph.slots import Slots, open_slots
from zograph.transfers import (
    DECODE,
    ENCODE,
    FETCH,
    FOLD,
    GATHER,
    WRITEBACK,
    is_transfer,
    weight_names,
)
from zograph.weights import Weights

Frame = dict[fx.Node, Any]

STORED = (Kind.PARAMETER, Kind.BUFFER, Kind.CONSTANT, Kind.WEIGHT)
MOVES = {
    FETCH: "fetch",
    FOLD: "fold",
    WRITEBACK: "writeback",
    DECODE: "decode",
    ENCODE: "encode",
}
COMPUTED = (FOLD, DECODE, ENCODE)


@dataclass(frozen=True)
class Instruction:
    """One node of the top graph: what to call, and which values die behind it."""

    node: fx.Node
    function: Callable[..., Any]
    dies: tuple[fx.Node, ...]


class Program:
    """A scheduled graph as tasks, ready to run."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        record = info(gm)
        self.schedule, self.layout, self.params = record.schedule, record.layout, record.params
        self.inputs = {str(meta(n).name): n for n in placeholders(gm, Kind.INPUT)}
        self.noise = {str(meta(n).name): n for n in placeholders(gm, Kind.NOISE)}
        self.results: tuple[fx.Node, ...] = tuple(output(gm).args[0])  # type: ignore[arg-type]
        self.prelude: list[Instruction] = []
        """What no stage computes: sizes."""
        self.bodies: dict[str, list[Instruction]] = {}
        self.moved: dict[str, tuple[str, ...]] = {}
        """For each transfer, the weights that it is about."""
        self.targets: dict[str, str] = {}
        """For each stage's task, the name of its body."""
        self.compute: list[str] = []
        """The folds, decodings, encodings and bodies, in the graph's order."""
        self.last: dict[str, tuple[str, ...]] = {}
        """For a task of these, the weights that no later one uses."""
        self._read()

    def _read(self) -> None:
        last = {s: n for n in self.gm.graph.nodes for s in n.all_input_nodes}
        kept = set(self.results)
        for node in self.gm.graph.nodes:
            stage = meta(node).stage
            if is_transfer(node):
                if node.target in MOVES:
                    task = f"{MOVES[node.target]} {stage}"
                    new = node.target in COMPUTED and task not in self.moved
                    self.compute += [task] if new else []
                    self.moved[task] = (*self.moved.get(task, ()), *weight_names(node))
                continue
            if node.op in ("placeholder", "output") or meta(node).kind == Kind.WEIGHT:
                continue
            if meta(node).kind == Kind.STAGE:
                self.compute.append(f"body {stage}")
                self.targets[f"body {stage}"] = str(node.target)
            where = self.prelude
            if stage is not None:
                where = self.bodies.setdefault(f"body {stage}", [])
            dies = tuple(
                s
                for s in node.all_input_nodes
                if last[s] is node and s not in kept and meta(s).kind not in STORED
            )
            where.append(Instruction(node, self._function(node), dies))
        latest = {name: task for task in self.compute for name in self._weights_of(task)}
        for name, task in latest.items():
            self.last[task] = (*self.last.get(task, ()), name)

    def _weights_of(self, task: str) -> Iterator[str]:
        yield from self.moved.get(task, ())
        for instruction in self.bodies.get(task, ()):
            for node in instruction.node.all_input_nodes:
                if meta(node).kind in (Kind.PARAMETER, Kind.WEIGHT):
                    yield str(meta(node).name)

    def held(self) -> dict[str, tuple[str, ...]]:
        """Return the weights of each slot, in order."""
        return self.moved_by("fetch")

    def moved_by(self, wanted: str) -> dict[str, tuple[str, ...]]:
        """Return the weights that transfers of one kind are about, by stage."""
        tasks = ((t.partition(" "), names) for t, names in self.moved.items())
        return {slot: names for (kind, _, slot), names in tasks if kind == wanted}

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.gm)
            return lambda: value
        assert callable(node.target)
        return node.target

    def frame(self, leaves: Mapping[str, Any], noise: Mapping[str, torch.Tensor]) -> Frame:
        """Start a forward: bind the batch's leaves and the step's noise inputs."""
        frame: Frame = {node: leaves[path] for path, node in self.inputs.items()}
        frame.update((node, noise[name]) for name, node in self.noise.items() if name in noise)
        return frame

    def execute(
        self,
        instructions: Sequence[Instruction],
        frame: Frame,
        weight: Callable[[fx.Node], torch.Tensor],
        rows: Callable[[Sequence[str], torch.Tensor], torch.Tensor],
    ) -> None:
        """Run instructions on one frame.

        Parameters
        ----------
        weight
            Returns what a node that stands for a weight, buffer or constant means.
        rows
            Returns rows of a stored table by the names of its pieces and their indices.
        """

        def value(node: fx.Node) -> Any:
            return weight(node) if meta(node).kind in STORED else frame[node]

        for step in instructions:
            if step.node.target is GATHER:
                index = step.node.args[1]
                assert isinstance(index, fx.Node)
                frame[step.node] = rows(weight_names(step.node), value(index))
                continue
            args = fx.node.map_arg(step.node.args, value)
            kwargs = fx.node.map_arg(step.node.kwargs, value)
            frame[step.node] = step.function(*args, **kwargs)
            for dead in step.dies:
                frame.pop(dead, None)


class Runner:
    """Runs a program on the weights of a model; keeps slots and threads from step to step."""

    def __init__(self, program: Program, weights: Weights) -> None:
        self.program, self.weights = program, weights
        self.slots: Slots | None = None
        """The slots, while the schedule is running."""
        self._session: Session | None = None
        self._frames: Sequence[Frame] = ()
        self._body = ""
        """The stage body that ran last."""

    def run(self, frames: Sequence[Frame]) -> list[tuple[Any, ...]]:
        """Run all frames through the graph once.

        Returns
        -------
        list of tuples
            The graph's outputs, one tuple a frame.

        Raises
        ------
        StoreError
            If a transfer fails. No update is lost: the same step can be run again.
        """
        self._frames, program = frames, self.program
        if self.weights.device.type == "cpu":
            pool.bound(None if self._limited is None else most_copies(self._limited.uses))
        try:
            with torch.no_grad():
                for frame in frames:
                    program.execute(program.prelude, frame, self._weight, self._rows)
                if program.schedule is None:
                    for task in program.compute:
                        self._action(task)()
                else:
                    self._streaming().run()
        except BaseException:
            self.close()
            raise
        finally:
            self._frames = ()
        return [
            tuple(f[n] if isinstance(n, fx.Node) else n for n in program.results) for f in frames
        ]

    def drain(self) -> None:
        """Wait for every transfer under way.

        Raises
        ------
        StoreError
            If one fails.
        """
        if self._session is not None:
            try:
                self._session.drain()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the threads and give the slots back; what is in them is not needed."""
        if self._session is not None:
            self._session.close()
        if self.slots is not None:
            self.slots.close()
        self._session = self.slots = None
        pool.bound(None)

    @property
    def measured(self) -> dict[str, tuple[float, float]]:
        """Start and end in seconds of each task's last run."""
        return {} if self._session is None else self._session.measured

    @property
    def moved_bytes(self) -> dict[str, int]:
        """Bytes that each transfer stream has moved since the schedule was started."""
        moved = {} if self.slots is None else self.slots.moved_bytes
        return {str(s): n for s, n in moved.items() if s != Stream.COMPUTE}

    def _streaming(self) -> Session:
        """Return the running schedule; start it where it is not."""
        schedule, layout = self.program.schedule, self.program.layout
        assert schedule is not None
        assert layout is not None
        if self._session is None:
            self.weights.hold(layout.resident)
            held, coded = self.program.held(), self.program.moved_by("decode")
            self.slots = open_slots(schedule, held, self.program.params, self.weights, coded)
            actions = {task: self._action(task) for task in schedule.dag}
            if self.weights.device.type == "cuda":
                self._session = CudaSession(schedule, actions, self.weights.device)
            else:
                self._session = Session(schedule, actions)
        return self._session

    def _action(self, task: str) -> Callable[[], None]:
        """Return what a task does."""
        kind, _, slot = task.partition(" ")
        if kind == "body":
            return partial(self._run_body, task)
        if kind == "fold":
            return partial(self._fold, task)
        if kind in ("decode", "encode"):
            return partial(self._code, kind, slot)
        assert self.slots is not None
        moved = {"read": "fetch", "write": "writeback"}.get(kind, kind)
        return partial(self.slots.action(kind), slot, self.program.moved[f"{moved} {slot}"])

    def _run_body(self, task: str) -> None:
        self._make_room(task)
        for frame in self._frames:
            self.program.execute(self.program.bodies[task], frame, self._weight, self._rows)
        self.weights.leave(self.program.last.get(task, ()))

    @property
    def _limited(self) -> Layout | None:
        """The layout, where a budget limits the memory of a CPU."""
        layout, cpu = self.program.layout, self.weights.device.type == "cpu"
        return layout if cpu and layout is not None and layout.budget is not None else None

    def _make_room(self, task: str) -> None:
        """Give back what earlier stages have left, where it would count against the budget."""
        if self._limited is None:
            return
        pool.shorten(self._limited.room_for_copies(int(task.removeprefix("body "))))
        body = self.program.targets[task]
        if body != self._body:
            self._body = body
            give_back()

    def _weight(self, node: fx.Node) -> torch.Tensor:
        record = meta(node)
        name, slot = str(record.name), str(record.stage)
        if record.kind != Kind.WEIGHT:
            return self.weights.fetch(record.kind, name)
        found = None if self.slots is None else self.slots.weight(slot, name)
        return self.weights.fetch(Kind.PARAMETER, name) if found is None else found

    def _code(self, kind: str, slot: str) -> None:
        """Decode or encode a stage's weights."""
        for name in self.program.moved[f"{kind} {slot}"]:
            if self.slots is not None:
                getattr(self.slots, kind)(slot, name)
            elif kind == "decode":
                self.weights.decode_resident(name)
            else:
                self.weights.encode_resident(name)
        self.weights.leave(self.program.last.get(f"{kind} {slot}", ()))

    def _rows(self, names: Sequence[str], index: torch.Tensor) -> torch.Tensor:
        assert self.slots is not None
        rows, nbytes = self.weights.rows(names, index)
        self.slots.moved_bytes[Stream.READ] += nbytes
        return rows

    def _fold(self, task: str) -> None:
        slot = task.removeprefix("fold ")
        for name in self.program.moved[task]:
            if self.slots is not None and (slot, name) in self.slots.versions:
                self.slots.fold(slot, name)
            else:
                self.weights.fold_resident(name)
        self.weights.leave(self.program.last.get(task, ()))
