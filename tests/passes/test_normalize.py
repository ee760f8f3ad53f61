from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from zograph.errors import PassError
from zograph.ir import info, output
from zograph.passes import Normalize, PassContext
from zograph.testing import (
    Golden,
    GraphBuilder,
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
    assert_rejects,
    capture_function,
)
from zograph.verifier import Verifier

aten = torch.ops.aten


def untidy() -> fx.GraphModule:
    b = GraphBuilder()
    x, w = b.input("x", (2, 3)), b.param("w", (3, 3))
    a = b.call(aten.linear.default, x, w)
    a = b.call(aten.dropout.default, a, 0.5, False)
    a = b.call(aten.view.default, a, [2, 3])
    c = b.call(aten.relu.default, a)
    d = b.call(aten.relu.default, b.call(aten.clone.default, a))
    e = b.call(aten.add.Tensor, c, d)
    b.call(aten.neg.default, e)  # dead
    return b.build(b.call(aten.mean.default, e))


def test_golden_and_semantics(golden: Golden) -> None:
    gm = untidy()
    before = copy.deepcopy(gm)
    golden.check(gm, "normalize_before")
    result = Normalize().apply(gm, PassContext())
    golden.check(gm, "normalize_after")
    assert result.modified
    assert "3 copies dropped" in result.notes
    assert_node_delta(before, gm, added=0, removed=5)
    assert_equivalent(before, gm)
    Verifier().check(gm, after="normalize")


def test_idempotent() -> None:
    assert_idempotent(Normalize(), untidy())


def test_dropped_dropout_leaves_the_strides_of_its_argument() -> None:
    """A trace notes dense strides behind inactive dropout; what runs keeps those of an expand."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.drop = nn.Parameter(torch.randn(3, 2)), nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.drop(self.w[:, None].expand(-1, len(x), -1)).type_as(self.w)
            return (rows * x).square().mean()

    gm = capture_function(Model().eval(), x=torch.randn(4, 2))
    before = copy.deepcopy(gm)
    Normalize().apply(gm, PassContext())
    Verifier().check(gm, after="normalize")
    assert_equivalent(before, gm)
    assert_idempotent(Normalize(), before)


def test_numbers_and_their_types_are_told_apart() -> None:
    b = GraphBuilder()
    x = b.input("x", (2,))
    one, true = (b.call(aten.add.Tensor, x, v) for v in (1, 1.0))
    gm = b.build(b.call(aten.add.Tensor, one, true))
    assert not Normalize().apply(gm, PassContext()).modified


def test_random_operators_are_rejected() -> None:
    b = GraphBuilder()
    x = b.input("x", (2,))
    noise = b.call(aten.rand_like.default, x)
    gm = b.build(b.call(aten.mean.default, b.call(aten.mul.Tensor, x, noise)))
    assert_rejects(Normalize(), gm, PassError, "draws random numbers")


def test_narrow_loss_is_reduced_in_float32() -> None:
    b = GraphBuilder()
    logits = b.input("logits", (4, 3), torch.bfloat16)
    labels = b.input("labels", (4,), torch.int64)
    loss = b.call(aten.cross_entropy_loss.default, logits, labels)
    gm = b.build(b.call(aten.mul.Tensor, loss, 2.0))
    result = Normalize().apply(gm, PassContext())
    assert "1 inputs of the loss cast to float32" in result.notes
    assert output(gm).args[0][0].meta["val"].dtype == torch.float32
    x, y = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    assert torch.equal(gm(x, y)[0], nn.functional.cross_entropy(x.float(), y) * 2)
    assert_idempotent(Normalize(), gm)


@pytest.mark.parametrize("sizes", [(2, 5), (4, 9)])
def test_sizes_are_read_once_from_inputs(sizes: tuple[int, int]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(9, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.emb(ids)
            rows, length = x.shape[0], x.shape[1]
            return x.reshape(rows * length, 4).mean() * length

    ids = torch.randint(0, 9, sizes)
    gm = capture_function(Model(), ids=ids)
    before = copy.deepcopy(gm)
    Normalize().apply(gm, PassContext())
    readers = [n for n in gm.graph.nodes if n.target is aten.sym_size.int]
    assert all(n.args[0].op == "placeholder" for n in readers)
    assert len(readers) == len({n.args[1] for n in readers})
    info(gm).facts |= {"normalized"}
    Verifier().check(gm, after="normalize")
    table = torch.randn(9, 4)
    assert_equivalent(before, gm, [table, ids])
