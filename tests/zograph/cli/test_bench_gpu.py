"""The benchmarks that want a GPU: refusals without one, a toy with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zograph.cli import main

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@no_cuda
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu"]) == 2
    assert "bench offload runs on any machine" in capsys.readouterr().err
    (tmp_path / "zo2" / "model" / "nanogpt").mkdir(parents=True)
    assert main(["bench", "zo2", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_folder_that_is_no_clone_of_zo2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "zo2", str(tmp_path)]) == 2
    assert "is no clone of github.com/liangyuwang/zo2" in capsys.readouterr().err


@pytest.mark.gpu
@needs_cuda
def test_a_small_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    args = ["--shape", "opt-125m", "--layers", "2", "--seq", "32", "--repeats", "2"]
    args += ["--memory", "minimum", "--backend", "eager", "--json", str(found)]
    assert main(["bench", "gpu", *args]) == 0
    result = json.loads(found.read_text())
    assert result["same_losses"]
    assert result["streamed"]["waits"] == []
    assert result["streamed"]["plan"]["bytes_moved"]["to_device"] > 0
    assert "losses as resident    True" in capsys.readouterr().out
