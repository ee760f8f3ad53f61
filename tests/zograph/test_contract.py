"""Numerics contract 1: the compiled step against an eager loop, architecture by architecture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import zograph
from tests.reference import Reference
from tests.zoo import TIES, ZOO, batch, build, loss_fn
from zograph.noise import derive_seed

SHAPES = [(4, 16), (2, 9), (3, 16)]
ONE_ROW = (1, 12)  # a graph of its own: export fixes sizes of 1
STEPS = 50
CASES = [(name, tie) for name in ZOO for tie in ((True, False) if name in TIES else (True,))]
EPS, LR = 1e-3, 1e-3


def check_contract(
    name: str, tie: bool, backend: str, steps: int = STEPS, device: str = "cpu"
) -> None:
    shapes = [*SHAPES, ONE_ROW] if backend == "eager" or name in ("opt", "cnn") else SHAPES
    model = build(name, tie=tie).to(device)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    probe = Reference(copy.deepcopy(model), loss_fn(name), eps=EPS)  # at the step's own weights
    replay = Reference(copy.deepcopy(model), loss_fn(name), eps=EPS)  # fed the recorded gradients
    step = zograph.compile(
        model,
        loss_fn=loss_fn(name),
        lr=LR,
        eps=EPS,
        weight_decay=0.1,
        backend=backend,
        device=device,
    )
    for i in range(steps):
        made = batch(name, *shapes[i % len(shapes)], seed=i)
        data = {key: value.to(device) for key, value in made.items()}
        step.synchronize()
        probe.model.load_state_dict(model.state_dict())
        step(**data)
        record = step.last
        assert record is not None
        assert record.step == i
        plus, minus = probe.losses(data, record.seed)
        assert record.loss_plus == pytest.approx(plus, rel=1e-5)  # (a)
        assert record.loss_minus == pytest.approx(minus, rel=1e-5)
        reference = (plus - minus) / (2 * EPS)
        assert abs(record.projected_grad - reference) <= 1e-5 * abs(plus) / EPS  # (c)
        replay.update(record.seed, -LR * record.projected_grad, 1 - LR * 0.1)
    step.synchronize()
    for (n, p), q in zip(model.named_parameters(), replay.model.parameters(), strict=True):
        moved = (q - start[n]).norm()
        assert (p - q).norm() <= 1e-6 * (q.norm() + moved), n  # (b)
        assert moved > 0, n


def cases(*fast: str) -> list[Any]:
    """Return all cases, slow but for some; both backends of a case share a capture."""
    return [
        pytest.param(
            *(name, tie),
            marks=[
                pytest.mark.xdist_group(f"{name}, {tie}"),
                *(() if name in fast and tie else [pytest.mark.slow]),
            ],
        )
        for name, tie in CASES
    ]


@pytest.mark.parametrize(("name", "tie"), cases("opt", "gpt2", "bert", "vit", "cnn", "mlp"))
def test_eager(name: str, tie: bool) -> None:
    check_contract(name, tie, "eager")


@pytest.mark.parametrize(("name", "tie"), cases())
def test_inductor(name: str, tie: bool) -> None:
    check_contract(name, tie, "inductor")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "eager") for name in ZOO), ("opt", "inductor"), ("cnn", "inductor")],
)
def test_on_a_gpu(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the contract is of float32
    check_contract(name, True, backend, 20, "cuda")


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that perturbs with another seed than it records is noticed."""
    honest = derive_seed
    monkeypatch.setattr(
        Reference, "noise", lambda self, n, s: zograph.noise(n, self.trainable[n].shape, s + 1)
    )
    assert honest(0, 0, 0) != honest(0, 1, 0)
    with pytest.raises(AssertionError):
        check_contract("mlp", True, "eager", 2)
