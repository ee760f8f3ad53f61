"""Bad input, full disks, dead disks: one clear error, nothing lost, the same bits afterwards."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import zograph
from tests.zograph.test_offload import Toy, budgets, compiled, data, same, train, usual, weights
from zograph.errors import LossError, OptionError, PipelineError, PlanError, StoreError

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _work_folders_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def one(i: int = 0) -> dict[str, torch.Tensor]:
    return usual("toy")(i)[0]


@pytest.mark.parametrize(
    "memory",
    [0, -1, 0.0, -0.5, float("nan"), float("inf"), True, False, "", "lots", "8XB", "-3GB", "0GB",
     "1.2.3GB", "nan", "1e3GB", [8], (1, 2)],
)  # fmt: skip
def test_budgets_that_are_none(memory: Any) -> None:
    with pytest.raises(OptionError, match=r"pass bytes, '8GB', '2GiB', a fraction below 1") as e:
        compiled("toy", memory=memory)
    assert repr(memory) in str(e.value)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(5_000_000, 5_000_000), ("5MB", 5_000_000), (" 5 mb ", 5_000_000), ("2MiB", 2 << 20),
     ("123456", 123456), ("0.5kib", 512), (1e9, 10**9), (None, None), ("minimum", "minimum")],
)  # fmt: skip
def test_budgets_that_are_some(memory: Any, expected: Any) -> None:
    assert compiled("toy", memory=memory).options.memory == expected


def test_a_fraction_is_of_the_devices_memory() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert compiled("toy", memory=0.25).options.memory == int(whole * 0.25)


@pytest.mark.parametrize("storage", [None, 3, "", b"disk", ["host"]])
def test_stores_that_are_none(storage: Any) -> None:
    with pytest.raises(OptionError, match="use 'host', 'disk' or a folder's path"):
        compiled("toy", storage=storage)


def test_too_small_a_budget_says_what_is_enough() -> None:
    least = budgets("toy")["minimum"]
    step = compiled("toy", memory=least - 1)
    before = weights(step.model)
    for call in (step.prepare, step):
        with pytest.raises(PlanError, match="too small") as caught:
            call(**one())
        assert caught.value.minimum == least
        assert f"{least:,}" in str(caught.value)
        assert f"{least - 1:,}" in str(caught.value)
        assert 'memory="minimum"' in str(caught.value)
    assert step.last is None
    assert same(before, weights(step.model))
    small = {k: v[:1, :4] for k, v in one().items()}  # the run goes on with what fits
    other = compiled("toy")
    assert float(step(**small)) == float(other(**small))
    assert step.last == other.last


def test_a_larger_batch_that_does_not_fit_is_refused_before_anything_changes() -> None:
    expected = train(compiled("toy"), usual("toy"), 6)
    step = compiled("toy", memory=budgets("toy")["minimum"])
    records = []
    for i in range(6):
        if i in (2, 3):
            with pytest.raises(PlanError, match="too small") as caught:
                step(**data("toy", 16, 40, seed=i))
            assert caught.value.minimum > budgets("toy")["minimum"]
            with pytest.raises(PlanError, match="too small"):
                step(batches=[one(i), data("toy", 16, 40)])
            assert step.last == records[-1]
        step(**one(i))
        records.append(step.last)
    step.synchronize()
    assert tuple(records) == expected.records
    assert same(weights(step.model), expected.weights)


@pytest.mark.parametrize("options", [{}, {"memory": "minimum"}, {"storage": "disk"}])
@pytest.mark.parametrize(
    ("gone", "fact"), [(("schedule",), "scheduled"), (("schedule", "offload"), "offloaded")]
)
def test_a_pipeline_that_cannot_stream(
    gone: tuple[str, ...], fact: str, options: dict[str, Any]
) -> None:
    passes = zograph.default_passes()
    for name in gone:
        passes = passes.replace(name)
    with pytest.raises(PipelineError, match=f"no pass makes the graph {fact}"):
        compiled("toy", passes=passes, **options)


class Failing:
    """Lets one call of an operating system's function fail, once."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, name: str, at: int, code: int, count: int = 1
    ) -> None:
        self.original: Callable[..., int] = getattr(os, name)
        self.calls, self.at, self.code, self.count = 0, at, code, count
        self.failed = 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any) -> int:
        self.calls += 1
        if self.at <= self.calls < self.at + self.count:
            self.failed += 1
            raise OSError(self.code, os.strerror(self.code))
        return self.original(*args)


@pytest.mark.parametrize(
    ("name", "code", "advice"),
    [
        ("pwritev", errno.ENOSPC, "Make space on the disk and run the step again"),
        ("pwritev", errno.EIO, "may be failing"),
        ("preadv", errno.EIO, "may be failing"),
    ],
)
@pytest.mark.parametrize("at", [1, 6, 23])
def test_a_disk_that_fails_once(
    name: str, code: int, advice: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(compiled("toy"), usual("toy"), 5)
    step = compiled("toy", memory="minimum", storage="disk")
    step(**one(0))
    records, failing = [step.last], Failing(monkeypatch, name, at, code)
    caught: list[StoreError] = []
    while len(records) < 5:
        last = step.last
        try:
            step(**one(len(records)))
        except StoreError as error:
            caught.append(error)
            assert step.last == last
            continue
        records.append(step.last)
    if not caught:
        with pytest.raises(StoreError) as raised:
            step.synchronize()
        caught.append(raised.value)
    step.synchronize()
    assert [(e.errno, advice in str(e)) for e in caught] == [(code, True)]
    assert failing.failed == 1
    assert tuple(records) == expected.records
    assert same(weights(step.model), expected.weights)


def test_synchronize_on_a_full_disk_can_be_called_again() -> None:
    expected = train(compiled("toy"), usual("toy"), 3)
    step = compiled("toy", memory="minimum", storage="disk")
    for i in range(3):
        step(**one(i))
    step._graphs.last.runner.drain()  # type: ignore[union-attr]
    for at in (5, 2, 8):
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, "pwritev", at, errno.ENOSPC)
            with pytest.raises(StoreError, match="Make space"):
                step.synchronize()
    step.synchronize()
    assert same(weights(step.model), expected.weights)


