from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx

from zograph import pieces, printer
from zograph.ir import info, meta, placeholders
from zograph.passes import Chunk, PassContext
from zograph.testing import (
    Golden,
    GraphBuilder,
    assert_equivalent,
    assert_idempotent,
    random_inputs,
)
from zograph.verifier import Verifier

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _small_tables_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST", 70)


def built(b: GraphBuilder, *outputs: fx.Node) -> fx.GraphModule:
    gm = b.build(*outputs, facts=("normalized",))
    pieces.enter_in_pieces(gm)
    return gm


def language_model(
    *,
    trainable: bool = True,
    dtype: torch.dtype = torch.float32,
    reduction: int = 1,
    smoothing: float = 0.0,
) -> fx.GraphModule:
    """Build a table of 10 rows that is looked up and multiplied by, in pieces of 4, 4 and 2."""
    b = GraphBuilder()
    table = b.param("wte", (10, 4), dtype=dtype, trainable=trainable)
    ids = b.input("ids", ("batch",), torch.int64)
    labels = b.input("labels", ("batch",), torch.int64)
    x = b.call(aten.embedding.default, table, ids)
    logits = b.call(aten.linear.default, x, table)
    wide = b.call(aten._to_copy.default, logits, kwargs={"dtype": torch.float32})
    loss = b.call(aten.cross_entropy_loss.default, wide, labels, None, reduction, 3, smoothing)
    total = loss if reduction else b.call(aten.sum.default, loss)
    return built(b, total, logits)


def inputs_for(gm: fx.GraphModule) -> list[Any]:
    """Random inputs; indices reach every piece, and label 3 is to be ignored."""
    rows = {"ids": torch.tensor([0, 9, 4, 7, 3]), "labels": torch.tensor([3, 8, 0, 5, 9])}
    named = zip(placeholders(gm), random_inputs(gm), strict=True)
    return [rows.get(str(meta(n).name), x) for n, x in named]


def check(gm: fx.GraphModule, *, bitwise: bool = False, ctx: PassContext | None = None) -> str:
    """Chunk a graph, see that it means the same, and return its text."""
    before = copy.deepcopy(gm)
    assert Chunk().apply(gm, ctx or PassContext()).modified
    assert_equivalent(before, gm, inputs_for(before), bitwise=bitwise, rtol=1e-6)
    info(gm).facts |= Chunk.contract.provides
    Verifier().check(gm, after="chunk")
    return printer.text(gm)


def test_golden_and_semantics(golden: Golden) -> None:
    gm = language_model()
    golden.check(gm, "chunk_before")
    check(gm)
    golden.check(gm, "chunk_after")


@pytest.mark.parametrize(("name", "wrong"), [("labels", 10), ("labels", -2), ("ids", 10)])
def test_what_no_piece_has_is_no_number(name: str, wrong: int) -> None:
    gm = language_model()
    Chunk().apply(gm, PassContext())
    names = [meta(n).name for n in placeholders(gm)]
    inputs = inputs_for(gm)
    assert gm(*inputs)[0].isfinite()
    inputs[names.index(name)][1] = wrong
    assert gm(*inputs)[0].isnan()


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_every_reduction(reduction: int) -> None:
    assert "cross_entropy" not in check(language_model(reduction=reduction))


def test_a_narrow_table() -> None:
    assert "cross_entropy" not in check(language_model(dtype=torch.bfloat16))


@pytest.mark.parametrize("product", [False, True])
def test_lookups_keep_every_bit_and_products_almost(product: bool) -> None:
    b = GraphBuilder()
    table, bias = b.param("wte", (10, 4)), b.param("bias", (10,))
    x = b.call(aten.embedding.default, table, b.input("ids", ("batch", 3), torch.int64))
    y = b.call(aten.linear.default, x, table, bias) if product else x
    gm = built(b, b.call(aten.mean.default, x), y)
    before = copy.deepcopy(gm)
    Chunk().apply(gm, PassContext())
    ids = torch.tensor([[0, 9, 4], [3, 8, 7], [1, 2, 5], [6, 6, 0], [9, 9, 9]])
    inputs = [ids if meta(n).name == "ids" else x
              for n, x in zip(placeholders(gm), random_inputs(gm), strict=True)]  # fmt: skip
    assert_equivalent(before, gm, inputs, bitwise=not product, rtol=1e-6)


