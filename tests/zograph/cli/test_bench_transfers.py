"""The benchmark of transfers, at the size of a toy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from zograph.cli import bench_transfers, main


def test_bytes_fall_by_format_and_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ways = [(None, 1), (None, 4), ("bfloat16", 1), ("int8", 4)]
    monkeypatch.setattr(bench_transfers, "ways", lambda _: ways)
    transformers.OPTConfig(
        vocab_size=1000, hidden_size=64, ffn_dim=256, word_embed_proj_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    ).save_pretrained("toy")  # fmt: skip
    args = ["--model", "toy", "--seq", "8", "--rounds", "1", "--backend", "eager"]
    assert main(["bench", "transfers", *args, "--json", "found.json"]) == 0
    rows = json.loads(Path("found.json").read_text())["ways"]
    plain, elided, narrow, both = rows
    assert plain["loss"] == elided["loss"] == 0
    assert 0 < max(narrow["loss"], both["loss"]) < 1e-2
    assert elided["read"] == pytest.approx(plain["read"], rel=0.1)  # some is fetched ahead
    assert elided["written"] == pytest.approx(plain["written"] / 4, rel=0.3)
    assert narrow["read"] == pytest.approx(plain["read"] / 2, rel=0.2)
    assert both["read"] < 0.5 * plain["read"]  # pages and vectors of a toy count, too
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert not [p for p in tmp_path.iterdir() if p.name not in ("toy", "found.json")]
