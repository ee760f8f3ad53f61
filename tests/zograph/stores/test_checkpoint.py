from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zograph.errors import StoreError
from zograph.stores import checkpoint as module
from zograph.stores import files
from zograph.stores.checkpoint import INDEX, SINGLE, Checkpoint
from zograph.stores.header import CODES, build_header


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "odd": torch.randint(0, 2, (3,), dtype=torch.uint8),  # what follows is unaligned
        "w": torch.randn(300, 70),
        "half": torch.randn(33).to(torch.bfloat16),
        "scalar": torch.tensor(4.0),
        "empty": torch.zeros(0, 5),
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False, True]),
    }


def by_hand(path: Path, values: dict[str, torch.Tensor]) -> None:
    header = build_header((k, t.dtype, tuple(t.shape)) for k, t in values.items())
    path.write_bytes(header + b"".join(bytes(files.bytes_of(t)) for t in values.values()))


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    values, weight_map = tensors(), {}
    for i, key in enumerate(values):
        file = f"model-{i % 2 + 1:05d}-of-00002.safetensors"
        weight_map[key] = file
    for file in set(weight_map.values()):
        save_file({k: values[k] for k, f in weight_map.items() if f == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return values


@pytest.mark.parametrize("layout", ["hand", "library", "shards", "file"])
def test_round_trip(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1 << 12)
    values = tensors()
    if layout == "shards":
        sharded(tmp_path)
    else:
        (by_hand if layout == "hand" else lambda p, v: save_file(v, p))(tmp_path / SINGLE, values)
    stored = Checkpoint(tmp_path / SINGLE if layout == "file" else tmp_path)
    assert set(stored.entries) == set(values)
    offsets = {entry.offset % 4 for entry in stored.entries.values()}
    assert layout != "hand" or offsets != {0}
    for key, tensor in values.items():
        out = torch.empty_like(tensor)
        assert stored.read(key, out) == tensor.nbytes
        assert torch.equal(out, tensor)
    stored.close()
    stored.close()
    with pytest.raises(StoreError, match=r"closed"):
        stored.read("w", torch.empty(300, 70))


def test_conversion_is_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1 << 10)
    by_hand(tmp_path / SINGLE, tensors())
    stored, w = Checkpoint(tmp_path), tensors()["w"]
    sizes: list[int] = []
    real = stored.read_bytes

    def read_bytes(name: str, start: int, view: memoryview) -> int:
        sizes.append(len(view))
        return real(name, start, view)

    monkeypatch.setattr(stored, "read_bytes", read_bytes)
    out = torch.empty(300, 70, dtype=torch.bfloat16)
    assert stored.read("w", out) == w.nbytes
    assert torch.equal(out, w.to(torch.bfloat16))
    strided = torch.empty(70, 300, dtype=torch.float64).t()
    assert stored.read("w", strided) == w.nbytes
    assert torch.equal(strided, w.double())
    part = torch.empty(2, 70)
    assert stored.read("w", part, 140) == part.nbytes
    assert torch.equal(part, w[2:4])
    assert max(sizes) <= 1 << 10


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(tmp_path / SINGLE, tensors())
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, v, o: real(fd, [v[0][:999]], o))
    out = torch.empty(300, 70)
    Checkpoint(tmp_path).read("w", out)
    assert torch.equal(out, tensors()["w"])


def test_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(tmp_path / SINGLE, tensors())
    stored = Checkpoint(tmp_path)

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(StoreError, match=r"cannot be read at byte.*disk may be failing") as e:
            stored.read("w", torch.empty(300, 70))
    assert e.value.errno == 5
    stored.read("w", torch.empty(300, 70))


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    by_hand(path, tensors())
    size = path.stat().st_size
    for cut in (size - 1, size // 2, 100, 7, 0):
        os.truncate(path, cut)
        with pytest.raises(StoreError, match=r"model.safetensors is truncated.*again"):
            Checkpoint(tmp_path)


def test_bytes_too_many(tmp_path: Path) -> None:
    by_hand(tmp_path / SINGLE, tensors())
    with open(tmp_path / SINGLE, "ab") as f:
        f.write(b"xx")
    with pytest.raises(StoreError, match=r"2 bytes follow the last tensor"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "its header is damaged"),
        (b"[1, 2]   ", "its header is damaged"),
        (b"\xff\xfe      ", "its header is damaged"),
        (b'{"a": 3}', "its header is damaged"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "its header is damaged"),
        (b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', "of dtype F4, which"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "takes 8 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}', "header is damaged"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "starts at byte"),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "truncated"),
    ],
)
def test_wrong_header(tmp_path: Path, header: bytes, message: str) -> None:
    data = struct.pack("<Q", len(header)) + header + b"\0" * 8
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(StoreError, match=message):
        Checkpoint(tmp_path)


def test_garbage(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"\x80\x02}q\x00garbage garbage garbage")
    with pytest.raises(StoreError, match=r"no safetensors file"):
        Checkpoint(tmp_path)


def test_missing_and_foreign_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"other": torch.ones(2)}, shard)
    with pytest.raises(StoreError, match=r"00002.safetensors does not hold tensor"):
        Checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(StoreError, match=r"00002-of-00002.safetensors is missing"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [("{", "no index"), ('{"a": 1}', "no index"), ('{"weight_map": {"a": "../x"}}', "outside")],
)
def test_wrong_index(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(StoreError, match=message):
        Checkpoint(tmp_path)


def test_pickled_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"neither model.safetensors nor"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"pickled checkpoint.*save_pretrained"):
        Checkpoint(tmp_path)
    with pytest.raises(StoreError, match=r"neither a folder nor a file"):
        Checkpoint(tmp_path / "none")


@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
def test_changed_under_the_job(tmp_path: Path, how: str) -> None:
    path = tmp_path / SINGLE
    by_hand(path, tensors())
    stored, out = Checkpoint(tmp_path), torch.empty(300, 70)
    stored.read("w", out)
    if how == "written":
        with open(path, "r+b") as f:
            f.seek(-1, os.SEEK_END)
            f.write(b"\1")
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
        if how == "replaced":
            by_hand(path, tensors())
    with pytest.raises(StoreError, match=r"changed or replaced|went away"):
        stored.read("w", out)


def test_every_dtype_is_known() -> None:
    assert len(set(CODES.values())) == len(CODES)
