"""How long a streamed weight goes unwritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import zograph
from tests.conftest import SPEC
from zograph.device import DeviceSpec
from zograph.elision import PERIODS, choose_period
from zograph.errors import LogError, OptionError
from zograph.seedlog import read_log


def test_the_shortest_step_is_chosen() -> None:
    seconds = {1: 2.0, 2: 1.5, 4: 1.2, 8: 1.3, 16: 1.9}
    assert choose_period(seconds.__getitem__) == 4


def test_a_longer_period_must_be_worth_it() -> None:
    assert choose_period(lambda k: 2.0 - 0.01 * (k == 8)) == 1
    assert choose_period(lambda k: 2.0 - 0.05 * (k >= 4)) == 4, "the shortest of equal ones"


@pytest.fixture
def decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | None]:
    """Return a function: what auto decides for a small model on a machine of these rates."""
    monkeypatch.chdir(tmp_path)

    def decided(directions: int = 1, **rates: float) -> int | None:
        spec = replace(SPEC, **{"read": 4e9, "write": 2e9, "disk_both": 4e9, "fold": 1e9} | rates)
        monkeypatch.setattr(DeviceSpec, "measure", lambda *_, **__: spec)
        options = {"loss_fn": loss, "backend": "eager", "memory": "minimum", "storage": "disk"}
        with zograph.compile(model(), fold_every="auto", directions=directions, **options) as step:
            step.prepare(**BATCH)
            return step.fold_every

    return decided


def test_slower_writes_are_put_off_for_longer(decide: Callable[..., int | None]) -> None:
    found = [decide(write=w) or 0 for w in (1e12, 1e8, 1e6)]
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == PERIODS[-1]


def test_compute_that_hides_the_writes_keeps_the_period_at_one(
    decide: Callable[..., int | None],
) -> None:
    assert decide(write=1e8, noise=1e5) == 1


def test_each_direction_is_a_term_more(decide: Callable[..., int | None]) -> None:
    one, many = (decide(directions=d, write=1e8) or 0 for d in (1, 16))
    assert many < one


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 4))


def loss(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(m(x), y)


BATCH = {"x": torch.ones(3, 64), "y": torch.tensor([0, 1, 3])}


def test_auto_is_decided_once_and_stands_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slow, fast = replace(SPEC, write=1e6, fold=1e10), replace(SPEC, write=1e12, disk_both=2e12)
    options = {"loss_fn": loss, "backend": "eager", "memory": "minimum", "storage": "disk"}
    monkeypatch.setattr(DeviceSpec, "measure", lambda *_, **__: slow)
    step = zograph.compile(model(), fold_every="auto", log="run.zolog", **options)
    assert step.fold_every is None
    step.evaluate(**BATCH)
    step.synchronize()
    assert step.fold_every is None
    with pytest.raises(RuntimeError, match="the log is empty"):
        step.save("copy.zolog")
    for _ in range(3):
        step(**BATCH)
    period = step.fold_every
    assert period is not None
    assert period > 1
    assert read_log("run.zolog").header.options["fold_every"] == period
    step.close()
    monkeypatch.setattr(DeviceSpec, "measure", lambda *_, **__: fast)
    step = zograph.resume(model(), "run.zolog", fold_every="auto", **options)
    step(**BATCH)
    assert step.fold_every == period
    step.close()
    step = zograph.resume(model(), "run.zolog", fold_every=1, **options)  # float32: any will do
    step(**BATCH)
    step.close()


def test_the_period_of_a_narrow_base_cannot_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    narrow = {"x": BATCH["x"].bfloat16(), "y": BATCH["y"]}
    options = {"loss_fn": loss, "backend": "eager"}
    step = zograph.compile(model().bfloat16(), fold_every=3, log="run.zolog", **options)
    step(**narrow)
    step.close()
    with pytest.raises(LogError, match=r"fold_every=3.*Leave fold_every out"):
        zograph.resume(model().bfloat16(), "run.zolog", fold_every=2, **options)


@pytest.mark.parametrize("period", [0, -1, 1.5, True, "often"])
def test_no_period(period: object) -> None:
    with pytest.raises(OptionError, match=r"fold_every is .*1 or more steps, or 'auto'"):
        zograph.compile(model(), fold_every=period, backend="eager")  # type: ignore[arg-type]
