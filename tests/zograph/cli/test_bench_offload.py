"""`zograph bench offload` on a tiny model, and the peer's loop against plain tensors."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import SPEC
from zograph import device, kernels
from zograph.cli import bench_offload, main
from zograph.cli import bench_offload_child as child
from zograph.cli.batches import make_batch
from zograph.cli.inputs import InputError
from zograph.kernels.build import cache_dir

pytest.importorskip("accelerate")

CONFIG = {
    "vocab_size": 256,
    "hidden_size": 64,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "architectures": ["OPTForCausalLM"],
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "toy"
    transformers.OPTConfig(**CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give the child processes fixed rates in a cache of their own, and the compiled kernels."""
    kernels.available()
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir(), cache, ignore=shutil.ignore_patterns("device-*"))
    monkeypatch.setenv("ZOGRAPH_CACHE", str(cache))
    device._save(device.cache_path(torch.device("cpu"), tmp_path), SPEC)
    monkeypatch.setattr(bench_offload, "measure", lambda common: SPEC.to_json())


@pytest.mark.slow
def test_runs_and_reports(
    shape: Path,
    measured: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = tmp_path / "disk", tmp_path / "offload.json"
    command = ["bench", "offload", "--shape", str(shape), "--dtype", "float32", "--backend"]
    command += ["eager", "--batch", "2", "--seq", "8", "--rounds", "1", "--repeats", "2"]
    command += ["--memory", "minimum", "--folder", str(folder), "--json", str(out)]
    variants = bench_offload.PEER_VARIANTS[::2]
    monkeypatch.setattr(bench_offload, "PEER_VARIANTS", variants)
    assert main(command) == 0
    printed = capsys.readouterr().out
    for word in ("resident", "minimum", "accelerate, update pass", "losses equal bit for bit"):
        assert word in printed

    found = json.loads(out.read_text())["dtypes"]["float32"]
    runs, peers = found["runs"], found["peers"]
    assert set(runs) == {"resident", "minimum"}
    assert set(peers) == set(variants)
    assert found["disk_both"] == SPEC.disk_both
    resident, streamed = runs["resident"], runs["minimum"]
    assert len(streamed["seconds"]) == 2
    assert len(streamed["losses"]) == 4
    assert streamed["losses"] == resident["losses"]
    assert len({tuple(pair) for pair in streamed["losses"]}) == 4
    assert resident["moved_bytes"] == dict.fromkeys(resident["moved_bytes"], 0)
    assert resident["overlap"] is None

    trainable = streamed["plan"]["disk_bytes"] // 2
    headers = streamed["plan"]["parameters"] * 4096
    tied = 256 * 64 * 4
    moved = streamed["moved_bytes"]
    assert moved["write"] == trainable + headers
    assert moved["read"] == trainable + tied, "the embedding is read again for the head"
    assert streamed["beside_traffic"] > 0
    assert 0 <= streamed["overlap"] <= 1
    assert {"fetch", "fold", "body", "writeback"} == set(streamed["busy"])
    metered = streamed["metered"]
    assert metered["arena"] == streamed["plan"]["items"]["slots"]
    assert metered["total"] == pytest.approx(streamed["plan"]["device_bytes"], rel=0.05)
    assert streamed["peak_bytes"] >= streamed["step_peak_bytes"] > 0

    first, *others = (peer["losses"] for peer in peers.values())
    assert all(other == first for other in others)
    assert len(first) == 3
    aims = {(v["budget"], v["aim"]): v["met"] for v in found["verdicts"]}
    assert aims["minimum", "losses equal bit for bit"]
    assert aims["minimum", "arena and activations within 5 % of the plan"]
    assert sorted(p.name for p in folder.iterdir()) == ["tiny-float32", "toy-float32"]


@pytest.mark.parametrize("variant", bench_offload.PEER_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peer_is_plain_mezo(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    from zograph.cli import peer_offload

    assert peer_offload.VARIANTS == bench_offload.PEER_VARIANTS
    torch.manual_seed(0)
    config = transformers.OPTConfig(**CONFIG, dtype=dtype)
    model = transformers.OPTForCausalLM(config).to(dtype).eval()
    model.save_pretrained(tmp_path / "model")
    peer_offload.offload(tmp_path / "model", tmp_path / "files")
    batch = make_batch(config, 2, 8)
    eps, lr = 1e-3, 1e-2
    peer = peer_offload.Peer(config, tmp_path / "files", variant, eps=eps, lr=lr)
    before = {n: p.clone() for n, p in model.named_parameters()}

    for number in range(3):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        z = {n: peer_offload.noise(number, n, p) for n, p in weights.items()}
        losses = []
        for sign in (1, -1):
            for n, p in model.named_parameters():
                p.data = weights[n].add(z[n], alpha=sign * eps)
            with torch.no_grad():
                losses.append(float(model(**batch).loss))
        gradient = (losses[0] - losses[1]) / (2 * eps)
        for n, p in model.named_parameters():
            p.data = weights[n].add(z[n], alpha=-lr * gradient)
        assert peer.step(batch) == tuple(losses)
    peer.finish()

    named = dict(model.named_parameters())
    assert set(peer.weights.names()) == set(named)
    for name, p in named.items():
        assert torch.equal(peer.weights.mapped(name), p), name
        assert not torch.equal(before[name], p), name
    assert all(p.is_meta for p in peer.model.parameters())


def test_checkpoint_is_written_once_and_checked(shape: Path, tmp_path: Path) -> None:
    request = {
        "shape": str(shape),
        "dtype": "bfloat16",
        "folder": str(tmp_path),
        "model": str(tmp_path / "model"),
        "tiny": str(tmp_path / "tiny"),
    }
    first = child.write(request)
    assert first["written"] == ["model", "tiny"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.nbytes for p in model.parameters()) == first["weights_bytes"]
    assert all(p.std() > 0.01 for p in model.parameters())
    assert child.write(request)["written"] == []
    with pytest.raises(InputError, match="holds another model; delete it"):
        child.write(request | {"dtype": "float32"})
    with pytest.raises(InputError, match="--shape nowhere: no folder"):
        child.write(request | {"shape": "nowhere"})


def test_a_budget_that_is_too_small(shape: Path, tmp_path: Path) -> None:
    paths = {which: str(tmp_path / which) for which in ("model", "tiny", "work")}
    request = {"shape": str(shape), "dtype": "float32", "folder": str(tmp_path), **paths}
    request |= {"batch": 2, "seq": 8, "backend": "eager", "memory": "9kB"}
    child.write(request)
    found = child.step(request)
    assert "memory=9,000 bytes is too small" in found["infeasible"]
    runs = {"resident": run_of([[1.0, 2.0]]), "9kB": bench_offload.merged([found])}
    args = argparse.Namespace(memory=["9kB"], backend="eager")
    (row,) = bench_offload.verdicts(args, "float32", {"runs": runs, "peers": {}})
    assert row["found"] == f"needs {found['minimum']:,} bytes"
    assert not row["met"]


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(3_000_000_000))
    child.check_space(tmp_path, 0, 10**9)
    with pytest.raises(InputError, match=r"5\.5 GB must be free \(1\.0 GB .* 4\.0 GB .* 3\.0 GB"):
        child.check_space(tmp_path, 10**9, 2 * 10**9)


def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["bench", "offload", "--folder", str(file / "x")]) == 2
    assert "--folder" in capsys.readouterr().err
    assert main(["bench", "offload", "--json", str(file / "x.json")]) == 2
    assert "--json" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["bench", "offload", "--folder", str(tmp_path / "new")]) == 2
    assert "pip install accelerate, or pass --no-peer" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def run_of(losses: list[list[float]], **more: Any) -> dict[str, Any]:
    run = {
        "seconds": [3.0, 1.0, 2.0],
        "losses": losses,
        "peak_bytes": 108,
        "compile_peak_bytes": 50,
        "step_peak_bytes": 108,
        "plan": {"cut": None, "device_bytes": 100},
        "metered": {"total": 96},
        "moved_bytes": {"read": 10, "write": 11},
        "beside_traffic": 2.5,
    }
    return bench_offload.merged([run | {"peak_bytes": 90}, run | more])


