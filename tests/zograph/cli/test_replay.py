"""`zograph replay`: runs of zograph finetune and of Python, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import zograph
from zograph.cli import main

QUICK = ["--backend", "eager", "--device", "cpu", "--batch-size", "8", "--lr", "1e-2"]
slow = pytest.mark.slow
Captured = pytest.CaptureFixture[str]


def replay(*arguments: object) -> int:
    return main(["replay", *map(str, arguments)])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def log(gpt2: Path, tmp_path: Path) -> Path:
    """Of two steps of all of GPT-2's parameters."""
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    tokens = torch.arange(16).view(2, 8)
    with zograph.compile(
        model, lr=0.01, log=tmp_path / "run.zolog", device="cpu", backend="eager"
    ) as step:
        for _ in range(2):
            step(input_ids=tokens, labels=tokens)
        step.save_pretrained(tmp_path / "run")
    return tmp_path / "run.zolog"


def test_a_run_of_python(gpt2: Path, log: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert replay(gpt2, log, "--out", out) == 0
    assert "replayed 2 of 2 steps" in capsys.readouterr().out
    assert weights(out) == weights(tmp_path / "run")
    assert transformers.AutoTokenizer.from_pretrained(out).pad_token == "[PAD]"
    assert replay(gpt2, log, "--until", 0, "--out", out, "--overwrite") == 0
    assert weights(out) == weights(gpt2)


@pytest.mark.parametrize(
    "options",
    [("--train", "attention|classifier"), pytest.param(("--storage", "disk"), marks=slow)],
)
def test_a_run_of_finetune(
    options: tuple[str, ...], bert: Path, sentences: Path, tmp_path: Path
) -> None:
    data = ["--task", "sequence-classification", "--data", str(sentences), "--steps", "4"]
    log, kept, out = (tmp_path / name for name in ("run.zolog", "kept", "out"))
    command = ["finetune", str(bert), *data, *QUICK, *options]
    assert main([*command, "--log", str(log), "--out", str(kept)]) == 0
    assert replay(bert, log, "--out", out, "--classes", 0, 1) == 0
    assert weights(out) == weights(kept)
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "0", "1": "1"}


def test_what_is_refused(
    gpt2: Path, bert: Path, log: Path, tmp_path: Path, capsys: Captured
) -> None:
    full = tmp_path / "run"
    out = ["--out", tmp_path / "out"]
    refusals = [
        ([gpt2, log, *out, "--until", 3], "has 2 steps"),
        ([bert, log, *out], "another model than"),
        ([full, log, *out], "starts from other values"),
        ([gpt2, log, *out, "--train", "wte"], r"(zograph replay: --train)"),
        ([gpt2, tmp_path / "none", *out], "cannot be read"),
        ([gpt2, gpt2 / "config.json", *out], "is no seed log"),
        ([tmp_path / "none", log, *out], "there is no such model folder"),
        ([gpt2, log, "--out", full], "is not empty"),
    ]
    for arguments, said in refusals:
        assert replay(*arguments) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        replay(gpt2, log, *out, "--until", -1)


def test_a_torn_tail(gpt2: Path, log: Path, tmp_path: Path, capsys: Captured) -> None:
    log.write_bytes(data := log.read_bytes()[:-1])
    assert replay(gpt2, log, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "its last 47 bytes are no whole record" in said
    assert "replayed 1 of 1 steps" in said
    assert log.read_bytes() == data
