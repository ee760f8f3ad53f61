"""Runs whose weights are stored in a format: the same bits anywhere, and what is lost."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

import zograph
from tests.conftest import SPEC
from tests.zograph.seedlog import runs
from tests.zograph.test_offload import SERIAL, Outcome, compiled, train, usual
from zograph.device import DeviceSpec
from zograph.errors import LogError, ModelError, OptionError
from zograph.formats import BLOCK, FORMATS
from zograph.kernels import codec as kernel
from zograph.seedlog.identity import NUMERIC
from zograph.slots import DeviceSlots, Slots, StagedSlots
from zograph.stores.extents import fingerprint

RHYTHM: dict[str, Any] = {"evaluate": lambda i: i % 5 == 3, "synchronize": lambda i: i == 4}
RUNS = [
    ("float32", "bfloat16", 1, "nearest"),
    ("float32", "int8", 3, "stochastic"),
    *(
        pytest.param(*run, marks=pytest.mark.slow)
        for run in (
            ("float32", "float16", 3, "stochastic"),
            ("float32", "float8_e4m3fn", 3, "nearest"),
            ("float32", "int8", 1, "nearest"),
            ("bfloat16", "float8_e5m2", 3, "stochastic"),
            ("bfloat16", "int8", 1, "nearest"),
        )
    ),
]


@pytest.fixture(autouse=True)
def _work_folders_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("base", "dtype", "period", "rounding"), RUNS)
def test_where_weights_live_changes_no_bit(
    base: str, dtype: str, period: int, rounding: str
) -> None:
    """Every budget, tier and schedule, with evaluations and synchronisations in between."""
    options: dict[str, Any] = {"transfer_dtype": dtype, "rounding": rounding}
    options |= {"fold_every": period, "weight_decay": 0.1}

    def run(**ways: Any) -> tuple[Outcome, int, int]:
        step = compiled("toy", getattr(torch, base), **options, **ways)
        found = train(step, usual("toy"), 7, **RHYTHM)
        step.prepare(**usual("toy")(0)[0])
        plan = step.plan if step.streamed else None
        step.close()
        return found, plan.device_bytes if plan else 0, plan.resident if plan else 0

    expected, _, _ = run()
    found, least, resident = run(memory="minimum")
    assert (found == expected, resident) == (True, 0)
    assert run(memory=int(least * 1.15), storage="disk")[0] == expected
    for ways in (
        {"memory": "minimum", "storage": "disk", "passes": SERIAL},
        {"storage": "disk"},
        {"memory": 1 << 40},
    ):
        assert run(**ways)[0] == expected, ways
    other = compiled("toy", getattr(torch, base), **options | {"rounding": "nearest"})
    same = train(other, usual("toy"), 7, **RHYTHM) == expected
    assert same == (rounding == "nearest")


class Cudart:
    """Pins nothing."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_the_slots_of_a_gpu(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: copies between slots, pinned buffers and the disk; the definition's engine."""
    options: dict[str, Any] = {"transfer_dtype": "int8", "rounding": "stochastic", "fold_every": 2}
    expected = train(compiled("toy", **options), usual("toy"), 5, **RHYTHM)
    made: list[Slots] = []

    def open_slots(*args: Any) -> Slots:
        on_disk = storage == "disk"
        made.append(StagedSlots(*args, cudart=Cudart()) if on_disk else DeviceSlots(*args))
        return made[-1]

    spec = replace(SPEC, kind="cuda")
    monkeypatch.setattr(DeviceSpec, "measure", classmethod(lambda *_, **__: spec))
    monkeypatch.setattr("zograph.runtime.open_slots", open_slots)
    monkeypatch.setattr(kernel, "serves", lambda weight: False)
    step = compiled("toy", memory="minimum", storage=storage, **options)
    assert train(step, usual("toy"), 5, **RHYTHM) == expected
    assert made
    step.close()


def square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(x).square().mean()
    return loss


def eight_layers(**options: Any) -> zograph.ZOStep:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    return zograph.compile(model, loss_fn=square, device="cpu", backend="eager", **options)


def test_resident_weights_are_held_encoded() -> None:
    """Of one budget, a narrower format leaves more weights on the device."""
    stay, x = [], torch.ones(2, 256)
    for dtype in (None, "bfloat16", "int8"):
        step = eight_layers(transfer_dtype=dtype, memory=2_000_000)
        step.prepare(x=x)
        assert step.plan.device_bytes <= 2_000_000
        stay.append(step.plan.resident)
    assert stay[0] < stay[1] < stay[2] <= 8


