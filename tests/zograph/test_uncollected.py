"""The cyclic collector waits while graphs are built, and is as it was afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import zograph
from zograph.errors import CaptureError
from zograph.memory import uncollected


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    yield
    gc.enable()


class Noting(nn.Linear):
    """Notes whether the collector runs while the model is captured."""

    def forward(self, x: torch.Tensor, fails: bool = False) -> torch.Tensor:
        if fails:
            raise ValueError
        NOTES.append(gc.isenabled())
        return super().forward(x).sum()


NOTES: list[bool] = []


def test_a_capture_is_not_interrupted() -> None:
    NOTES.clear()
    step = zograph.compile(Noting(4, 4), device="cpu", backend="eager", memory="minimum")
    step.prepare(x=torch.ones(2, 4))
    assert NOTES
    assert not any(NOTES)
    assert gc.isenabled()


def test_a_failure_restores_it() -> None:
    step = zograph.compile(Noting(4, 4), device="cpu", backend="eager")
    with pytest.raises(CaptureError):
        step.prepare(x=torch.ones(2, 4), fails=True)
    assert gc.isenabled()


def test_one_that_is_off_stays_off() -> None:
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()
