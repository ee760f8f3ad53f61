"""A table in pieces: the same values, the same noise, and no bit that depends on a budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zograph
from tests.zograph.test_offload import Toy, compiled, resident, train, usual, weights
from tests.zoo import batch, build
from zograph import pieces
from zograph.ir import ParamInfo
from zograph.noise import parameter_key
from zograph.ops import fold_
from zograph.parameters import parameter_table


@pytest.fixture(autouse=True)
def _small_tables_are_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pieces, "LEAST", 2000)
    monkeypatch.chdir(tmp_path)
    resident.cache_clear()  # it may hold runs of whole tables
    yield
    resident.cache_clear()


def table_of(model: nn.Module) -> dict[str, ParamInfo]:
    return pieces.cut_tables(parameter_table(model))


def test_pieces_cover_the_table_and_no_weight_of_a_block_is_cut() -> None:
    model = Toy()
    found = table_of(model)
    parts = [p for p in found.values() if p.of is not None]
    assert {p.parameter for p in parts} == {"table.weight"}
    whole = parameter_table(model)["table.weight"]
    assert sum(p.bytes for p in parts) == whole.bytes
    assert max(p.bytes for p in parts) <= model.blocks[0][0].weight.nbytes  # type: ignore
    assert torch.equal(torch.cat([p.view(model.table.weight) for p in parts]), model.table.weight)
    ends = [(p.first, p.first + p.shape[0] * 32) for p in parts]
    assert [a for a, _ in ends] == [0, *(b for _, b in ends[:-1])]
    assert {p.key for p in parts} == {whole.key}
    names = {n for n, p in found.items() if p.of is None}
    assert names == set(parameter_table(model)) - {"table.weight"}


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_goes_on_where_the_piece_before_ends(
    dtype: torch.dtype, distribution: str
) -> None:
    """Fold and perturbation of the pieces are those of the whole, also across 2**32."""
    ops = torch.ops.zograph
    whole = torch.randn(40_001, 5).to(dtype)
    terms = (torch.tensor([3, 9]), torch.tensor([0.1, -0.2]), torch.tensor([0.9, 1.0]))
    probe = (torch.tensor(77), torch.tensor(1e-2), dtype, distribution, True)
    for start in (0, 2**32 - 70_003):
        key = parameter_key("w")
        expected = ops.materialize(whole, *terms, torch.tensor([[key, start]]), 0, *probe)
        folded = whole.clone()
        fold_(folded, *terms, key, distribution=distribution, first=start)
        for row, stop in ((0, 17), (17, 20_000), (20_000, 40_001)):
            piece, first = whole[row:stop].clone(), start + 5 * row
            keys = torch.tensor([[1, 0], [key, first]])
            found = ops.materialize(piece, *terms, keys, 1, *probe)
            assert all(torch.equal(a, b[row:stop]) for a, b in zip(found, expected, strict=True))
            index = torch.tensor([0, stop - row - 1, 5])
            found = ops.materialize_rows(piece, index, *terms, keys, 1, *probe)
            assert all(torch.equal(a, b[row + index]) for a, b in zip(found, expected, strict=True))
            fold_(piece, *terms, key, distribution=distribution, first=first)
            assert torch.equal(piece, folded[row:stop])


def test_a_step_moves_the_table_along_the_noise_of_its_name() -> None:
    step = compiled("toy")
    before = weights(step.model)
    step(**usual("toy")(0)[0])
    step.synchronize()
    assert step.last is not None
    moved = step.model.get_parameter("table.weight").detach()
    z = zograph.noise("table.weight", (99, 32), step.last.seed)
    coef = torch.tensor(-step.last.lr * step.last.projected_grad, dtype=torch.float32)
    assert torch.equal(moved, before["table.weight"] + coef * z)


def test_losses_are_those_of_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("toy", "opt", "t5"):
        found = train(compiled(name, lr=1e-4), usual(name), 3)
        monkeypatch.setattr(pieces, "LEAST", 1 << 40)
        expected = train(compiled(name, lr=1e-4), usual(name), 3)
        monkeypatch.setattr(pieces, "LEAST", 2000)
        pairs = zip(found.records, expected.records, strict=True)
        assert all(a.loss_plus == pytest.approx(b.loss_plus, rel=1e-5) for a, b in pairs)


CASES: dict[str, dict[str, Any]] = {
    "minimum, host": {"memory": "minimum"},
    "minimum, disk": {"memory": "minimum", "storage": "disk"},
    "some, disk": {"memory": 85_000, "storage": "disk"},
    "all, disk": {"storage": "disk"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_changes_no_bit(case: str, dtype: torch.dtype) -> None:
    step = compiled("toy", dtype, **CASES[case])
    names = step._weights.table
    assert sum(p.of is not None for p in names.values()) >= 4
    assert train(step, usual("toy"), 8, lambda i: i == 4) == resident("toy", dtype, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "bart"])
def test_streaming_changes_no_bit_of_a_language_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "NUMBERED", re.compile("no such name"))
    step = compiled(name, memory="minimum", storage="disk")
    found = train(step, usual(name), 4, lambda i: i == 2)
    assert any(p.of is not None for p in step._weights.table.values())
    assert found == resident(name, torch.float32, 4)


def test_the_least_budget_no_longer_holds_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    least = {}
    for limit in (1 << 40, 2000):
        monkeypatch.setattr(pieces, "LEAST", limit)
        step = compiled("toy", memory="minimum")
        step.prepare(**usual("toy")(0)[0])
        least[limit] = step.plan.items["slots"]
    assert least[2000] < least[1 << 40]


def test_a_fold_period_and_a_resume(tmp_path: Path) -> None:
    expected = train(compiled("toy", torch.bfloat16, fold_every=3), usual("toy"), 10)
    log = tmp_path / "run.zolog"
    options: dict[str, Any] = {"memory": "minimum", "storage": "disk"}
    with compiled("toy", torch.bfloat16, fold_every=3, log=log, **options) as step:
        for i in range(6):
            step(**usual("toy")(i)[0])
    torch.manual_seed(0)
    with zograph.resume(Toy().to(torch.bfloat16), log, **options) as step:
        assert step.last == expected.records[5]
        for i in range(6, 10):
            step(**usual("toy")(i)[0])
        assert step.last == expected.records[-1]
        found = step.state_dict()
        assert all(torch.equal(found[n], w) for n, w in expected.weights.items())


def test_a_frozen_table_is_read_by_rows(tmp_path: Path) -> None:
    def made(**options: Any) -> zograph.ZOStep:
        torch.manual_seed(0)
        model = Toy()
        model.head = nn.Linear(32, 99)
        model.table.weight.requires_grad_(False)
        return zograph.compile(model, lr=1e-2, backend="eager", **options)

    expected = train(made(), usual("toy"), 5)
    step = made(memory="minimum", storage="disk")
    assert train(step, usual("toy"), 5) == expected
    step.prepare(**usual("toy")(0)[0])
    fetched = {n for names in step._graphs.last.runner.program.moved.values() for n in names}
    assert not any("table.weight" in n for n in fetched)
    assert any("head.weight[" in n for n in fetched)


def test_a_checkpoint_in_pieces_is_saved_whole(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path / "base")
    model = zograph.from_pretrained(tmp_path / "base")
    step = zograph.compile(model, lr=1e-2, backend="eager", memory="minimum")
    other = zograph.compile(build("opt"), lr=1e-2, backend="eager")
    for one in (step, other):
        one(**batch("opt", 4, 12, 0))
        one.save_pretrained(tmp_path / ("streamed" if one is step else "resident"))
    files = [tmp_path / n / "model.safetensors" for n in ("streamed", "resident")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_encoded_pieces(dtype: str) -> None:
    options: dict[str, Any] = {"transfer_dtype": dtype, "fold_every": 2}
    expected = train(compiled("toy", **options), usual("toy"), 5, lambda i: i == 3)
    for storage in ("host", "disk"):
        step = compiled("toy", **options, memory="minimum", storage=storage)
        assert any(p.of is not None and p.format for p in step._weights.table.values())
        assert train(step, usual("toy"), 5, lambda i: i == 3) == expected
