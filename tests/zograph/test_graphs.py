"""Which graph serves a batch, and that nothing but the batch decides."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import zograph
from tests.zoo import batch, build, loss_fn
from zograph.signature import signatures


def level(step: zograph.ZOStep) -> str:
    assert step._graphs.last is not None
    return step._graphs.last.capture.signature.level


@pytest.mark.parametrize(
    "name",
    [
        *("opt", "llama", "gpt2", "bert", "vit", "cnn"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "bart")),
    ],
)
def test_one_capture_serves_all_sizes(name: str) -> None:
    step = zograph.compile(build(name), loss_fn=loss_fn(name), backend="eager")
    seen = set()
    for rows, length in [(4, 16), (2, 9), (7, 30), (3, 8)]:
        step.prepare(**batch(name, rows, length))
        seen.add(id(step.graph))
    assert len(seen) == 1
    assert level(step) in ("sequence", "short")


@pytest.mark.slow
def test_the_order_of_batches_does_not_matter() -> None:
    shapes = [(4, 16), (1, 12), (2, 40), (3, 3)]
    found: dict[tuple[int, int], set[float]] = {}
    for order in itertools.islice(itertools.permutations(shapes), 0, 24, 7):
        step = zograph.compile(build("bert"), lr=0.0, backend="eager")
        for rows, length in order:
            for _ in range(2):
                data = batch("bert", rows, length)
                out = step.evaluate(**data)
                found.setdefault((rows, length), set()).add(float(out.loss))
    assert all(len(losses) == 1 for losses in found.values())


def test_sizes_beyond_a_graphs_range_get_their_own() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(9, 4)
            self.pos = nn.Parameter(torch.randn(48, 4))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return (self.emb(ids) + self.pos[: ids.shape[1]]).square().mean()

    step = zograph.compile(Short(), backend="eager")
    step.prepare(ids=torch.zeros(2, 16, dtype=torch.int64))
    assert level(step) == "short"
    step.prepare(ids=torch.zeros(2, 48, dtype=torch.int64))
    assert level(step) == "short"
    with pytest.raises(zograph.errors.CaptureError, match="Short could not be captured"):
        step.prepare(ids=torch.zeros(2, 49, dtype=torch.int64))


def test_a_static_model_is_captured_per_shape_with_one_warning() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = self.w.sum()
            for row in range(x.shape[0]):  # unrolled: as many calls as rows
                total = total + (x[row] * self.w).sum()
            return total

    step = zograph.compile(Fixed(), backend="eager")
    for rows in range(2, 10):
        step.prepare(x=torch.ones(rows, 3))
        assert level(step) == "static"
    with pytest.warns(UserWarning, match="captured for 9 kinds of batches"):
        step.prepare(x=torch.ones(10, 3))


def test_dynamic_off_captures_every_shape() -> None:
    step = zograph.compile(build("mlp"), loss_fn=loss_fn("mlp"), backend="eager", dynamic=False)
    for rows in (2, 3):
        step.prepare(**batch("mlp", rows, 0))
        assert level(step) == "static"


def test_signatures() -> None:
    data = {"ids": torch.zeros(4, 16, dtype=torch.int64), "labels": torch.zeros(4), "k": 2}
    general, short, rows, static, values = signatures(data)
    assert str(general) == "['ids']: int64[batch, seq0], ['labels']: float32[batch], ['k']=2"
    assert short.leaves == general.leaves
    assert str(rows) == "['ids']: int64[batch, 16], ['labels']: float32[batch], ['k']=2"
    assert str(static) == "['ids']: int64[4, 16], ['labels']: float32[4], ['k']=2"
    assert values.leaves == static.leaves
    two_lengths = {"a": torch.zeros(4, 9, dtype=torch.int64), "b": torch.zeros(4, 5).bool()}
    assert str(next(iter(signatures(two_lengths)))) == (
        "['a']: int64[batch, seq0], ['b']: bool[batch, seq1]"
    )


@pytest.mark.slow
def test_tied_names_are_one_parameter() -> None:
    """Two names of one tensor are one parameter, under its first name."""
    model = build("bart")
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(model.named_parameters())) + 3
    step = zograph.compile(model, backend="eager")
    step.prepare(**batch("bart", 2, 9))
    from zograph.ir import Kind, meta, placeholders

    found = [meta(n).name for n in placeholders(step.graph, Kind.PARAMETER)]
    assert len(found) == len(set(found))
    assert set(found) <= {n for n, _ in model.named_parameters()}


def test_a_trace_that_fixes_a_size_ends_there() -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(9, 4)
            self.traced = 0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            state = self.emb(ids[:, 0])
            for i in range(ids.shape[1]):
                self.traced += 1
                state = torch.tanh(state + self.emb(ids[:, i]))
            return state.square().mean()

    model = Scan()
    traced: list[int] = []
    model.register_forward_hook(lambda m, _args, _out: traced.append(m.traced))
    step = zograph.compile(model, loss_fn=lambda m, ids: m(ids), backend="eager")
    step.prepare(ids=torch.randint(0, 9, (4, 6)))
    assert level(step) == "batch"
    assert traced == [6]  # two traces of longer stand-ins came before and did not get to the end
