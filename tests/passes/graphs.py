"""Small hand-built graphs that the pass tests share."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import fx

from tests.zoo import batch, build, loss_fn
from zograph.ir import clone, info
from zograph.passes import PassContext
from zograph.pipeline import default_passes
from zograph.testing import GraphBuilder, capture_function

aten = torch.ops.aten

DEEP = [
    pytest.param(name, marks=(pytest.mark.xdist_group(f"deep {name}"), *marks))
    for name, marks in (
        ("opt", ()),
        ("llama", ()),
        ("bert", (pytest.mark.slow,)),
        ("t5", (pytest.mark.slow,)),
    )
]
"""Models for :func:`deep`; the tests of one go to one process, which captures it once."""


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


def deep(name: str, layers: int) -> fx.GraphModule:
    """Return a model of the zoo with so many layers, as captured."""
    return clone(_deep(name, layers))


@cache
def _deep(name: str, layers: int) -> fx.GraphModule:
    model = build(name)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if name == "t5":
        config.num_layers = config.num_decoder_layers = layers
    if hasattr(config, "layer_types"):
        config.layer_types = None
    deeper = type(model)(type(config).from_dict(config.to_dict()))
    return capture_function(deeper, loss_fn(name), **batch(name, 4, 16))