def test_two_runs_on_one_work_folder(tmp_path: Path) -> None:
    first = compiled("toy", memory="minimum", storage=tmp_path / "work")
    first(**one())
    with pytest.raises(StoreError, match="another run uses the work folder"):
        compiled("toy", memory="minimum", storage=tmp_path / "work")
    first(**one(1))  # is not disturbed


def test_a_folder_of_an_earlier_run(tmp_path: Path) -> None:
    step = compiled("toy", memory="minimum", storage=tmp_path / "work")
    train(step, usual("toy"), 2)
    step._weights.store.close()
    with pytest.raises(StoreError, match="holds the weights of an earlier run"):
        compiled("toy", memory="minimum", storage=tmp_path / "work")


def test_fresh_folders_go_and_named_ones_stay(tmp_path: Path) -> None:
    step = compiled("toy", memory="minimum", storage="disk")
    train(step, usual("toy"), 2)
    (fresh,) = tmp_path.glob("zograph-work-*")
    assert fresh.stat().st_size
    del step
    gc.collect()
    assert not list(tmp_path.iterdir())
    step = compiled("toy", memory="minimum", storage=tmp_path / "named")
    train(step, usual("toy"), 2)
    del step
    gc.collect()
    assert [p.name for p in tmp_path.iterdir()] == ["named"]
    assert (tmp_path / "named" / "weights.zo").stat().st_size > 0


@pytest.mark.parametrize("storage", ["host", "disk"])
@pytest.mark.parametrize("on_nan", ["raise", "skip"])
def test_a_loss_that_is_not_finite(on_nan: str, storage: str) -> None:
    class Spiky(Toy):
        def forward(self, input_ids: torch.Tensor, spike: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids, input_ids)["loss"] + spike

    def run(**options: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        step = zograph.compile(Spiky(), lr=1e-2, backend="eager", on_nan=on_nan, **options)
        records: list[Any] = []
        for i, spike in enumerate([0.0, float("nan"), 0.0, float("inf"), 0.0]):
            batch = {"input_ids": one(i)["input_ids"], "spike": torch.tensor(spike)}
            try:
                step(**batch)
                records.append(step.last)
            except LossError as error:
                records.append(str(error))
        step.synchronize()
        return records, weights(step.model)

    expected, found = run(), run(memory="minimum", storage=storage)
    assert repr(found[0]) == repr(expected[0])  # a NaN is not equal to itself
    assert same(found[1], expected[1])
    if on_nan == "raise":
        assert sum(isinstance(r, str) for r in found[0]) == 2
    else:
        assert [r.skipped for r in found[0]] == [False, True, False, True, False]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def checkpoint(folder: Path) -> transformers.PreTrainedModel:
    model = compiled("opt").model
    model.save_pretrained(folder)
    return model


def test_a_model_that_stays_on_the_disk(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "base")
    before = digests(tmp_path / "base")
    expected = train(
        zograph.compile(model, lr=1e-2, backend="eager"), usual("opt"), 5, lambda i: i == 2
    )
    lazy = zograph.from_pretrained(tmp_path / "base")
    step = zograph.compile(lazy, lr=1e-2, backend="eager", memory="minimum")
    records, evaluations = [], []
    for i in range(5):
        step(**usual("opt")(i)[0])
        records.append(step.last)
        if i == 2:
            evaluations.append(step.evaluate(**usual("opt")(i)[0]).logits)
    assert tuple(records) == expected.records
    assert torch.equal(evaluations[0], expected.evaluations[0])
    state = step.state_dict()
    assert all(torch.equal(state[n], w) for n, w in expected.weights.items())
    assert all(p.is_meta for p in lazy.parameters())
    step.save_pretrained(tmp_path / "tuned")
    saved = type(model).from_pretrained(tmp_path / "tuned")
    assert same(weights(saved), expected.weights)
    assert digests(tmp_path / "base") == before
    step(**usual("opt")(5)[0])  # saving does not end the run


def test_a_checkpoint_that_changes_under_the_run(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base")
    step = zograph.compile(
        zograph.from_pretrained(tmp_path / "base"), lr=1e-2, backend="eager", memory="minimum"
    )
    step.prepare(**usual("opt")(0)[0])
    path = tmp_path / "base" / "model.safetensors"
    assert load_file(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StoreError, match="changed or replaced while in use"):
        step(**usual("opt")(0)[0])
    assert step.last is None


def test_a_work_file_that_is_cut_under_the_run(tmp_path: Path) -> None:
    step = compiled("toy", memory="minimum", storage=tmp_path / "work")
    for i in range(2):
        step(**one(i))
    step.synchronize()
    last = step.last
    os.truncate(tmp_path / "work" / "weights.zo", 4096)
    with pytest.raises(StoreError, match=r"weights\.zo ends at byte"):
        step(**one(2))
    assert step.last == last
    with pytest.raises(StoreError, match=r"weights\.zo ends at byte"):
        step(**one(2))  # again, and no hang