def test_verdicts() -> None:
    peers = {"one": {"median": 7.0, "peak_bytes": 120}, "two": {"median": 9.0, "peak_bytes": 20}}
    base, other = [[1.0, 2.0]], [[1.0, 2.0 + 1e-5]]
    found: dict[str, Any] = {
        "disk_both": 10.0,
        "peers": peers,
        "runs": {"resident": run_of(base), "minimum": run_of(base), "120B": run_of(other)},
    }
    args = argparse.Namespace(memory=["minimum", "120B"], backend="inductor")
    rows = {(r["budget"], r["aim"]): r for r in bench_offload.verdicts(args, "float32", found)}
    assert rows["minimum", "process peak <= 1.10 of the budget"]["found"] == "1.080"
    assert rows["120B", "process peak <= 1.10 of the budget"]["found"] == "0.900"
    assert rows["minimum", "step <= 1.10 of the bound"]["found"] == "0.952"
    aim = "step <= 1.10 of resident beside such traffic"
    assert rows["minimum", aim]["found"] == "0.800"
    assert rows["minimum", "at least 3 x as fast as accelerate"]["found"] == "3.50"
    assert rows["minimum", "peak <= accelerate's"]["met"]
    assert rows["minimum", "losses equal bit for bit"]["met"]
    assert not rows["120B", "losses equal bit for bit"]["met"]
    found["runs"]["120B"]["plan"] = {"cut": 3, "device_bytes": 100}
    found["runs"]["120B"]["metered"] = {"total": 94}
    rows = {(r["budget"], r["aim"]): r for r in bench_offload.verdicts(args, "float32", found)}
    assert rows["120B", "losses equal within 1e-05 (other cut, Inductor)"]["met"]
    assert not rows["120B", "arena and activations within 5 % of the plan"]["met"]
    assert ("120B", "peak <= accelerate's") not in rows
