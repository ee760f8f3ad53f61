"""Streaming on a GPU: the bits of the resident run, and no host synchronise inside a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zograph
from tests.zoo import batch, build, loss_fn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 6


def run(
    name: str, memory: int | str | None, storage: str
) -> tuple[list[object], list[torch.Tensor]]:
    model = build(name)
    step = zograph.compile(
        model,
        loss_fn=loss_fn(name),
        lr=1e-2,
        device="cuda",
        memory=memory,
        storage=storage,
        backend="eager",
    )
    with step:
        losses: list[object] = []
        for i in range(STEPS):
            losses.append(step(**batch(name, 4, 16, seed=i)))
        step.synchronize()
        weights = [p.detach().cpu().clone() for p in model.parameters()]
        return [float(x) for x in losses], weights  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["opt", "llama", "bert", "t5", "bart", "mixtral"])
@pytest.mark.parametrize("storage", ["host", "disk"])
def test_budget_and_storage_change_no_bit(
    name: str, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = run(name, None, "host")
    for memory in ("minimum", 200_000, None):
        losses, weights = run(name, memory, storage)
        assert losses == expected[0]
        assert all(map(torch.equal, weights, expected[1]))


@pytest.fixture
def _no_synchronise() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_synchronise")
def test_a_step_does_not_wait_for_the_device() -> None:
    step = zograph.compile(build("opt"), device="cuda", memory="minimum", backend="eager")
    data = {n: t.cuda() for n, t in batch("opt", 4, 16).items()}
    with step:
        step(**data)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        step(**data)
        torch.cuda.set_sync_debug_mode("default")
        step.synchronize()


def test_a_loss_that_is_not_finite_is_told_later() -> None:
    def spiky(
        model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, spike: torch.Tensor
    ) -> object:
        return torch.nn.functional.cross_entropy(model(x), y) + spike

    model = build("mlp")
    step = zograph.compile(model, loss_fn=spiky, device="cuda", lr=1e-2, backend="eager")
    before = [p.detach().clone() for p in model.parameters()]
    step(**batch("mlp", 4, 0), spike=torch.tensor(float("nan")))
    with pytest.raises(zograph.errors.LossError, match="step 0"):
        step.synchronize()
    step.synchronize()
    assert all(
        torch.equal(a, b.cpu())
        for a, b in zip([p.cpu() for p in model.parameters()], before, strict=True)
    )