def test_several_directions_and_batches_over_a_table_that_is_tied() -> None:
    options: dict[str, Any] = {"transfer_dtype": "int8", "directions": 2, "fold_every": 2}
    options |= {"compute_dtype": torch.bfloat16, "distribution": "rademacher"}
    batches = lambda i: [*usual("toy")(i), *usual("toy")(i + 1)]  # noqa: E731
    expected = train(compiled("toy", **options), batches, 5)
    step = compiled("toy", **options, memory="minimum", storage="disk")
    assert train(step, batches, 5) == expected


def moved_in_a_step(storage: str, dtype: str | None) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of a later step, counted and planned."""
    step = eight_layers(memory="minimum", storage=storage, transfer_dtype=dtype)
    counts = []
    for _ in range(3):
        step(x=torch.ones(2, 256))
        assert step._running is not None
        step._running.drain()
        assert step._running.slots is not None
        counts.append(dict(step._running.slots.moved_bytes))
    planned = step.plan.bytes_moved
    step.close()
    return {str(s): n - counts[1][s] for s, n in counts[2].items() if n}, planned


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bytes_fall_by_the_width_of_the_format(dtype: str) -> None:
    numel, form = 8 * 256 * 256, FORMATS[dtype]
    expected = numel * form.dtype.itemsize + (4 * numel // BLOCK if form.scaled else 0)
    full, _ = moved_in_a_step("host", None)
    found, planned = moved_in_a_step("host", dtype)
    assert full == {"to_device": 4 * numel, "to_host": 4 * numel}
    assert found == planned == {"to_device": expected, "to_host": expected}
    factor = {2: 2.0, 1: 4.0}[form.dtype.itemsize] / (132 / 128 if form.scaled else 1)
    assert full["to_device"] / expected == pytest.approx(factor)
    found, planned = moved_in_a_step("disk", dtype)
    assert planned == {"read": expected, "write": expected}
    assert 0 <= found["read"] - expected < 8 * 4096  # whole pages
    assert 8 * 4096 <= found["write"] - expected < 16 * 4096  # and a page of header


def distance(step: zograph.ZOStep, start: dict[str, torch.Tensor]) -> float:
    step.synchronize()
    now = step.model.state_dict()
    return sum(float((now[n] - w).abs().max()) for n, w in start.items() if w.dim() > 1)


def test_small_updates_live_in_the_log_between_folds() -> None:
    """Cast in every step they are lost, as in ZO2's mode; put off they arrive."""

    def run(**options: Any) -> tuple[float, zograph.ZOStep]:
        step = runs.start(transfer_dtype="bfloat16", weight_decay=0.0, **options)
        step.synchronize()
        start = {n: t.clone() for n, t in step.model.state_dict().items()}
        runs.take(step, range(15))
        return distance(step, start), step

    lr = {"lr": 3e-8}
    cast, _ = run(**lr)
    assert cast == 0.0
    put_off, step = run(**lr, fold_every=16)
    assert put_off > 0.0
    exact = runs.start(**lr, weight_decay=0.0)
    base = {n: t.to(torch.bfloat16).float() if t.dim() > 1 else t
            for n, t in exact.model.state_dict().items()}  # fmt: skip
    exact.model.load_state_dict(base)
    runs.take(exact, range(15))
    close = zip(runs.values(exact).values(), runs.values(step).values(), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in close)
    moved, _ = run(lr=1e-6, rounding="stochastic")
    assert moved > 0.0


BUDGET = {
    "bfloat16": 2**-11, "float16": 2**-14, "float8_e4m3fn": 2**-7, "float8_e5m2": 2**-6,
    "int8": 2**-10,
}  # fmt: skip
"""What docs/numerics.md says: relative change of the loss of the first step."""


@pytest.mark.parametrize("dtype", FORMATS)
def test_first_losses_are_within_the_documented_budget(dtype: str) -> None:
    losses = []
    for form in (None, dtype):
        step = compiled("opt", transfer_dtype=form)
        step(**usual("opt")(0)[0])
        assert step.last is not None
        losses.append((step.last.loss_plus, step.last.loss_minus))
    for exact, found in zip(*losses, strict=True):
        assert 0 < abs(found - exact) <= BUDGET[dtype] * abs(exact)


WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "host": {"memory": "minimum"},
    "disk": {"memory": "minimum", "storage": "disk"},
}


