"""Runs a lowered graph stage by stage, with all weights resident.

A :class:`Program` is the graph as a list of stages; a :class:`Frame` holds the values of
one forward through it. Several frames (micro-batches, directions) advance together: every
one runs stage k before any runs stage k + 1, so that a weight is visited once per step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from zograph.ir import Kind, info, meta, output, placeholders


@dataclass(frozen=True)
class Instruction:
    """One node of the top graph: what to call, and which values die behind it."""

    node: fx.Node
    function: Callable[..., Any]
    dies: tuple[fx.Node, ...]


@dataclass
class Stage:
    """The instructions of one stage and the parameters that it is the first to visit."""

    number: int | None
    instructions: list[Instruction] = field(default_factory=list)
    first_visits: tuple[str, ...] = ()


Frame = dict[fx.Node, Any]


class Program:
    """A lowered graph, ready to run."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.inputs = {str(meta(n).name): n for n in placeholders(gm, Kind.INPUT)}
        self.noise = {str(meta(n).name): n for n in placeholders(gm, Kind.NOISE)}
        self.stored = {
            n: (meta(n).kind, str(meta(n).name))
            for n in placeholders(gm, Kind.PARAMETER, Kind.BUFFER, Kind.CONSTANT)
            if n.users
        }
        self.results: tuple[fx.Node, ...] = tuple(output(gm).args[0])  # type: ignore[arg-type]
        self.stages = self._stages()

    def _stages(self) -> list[Stage]:
        kept = set(self.results)
        last: dict[fx.Node, fx.Node] = {}
        nodes = [n for n in self.gm.graph.nodes if n.op not in ("placeholder", "output")]
        for node in nodes:
            for source in node.all_input_nodes:
                last[source] = node
        stages: list[Stage] = [Stage(None)]
        visited: set[str] = set()
        for node in nodes:
            if meta(node).kind == Kind.STAGE:
                stages.append(Stage(meta(node).stage))
            sources = node.all_input_nodes
            dies = tuple(
                s for s in sources if last[s] is node and s not in kept and s not in self.stored
            )
            stages[-1].instructions.append(Instruction(node, self._function(node), dies))
            names = [self.stored[s][1] for s in sources if s in self.stored]
            fresh = [n for n in names if n in info(self.gm).params and n not in visited]
            visited.update(fresh)
            stages[-1].first_visits += tuple(fresh)
        return [s for s in stages if s.instructions]

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
        frame.update((node, noise[name]) for name, node in self.noise.items())
        return frame

    def run_stage(
        self, stage: Stage, frame: Frame, fetch: Callable[[Kind, str], torch.Tensor]
    ) -> None:
        """Run one stage of one forward.

        Parameters
        ----------
        fetch
            Returns the tensor of a parameter, buffer or constant by its name.
        """
        stored = self.stored

        def value(node: fx.Node) -> Any:
            return fetch(*stored[node]) if node in stored else frame[node]

        for step in stage.instructions:
            args = fx.node.map_arg(step.node.args, value)
            kwargs = fx.node.map_arg(step.node.kwargs, value)
            frame[step.node] = step.function(*args, **kwargs)
            for dead in step.dies:
                frame.pop(dead, None)

    def run(
        self,
        frames: Sequence[Frame],
        fetch: Callable[[Kind, str], torch.Tensor],
        visit: Callable[[Sequence[str]], None],
    ) -> list[tuple[Any, ...]]:
        """Run all frames, stage by stage; `visit` sees parameters before their first use.

        Returns
        -------
        list of tuples
            The graph's outputs, one tuple a frame.
        """
        with torch.no_grad():
            for stage in self.stages:
                visit(stage.first_visits)
                for frame in frames:
                    self.run_stage(stage, frame, fetch)
        return [tuple(f[n] if isinstance(n, fx.Node) else n for n in self.results) for f in frames]