def test_what_lies_between_logits_and_loss_is_done_by_columns() -> None:
    b = GraphBuilder()
    table, shift = b.param("head", (10, 4)), b.buffer("shift", (1, 1, 10))
    x, labels = b.input("x", ("batch", 3, 4)), b.input("labels", ("batch", 2), torch.int64)
    logits = b.call(aten.linear.default, x, table)
    capped = b.call(aten.mul.Tensor, b.call(aten.tanh.default, logits), 30.0)
    shifted = b.call(aten.add.Tensor, capped, shift)
    flat = b.call(aten.reshape.default, b.call(aten.slice.Tensor, shifted, 1, 0, 2), [-1, 10])
    target = b.call(aten.reshape.default, labels, [-1])
    gm = built(b, b.call(aten.cross_entropy_loss.default, flat, target))
    before = copy.deepcopy(gm)
    Chunk().apply(gm, PassContext())
    assert_equivalent(before, gm, bitwise=False, rtol=1e-6)
    assert "cross_entropy" not in printer.text(gm)


@pytest.mark.parametrize("how", ["smoothing", "softmax", "classes in dim 1"])
def test_another_loss_takes_all_logits(how: str) -> None:
    b = GraphBuilder()
    head, x = b.param("head", (10, 4)), b.input("x", ("batch", 4))
    labels = b.input("labels", ("batch",), torch.int64)
    logits = b.call(aten.linear.default, x, head)
    if how == "softmax":
        logits = b.call(aten.softmax.int, logits, -1)
    if how == "classes in dim 1":
        logits = b.call(aten.unsqueeze.default, logits, -1)
        labels = b.call(aten.unsqueeze.default, labels, -1)
    smoothing = 0.1 if how == "smoothing" else 0.0
    args = (logits, labels, None, 1, -100, smoothing)
    gm = built(b, b.call(aten.cross_entropy_loss.default, *args))
    before = copy.deepcopy(gm)
    Chunk().apply(gm, PassContext())
    assert printer.summary(gm)["aten.cross_entropy_loss"] == 1
    assert printer.summary(gm)["aten.linear"] == 3
    assert_equivalent(before, gm, bitwise=True)


def test_other_uses_put_the_pieces_together() -> None:
    b = GraphBuilder()
    table = b.param("table", (10, 4))
    x = b.call(aten.matmul.default, table, b.input("x", (4, 2)))
    gm = built(b, b.call(aten.mean.default, x))
    result = Chunk().apply(gm, PassContext())
    assert result.notes == ("1 tables put together for other uses",)
    assert not result.modified


def test_a_frozen_table_stays_whole_where_its_rows_are_read() -> None:
    text = check(language_model(trainable=False), ctx=PassContext(by_rows=True))
    assert text.count("aten.embedding") == 1
    assert text.count("aten.linear") == 3
    assert check(language_model(trainable=False)).count("aten.embedding") == 3


def test_a_table_in_one_piece_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST", 1000)
    assert not Chunk().apply(language_model(), PassContext()).modified


def test_idempotent() -> None:
    assert_idempotent(Chunk(), language_model())


def test_a_table_that_is_cast_is_looked_up_by_pieces() -> None:
    """The gather pass reads rows of parameters alone, so this one must not stay whole."""
    b = GraphBuilder()
    table = b.param("wte", (10, 4), trainable=False)
    narrow = b.call(aten._to_copy.default, table, kwargs={"dtype": torch.bfloat16})
    x = b.call(aten.embedding.default, narrow, b.input("ids", ("batch",), torch.int64))
    gm = built(b, b.call(aten.sum.default, x), x)
    text = check(gm, bitwise=True, ctx=PassContext(by_rows=True))
    assert text.count("aten.embedding") == 3
