"""How long a streamed weight goes unwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import zograph
from tests.conftest import SPEC
from zograph.device import DeviceSpec
from zograph.elision import PERIODS, choose_period, step_seconds
from zograph.errors import LogError, OptionError
from zograph.ir import ParamInfo
from zograph.layout import Layout, StageUse
from zograph.meter import Cost
from zograph.seedlog import read_log

MIB = 1 << 20


def layout(flops: int, **rates: float) -> tuple[Layout, dict[str, ParamInfo]]:
    """Eight stages of one weight of 4 MiB each, on a disk."""
    spec = replace(SPEC, **{"read": 4e9, "write": 2e9, "disk_both": 4e9, "fold": 1e9} | rates)
    names = [f"w{i}" for i in range(8)]
    cost = Cost(work=(("float32", flops, 0),))
    return Layout(
        tier="disk", spec=spec, budget="minimum", resident=frozenset(), held=0, slots=8 * MIB,
        pair=None, cut=None, fixed=0,
        uses=tuple(StageUse(i, "body", (n,), 0, cost) for i, n in enumerate(names)),
    ), {n: ParamInfo(n, (MIB,), torch.float32, True, True, 7) for n in names}  # fmt: skip


def test_slow_writes_are_put_off() -> None:
    assert choose_period(*layout(0, write=1e8), directions=1) > 1


def test_slower_writes_are_put_off_for_longer() -> None:
    found = [choose_period(*layout(0, write=w), directions=1) for w in (1e9, 3e8, 1e8, 2e7)]
    assert found == sorted(found)
    assert found[0] < found[-1] <= PERIODS[-1]


def test_compute_that_hides_the_writes_keeps_the_period_at_one() -> None:
    assert choose_period(*layout(int(1e12)), directions=1) == 1


def test_each_direction_is_a_term_more() -> None:
    one, many = (choose_period(*layout(0, write=1e8), directions=d) for d in (1, 16))
    assert many < one


@pytest.mark.parametrize("write", [1e9, 1e8])
def test_the_choice_is_the_fastest(write: float) -> None:
    found, params = layout(int(1e7), write=write)
    best = min(step_seconds(found, params, 1, k) for k in PERIODS)
    chosen = choose_period(found, params, 1)
    assert step_seconds(found, params, 1, chosen) <= 1.03 * best


def test_weights_that_stay_are_not_counted() -> None:
    found, params = layout(0, write=1e8)
    assert choose_period(replace(found, resident=frozenset(params)), params, 1) == 1


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
