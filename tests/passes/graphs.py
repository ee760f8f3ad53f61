"""Small hand-built graphs that the pass tests share."""

from __future__ import annotations

import torch
from torch import fx

from zograph.ir import info
from zograph.passes import PassContext
from zograph.pipeline import default_passes
from zograph.testing import GraphBuilder

aten = torch.ops.aten


def block(path: str) -> tuple[tuple[str, str], ...]:
    """Return the module stack of a call inside block `path`."""
    return (("L__self__", "Model"), (path, "Block"), (f"{path}.fc", "Linear"))


def two_blocks() -> fx.GraphModule:
    """Build an embedding, two equal linear blocks, a mask and a mean loss, normalized."""
    b = GraphBuilder()
    table = b.param("wte", (7, 4))
    weights = [(b.param(f"layers.{i}.w", (4, 4)), b.param(f"layers.{i}.bias", (4,))) for i in "01"]
    ids, scale = b.input("ids", (3,), torch.int64), b.input("scale", (3, 1))
    x = b.call(aten.embedding.default, table, ids)
    gate = b.call(aten.relu.default, scale, module=block("layers.0"))
    for i, (w, bias) in enumerate(weights):
        stack = block(f"layers.{i}")
        x = b.call(aten.linear.default, x, w, bias, module=stack)
        x = b.call(aten.mul.Tensor, x, gate, module=stack)
    head = b.call(aten.linear.default, x, table)
    return b.build(b.call(aten.mean.default, head), head, facts=("normalized",))


def ready_for(name: str, gm: fx.GraphModule) -> fx.GraphModule:
    """Run the default passes that stand before the one called `name`, but normalize."""
    for pass_ in default_passes():
        if pass_.name == name:
            break
        if pass_.name != "normalize":
            gm = pass_.apply(gm, PassContext()).gm
            info(gm).facts |= pass_.contract.provides
    return gm
