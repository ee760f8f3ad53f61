from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zograph.errors import StoreError
from zograph.stores import checkpoint as module
from zograph.stores import lazy
from zograph.stores.checkpoint import SINGLE, Checkpoint
from zograph.stores.lazy import LazyTensor, fill, leaf

Recipe = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MOVES: dict[str, Recipe] = {
    "plain": lambda a, b: a,
    "cast": lambda a, b: a.to(torch.bfloat16),
    "cat": lambda a, b: torch.cat([a, b], dim=1),
    "cat of casts": lambda a, b: torch.cat([a.half(), b.half()]),
    "stack": lambda a, b: torch.stack([a, b], dim=1),
    "fused experts": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "rows": lambda a, b: a.chunk(4)[2],
    "columns": lambda a, b: a.chunk(4, dim=1)[2].contiguous(),
    "transposed": lambda a, b: a.t().contiguous(),
    "permuted": lambda a, b: a.view(4, 2, 16, 64).transpose(1, 2).reshape(128, 64),
    "interleaved": lambda a, b: a[:, ::2],
    "squeezed": lambda a, b: a[3:4].squeeze(0).unsqueeze(1),
}
COMPUTED: dict[str, Recipe] = {
    "sum": lambda a, b: a + 2 * b,
    "two casts": lambda a, b: a.to(torch.bfloat16).to(torch.float32),
    "cat with a tensor in memory": lambda a, b: torch.cat([a, torch.ones(1, 64)]),
    "split of a sum": lambda a, b: (a + b).split(32)[1],
}


def stored(folder: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    values = {"a": torch.randn(128, 64), "b": torch.randn(128, 64)}
    save_file(values, folder / SINGLE)
    return Checkpoint(folder), values


@pytest.mark.parametrize("name", [*MOVES, *COMPUTED])
def test_recipe_gives_the_same_bits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 1 << 11)
    checkpoint, values = stored(tmp_path)
    recipe = (MOVES | COMPUTED)[name]
    made = recipe(leaf(checkpoint, "a"), leaf(checkpoint, "b"))
    expected = recipe(values["a"], values["b"])
    assert isinstance(made, LazyTensor)
    assert made.shape == expected.shape
    assert made.dtype == expected.dtype
    out = torch.empty(made.shape, dtype=made.dtype)
    assert fill(made, out) > 0
    assert torch.equal(out, expected)
    parameter = torch.nn.Parameter(made)
    assert isinstance(parameter, LazyTensor)
    assert isinstance(parameter, torch.nn.Parameter)


@pytest.mark.parametrize("name", ["cat", "cat of casts", "stack", "fused experts", "rows"])
def test_moves_read_straight_into_place(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, values = stored(tmp_path)
    made = MOVES[name](leaf(checkpoint, "a"), leaf(checkpoint, "b"))

    def no_whole(*args: object) -> None:
        raise AssertionError("a whole tensor was read aside")

    monkeypatch.setattr(lazy, "_whole", no_whole)
    out = torch.empty(made.shape, dtype=made.dtype)
    assert fill(made, out) == out.numel() * values["a"].element_size()


def test_equal_reads_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK", 1 << 11)
    checkpoint, values = stored(tmp_path)
    a, b = leaf(checkpoint, "a"), leaf(checkpoint, "b")
    assert torch.equal(a, a)
    assert torch.equal(a, values["a"])
    assert not torch.equal(a, b)
    assert not torch.equal(a, a.half())


def test_what_cannot_be_deferred_is_refused(tmp_path: Path) -> None:
    a = leaf(stored(tmp_path)[0], "a")
    with pytest.raises(StoreError, match=r"applies aten.mul_.Tensor.*save_pretrained"):
        a.mul_(2)
    with pytest.raises(StoreError, match=r"stay on the disk"):
        a[0, 0].item()
    with pytest.raises(StoreError, match=r"onto meta"):
        a.to("meta")


@pytest.mark.parametrize("name", ["plain", "cast", "rows", "columns", "stack"])
def test_rows_are_read_alone(tmp_path: Path, name: str) -> None:
    checkpoint, values = stored(tmp_path)
    recipe = MOVES[name]
    made = recipe(leaf(checkpoint, "a"), leaf(checkpoint, "b"))
    expected = recipe(values["a"], values["b"])
    rows = torch.tensor([5, 0, 5, 6, 7, 30])
    out = torch.empty((6, *made.shape[1:]), dtype=made.dtype)
    count = lazy.fill_rows(made, rows, out)
    assert torch.equal(out, expected[rows])
    if name in ("plain", "cast", "rows"):
        assert count == 5 * 64 * 4


def test_rows_of_tensors_in_memory() -> None:
    table, rows = torch.arange(12.0).view(6, 2), torch.tensor([3, 3, 0])
    out = torch.empty(3, 2)
    assert lazy.fill_rows(table, rows, out) == 0
    assert torch.equal(out, table[rows])


def test_tensors_in_memory_are_copied() -> None:
    out = torch.empty(3)
    assert fill(torch.ones(3), out) == 0
    assert torch.equal(out, torch.ones(3))
