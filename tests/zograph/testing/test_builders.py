from __future__ import annotations

import torch
from torch import nn

from zograph import printer
from zograph.ir import Kind, info, meta, placeholders
from zograph.noise import parameter_key
from zograph.testing import (
    GraphBuilder,
    capture_function,
    count_nodes,
    random_inputs,
    run_graph,
)
from zograph.verifier import Verifier

aten = torch.ops.aten


def test_builder_gives_values_metadata_and_parameters() -> None:
    b = GraphBuilder()
    x, w = b.input("x", ("batch", 3)), b.param("fc.weight", (4, 3))
    frozen = b.param("fc.bias", (4,), trainable=False)
    table = b.buffer("table", (4,), torch.float64)
    y = b.call(aten.linear.default, x, w, frozen, stage=1, module=(("fc", "Linear"),))
    z = b.call(aten.add.Tensor, y, table, kwargs={"alpha": 2})
    gm = b.build(b.call(aten.sum.default, z), z, facts=("normalized",))
    assert printer.text(gm).splitlines() == [
        "%x: f32[s0, 3] = input",
        "%fc.weight: f32[4, 3] = parameter",
        "%fc.bias: f32[4] = frozen parameter",
        "%table: f64[4] = buffer",
        "%linear: f32[s0, 4] = aten.linear(%x, %fc.weight, %fc.bias)  # stage=1",
        "%add: f64[s0, 4] = aten.add.Tensor(%linear, %table, alpha=2)",
        "%sum: f64[] = aten.sum(%add)",
        "return (%sum, %add)",
    ]
    assert meta(y).module == (("fc", "Linear"),)
    record = info(gm).params
    assert record["fc.weight"].key == parameter_key("fc.weight")
    assert (record["fc.weight"].decay, record["fc.bias"].decay) == (True, False)
    assert info(gm).facts == {"normalized"}
    Verifier().check(gm, after="builder")


def test_equal_size_names_are_one_symbol() -> None:
    b = GraphBuilder()
    x, y = b.input("x", ("n", "m")), b.input("y", ("m", "n"))
    gm = b.build(b.call(aten.mm.default, x, y))
    assert [tuple(v.shape) for v in random_inputs(gm)] == [(5, 7), (7, 5)]
    assert "%mm: f32[s0, s0]" in printer.text(gm)


def test_random_inputs_run_and_repeat() -> None:
    b = GraphBuilder()
    ids, w = b.input("ids", ("n",), torch.int64), b.param("w", (3, 2))
    gm = b.build(b.call(aten.sum.default, b.call(aten.embedding.default, w, ids)))
    first, again, other = (random_inputs(gm, seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    assert run_graph(gm, first)[0].shape == ()


def test_count_nodes() -> None:
    b = GraphBuilder()
    x = b.input("x", (2,))
    gm = b.build(b.call(aten.relu.default, b.call(aten.relu.default, x)))
    assert count_nodes(gm) == {"aten.relu": 2}


def test_capture_function() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    gm = capture_function(model, lambda m, x: m(x).mean(), x=torch.randn(5, 3))
    names = [meta(n).name for n in placeholders(gm, Kind.PARAMETER)]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert count_nodes(gm)["aten.linear"] == 2
    Verifier().check(gm, after="capture")
    inputs = [*model.parameters(), torch.ones(5, 3)]
    expected = model(torch.ones(5, 3)).mean()
    torch.testing.assert_close(run_graph(gm, inputs)[0], expected)
