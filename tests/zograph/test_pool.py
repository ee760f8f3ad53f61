"""The pool under compiled code: the op's bits, and outputs that stay whole while they live.

The pool's own tests stand with the ops' in test_ops.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor import standalone_compile
from torch.fx.experimental.proxy_tensor import make_fx

import zograph.ops  # noqa: F401  (registers the op)
from zograph.pool import SMALL, pool


def body(
    w: Tensor, seeds: Tensor, coefs: Tensor, scales: Tensor, keys: Tensor, seed: Tensor, eps: Tensor
) -> tuple[Tensor, ...]:
    """Two outputs of the op returned as they are, two more consumed by code Inductor writes."""
    rest = (keys, 1, seed, eps, torch.bfloat16, "normal", True)
    plus, minus = torch.ops.zograph.materialize(w * 2, seeds, coefs, scales, *rest)
    used, unused = torch.ops.zograph.materialize(w, seeds, coefs, scales, *rest)
    return plus, minus, used.float() + 1, torch.relu(unused)


def inputs(seed: int) -> list[Tensor]:
    w = torch.randn(65, 1025, generator=torch.Generator().manual_seed(1))
    assert w.numel() * torch.bfloat16.itemsize > SMALL  # so that the pool serves it
    terms = [torch.tensor([4, -7]), torch.tensor([1e-2, -3e-2]), torch.tensor([1.0, 0.5])]
    return [w, *terms, torch.tensor([[17, 0], [23, 0]]), torch.tensor(seed), torch.tensor(1e-3)]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_standalone_compiled_code_has_the_same_bits_and_spares_live_memory() -> None:
    graph = make_fx(body, tracing_mode="fake")(*inputs(1))
    compiled = standalone_compile(graph, inputs(1), dynamic_shapes="from_example_inputs")
    pool.clear()
    kept = [tuple(compiled(*inputs(seed))) for seed in range(6)]  # the seed is an input
    for seed, found in enumerate(kept):
        assert same(found, body(*inputs(seed)))
    assert not same(kept[0], kept[1])
    held = pool.bytes
    for seed in range(10):  # dead outputs: no new memory
        compiled(*inputs(seed))
    assert pool.bytes <= held + 4 * 2 * 140_000
    assert len({t.data_ptr() for found in kept for t in found[:2]}) == 12


def test_negative_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were live memory recycled, results kept from earlier calls would change."""
    monkeypatch.setattr("zograph.pool._Slot.free", lambda slot: True)
    kept = [body(*inputs(seed)) for seed in range(3)]
    monkeypatch.undo()
    assert not all(same(found, body(*inputs(seed))) for seed, found in enumerate(kept))
