from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from tests.passes.graphs import ready_for, two_blocks
from zograph import printer
from zograph.ir import Kind, annotate, meta
from zograph.testing import Golden, GraphBuilder

aten = torch.ops.aten


def symbolic() -> fx.GraphModule:
    """Build a graph with one of everything that the printer writes in a way of its own."""
    b = GraphBuilder()
    w, x = b.param("fc.weight", (4, 3)), b.input("['x']", ("batch", "time", 3))
    mask = b.input("mask", ("batch",), torch.bool)
    n = b.call(aten.sym_size.int, x, 0)
    m = b.call(operator.mul, n, b.call(aten.sym_size.int, x, 1))
    y = b.call(aten.linear.default, x, w, stage=1, branch="+")
    flat = b.call(aten.view.default, y, [m, -1], stage=1, branch="+")
    cast = b.call(aten._to_copy.default, mask, kwargs={"dtype": torch.bfloat16}, hoisted=True)
    parts = b.call(aten.split.Tensor, flat, 2, 1, stage=1, branch="+")
    first = b.call(operator.getitem, parts, 0, stage=1, branch="+")
    loss = b.call(aten.sum.dim_IntList, first, [0, 1], stage=1, branch="+")
    return b.build(loss, b.call(aten.sum.default, cast))


def test_golden(golden: Golden) -> None:
    golden.check(symbolic(), "printer_symbolic")


def test_bodies_are_printed_once() -> None:
    text = printer.text(ready_for("lower", two_blocks()))
    assert text.count("\nstage ") == 4
    assert "\nstage 2, 3: body2\n" in text


def test_text_ignores_the_names_of_torch_fx() -> None:
    gm = symbolic()
    before = printer.text(gm)
    for i, node in enumerate(gm.graph.nodes):
        node.name = f"other_{i}"
    assert printer.text(gm) == before


def test_equal_sizes_read_equal() -> None:
    head = printer.text(symbolic()).splitlines()
    assert head[1] == "%x: f32[s0, s1, 3] = input"
    assert head[2] == "%mask: b8[s0] = input"


def test_colliding_names_stay_apart() -> None:
    b = GraphBuilder()
    x = b.input("relu", (2,))
    gm = b.build(b.call(aten.relu.default, b.call(aten.relu.default, x)))
    assert printer.text(gm).splitlines()[:3] == [
        "%relu: f32[2] = input",
        "%relu_1: f32[2] = aten.relu(%relu)",
        "%relu_2: f32[2] = aten.relu(%relu_1)",
    ]


def test_frozen_parameters_and_provenance() -> None:
    b = GraphBuilder()
    w = b.param("w", (2,), trainable=False)
    gm = b.build(b.call(aten.sum.default, w))
    assert "%w: f32[2] = frozen parameter" in printer.text(gm)
    assert "# from=builder" in printer.text(gm, provenance=True)


def test_a_broken_graph_is_still_printed() -> None:
    b = GraphBuilder()
    x = b.input("x", (2,))
    y = b.call(aten.relu.default, x)
    gm = b.build(b.call(aten.sum.default, y))
    del y.meta["val"]
    other = fx.Graph().placeholder("stranger")
    y.args = (other,)
    assert "%relu: ? = aten.relu(%?stranger)" in printer.text(gm)


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        ((1, None), "(1, None)"),
        ((1,), "(1,)"),
        ([True, 2.5], "[True, 2.5]"),
        (slice(None, 3, None), ":3:"),
        (torch.float16, "f16"),
        (torch.bool, "b8"),
        (torch.device("cpu"), "cpu"),
        (torch.channels_last, "channels_last"),
        (torch.strided, "strided"),
        ("linear", "'linear'"),
        (float("-inf"), "-inf"),
        ({"b": 1, "a": 2}, "{a: 2, b: 1}"),
    ],
)
def test_arguments(arg: object, expected: str) -> None:
    graph = fx.Graph()
    node = graph.call_function(print, (0,), {"x": arg})
    graph.output((node,))
    line = printer.text(fx.GraphModule({}, graph)).splitlines()[0]
    assert line == f"%print: ? = print(0, x={expected})"


def test_around_points_at_the_node() -> None:
    gm = symbolic()
    node = next(n for n in gm.graph.nodes if n.target is aten.view.default)
    lines = printer.around(gm, node, lines=1).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("--> %view: f32[s0*s1, 4] = aten.view(%linear, [%mul, -1])")
    assert "not in this graph" in printer.around(two_blocks(), node)


def test_summary_counts_bodies_once() -> None:
    gm = two_blocks()
    assert printer.summary(gm)["aten.linear"] == 3
    outlined = printer.summary(ready_for("lower", gm))
    assert outlined["stage"] == 5
    assert outlined["aten.linear"] == 4  # two branches of one block body and of the head


def test_metadata_defaults_are_not_printed() -> None:
    gm = two_blocks()
    assert "#" not in printer.text(gm)
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    annotate(node, stage=0, hoisted=True)
    assert "# stage=0 hoisted" in printer.text(gm)
    assert meta(node).kind == Kind.OP


def test_every_dtype_is_short() -> None:
    for dtype in (torch.float8_e4m3fn, torch.uint8, torch.complex64, torch.float64, torch.int16):
        b = GraphBuilder()
        assert "torch" not in printer.text(b.build(b.input("x", (2,), dtype)))