@pytest.mark.parametrize(("dtype", "period"), [("bfloat16", 1), ("int8", 4)])
def test_a_resumed_run_has_the_same_bits(dtype: str, period: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"transfer_dtype": dtype, "rounding": "stochastic"}
    whole = runs.start(**options, fold_every=period)
    expected = runs.take(whole, range(12))
    step = runs.start(**options, fold_every=period, log="run.zolog", **WAYS["disk"])
    found = runs.take(step, range(5))
    for first, way in ((5, "disk"), (7, "resident"), (9, "host"), (10, "disk")):
        step.close()
        step = runs.resume("run.zolog", **WAYS[way])
        assert step.options.transfer_dtype is getattr(torch, dtype)
        assert step.options.rounding == "stochastic"
        found += runs.take(step, range(first, {5: 7, 7: 9, 9: 10, 10: 12}[first]))
    assert found == expected
    one, two = runs.values(step), runs.values(whole)
    assert all(torch.equal(one[n], two[n]) for n in two)
    step.close()
    for other in ({"transfer_dtype": None}, {"transfer_dtype": "float16"}, {"fold_every": 2}):
        with pytest.raises((LogError, OptionError), match=r"written with|transfer_dtype"):
            runs.resume("run.zolog", **other)
    with pytest.raises(LogError, match="written with rounding='stochastic'"):
        runs.resume("run.zolog", rounding="nearest")


def test_a_log_without_formats_refuses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was written before there were any."""
    runs.start(log="run.zolog").close()
    with pytest.raises(LogError, match="written with transfer_dtype=None"):
        runs.resume("run.zolog", transfer_dtype="bfloat16")
    names = tuple(n for n in NUMERIC if n not in ("transfer_dtype", "rounding"))
    with monkeypatch.context() as patch:
        patch.setattr("zograph.seedlog.identity.NUMERIC", names)
        runs.start(log="old.zolog").close()
    runs.resume("old.zolog").close()
    with pytest.raises(LogError, match="written with transfer_dtype=None"):
        runs.resume("old.zolog", transfer_dtype="bfloat16")


def test_a_work_file_is_of_one_format() -> None:
    table = {f: runs.start(transfer_dtype=f)._weights.table for f in (None, "bfloat16", "int8")}
    assert len({fingerprint(t) for t in table.values()}) == 3


def test_the_model_shows_decoded_values() -> None:
    step = compiled("toy", transfer_dtype="float8_e5m2", memory="minimum", storage="disk")
    given = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    found = step.state_dict()
    for name, weight in given.items():
        decoded = weight.to(torch.float8_e5m2).float() if weight.dim() > 1 else weight
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], decoded), name
    logits = step.evaluate(**usual("toy")(0)[0])["logits"]
    plain = compiled("toy")
    plain.model.load_state_dict(step.model.state_dict())
    assert torch.equal(plain.evaluate(**usual("toy")(0)[0])["logits"], logits)
    step.save_pretrained("out")
    saved = compiled("toy").model
    load_model(saved, "out/model.safetensors")
    assert all(torch.equal(p, found[n]) for n, p in saved.named_parameters())


def test_outliers_are_told_once_and_nan_is_refused() -> None:
    model = runs.model()
    with torch.no_grad():
        model[2].weight[0, :3] = 1e6
    options: dict[str, Any] = runs.OPTIONS | {"loss_fn": runs.loss}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = zograph.compile(model, transfer_dtype="float16", fold_every=2, **options)
        runs.take(step, range(3))
    (told,) = (str(w.message) for w in caught if "beyond the range" in str(w.message))
    assert told.startswith("3 elements of 1 weights")
    assert "the most, 3, in '2.weight'" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zograph.compile(runs.model(), transfer_dtype="float16", **options)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"'2.weight' has 1 elements that are NaN"):
        zograph.compile(model, transfer_dtype="int8", **options)


def test_options() -> None:
    with pytest.raises(OptionError, match="'int4' is unknown; use one of bfloat16"):
        runs.start(transfer_dtype="int4")
    with pytest.raises(OptionError, match="rounding='up' is unknown"):
        runs.start(transfer_dtype="int8", rounding="up")
    with pytest.raises(OptionError, match="pass transfer_dtype too"):
        runs.start(rounding="stochastic")


def test_auto_decides_with_encoded_weights() -> None:
    step = runs.start(transfer_dtype="int8", fold_every="auto", log="run.zolog", **WAYS["disk"])
    found = runs.take(step, range(4))
    period = step.fold_every
    step.close()
    same = runs.start(transfer_dtype="int8", fold_every=period)
    assert runs.take(same, range(4)) == found


def test_a_picture_shows_both_ways() -> None:
    step = compiled("toy", transfer_dtype="int8", memory="minimum")
    step.prepare(**usual("toy")(0)[0])
    text = str(step.draw("step.dot").read_text())
    assert "decode" in text
    assert "encode" in text


@pytest.mark.slow
def test_a_plan_on_paper_counts_stored_bytes() -> None:
    tokens = usual("opt")(0)[0]
    model = compiled("opt").model
    plans = [
        zograph.plan(model, batch=tokens, memory="minimum", device=SPEC, transfer_dtype=form)
        for form in (None, "bfloat16", "int8")
    ]
    moved = [p.bytes_moved["to_device"] for p in plans]
    assert all(a > b for a, b in itertools.pairwise(moved))
    assert [p.items.get("decoded weights", 0) > 0 for p in plans] == [False, True, True]
