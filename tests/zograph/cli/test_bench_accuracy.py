"""The benchmark of accuracy: ways that give the same bits score the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zograph.cli import main


def test_ways_with_equal_bits_score_alike(
    bert: Path,
    sentences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [str(bert), "--task", "sequence-classification", "--data", str(sentences)]
    args += ["--steps", "3", "--lr", "1e-2", "--backend", "eager", "--seeds", "0"]
    ways = ["plain MeZO", "resident", "streamed", "int8"]
    assert main(["bench", "accuracy", *args, "--json", "found.json", "--ways", *ways]) == 0
    found = {way: runs[0] for way, runs in json.loads(Path("found.json").read_text()).items()}
    assert list(found) == ways
    assert found["streamed"] == found["resident"]
    for way in ("plain MeZO", "int8"):
        for when in ("before", "after"):
            loss = found["resident"][when]["loss"]
            assert found[way][when]["loss"] == pytest.approx(loss, rel=0.1)
        assert found[way]["after"] != found[way]["before"]
        assert found[way]["after"] != found["resident"]["after"]
    assert "held-out loss" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"found.json"}
