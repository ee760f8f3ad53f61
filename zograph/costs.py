"""The costs of stage bodies, each form measured once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from zograph.errors import CaptureError
from zograph.ir import module, op_name
from zograph.meter import Cost, Sizes, measure
from zograph.passes.materialize import beyond, split_pairs
from zograph.passes.partition import body_form


class Costs:
    """What bodies cost at given sizes; bodies of one form, of one graph or several, cost the same.

    Parameters
    ----------
    frames
        The sizes of every forward that goes through the graph in one step.
    """

    def __init__(self, frames: tuple[Sizes, ...]) -> None:
        self.frames = frames
        self._forms: dict[fx.GraphModule, Any] = {}  # it also keeps alive what forms speak of
        self._known: dict[Any, list[Cost]] = {}

    def of(self, body: fx.GraphModule, pair: int | None) -> list[Cost]:
        """Return the cost of a body for each frame.

        Parameters
        ----------
        pair
            Most bytes of a copy that is made in a pair; None: all are made in pairs.
        """
        if body not in self._forms:
            self._forms[body] = body_form(body)
        split = () if pair is None else beyond(body, pair)
        place = {node: i for i, node in enumerate(body.graph.nodes)} if split else {}
        key = (self._forms[body], tuple(place[node] for node in split))
        if key not in self._known:
            self._known[key] = self._measured(body, pair if split else None)
        return self._known[key]

    def _measured(self, body: fx.GraphModule, pair: int | None) -> list[Cost]:
        if pair is not None:
            body = module(body, copy.deepcopy(body.graph))
            split_pairs(body, pair)
        found: dict[frozenset[Any], Cost] = {}
        costs = []
        for sizes in self.frames:
            key = frozenset(sizes.items())
            if key not in found:
                found[key] = measure(body, sizes)
            costs.append(found[key])
        return costs


def check_sizes(gm: fx.GraphModule) -> None:
    """Refuse sizes that depend on the values of tensors: no budget can be planned for them.

    Raises
    ------
    CaptureError
        If there are any.
    """
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and free_unbacked_symbols(val):
            raise CaptureError(
                f"the size of {node.name} ({op_name(node)}) depends on values that the model "
                f"computes: no budget can be planned for it. Compile without memory= and storage=."
            )
