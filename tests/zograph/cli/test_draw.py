"""`zograph draw` under a budget: the graph with its transfers, and the timeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from zograph.cli import main

SHORT = ["--task", "causal-lm", "--batch-size", "1", "--length", "8"]


def test_graph_and_timeline(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph, timeline = tmp_path / "new" / "step.dot", tmp_path / "other" / "timeline.svg"
    args = ["--memory", "minimum", "--timeline", str(timeline), "--measured"]
    args += ["--transfer-dtype", "int8"]
    assert main(["draw", str(gpt2), str(graph), *SHORT, *args]) == 0
    assert capsys.readouterr().out.splitlines() == [str(graph), str(timeline)]
    drawn = graph.read_text(encoding="utf-8")
    assert all(what in drawn for what in ("fetch", "decode", "encode", "write back"))
    assert "measured" in timeline.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--timeline", "t.svg"], "--timeline needs --memory"),
        (["--memory", "minimum", "--timeline", "t.png"], "the ending must be .svg"),
        (["--measured"], "--measured needs --timeline"),
        (["--memory", "much"], "no size"),
    ],
)
def test_bad_input(
    args: list[str], message: str, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "step.dot"
    assert main(["draw", str(gpt2), str(picture), *SHORT, *args]) == 2
    assert message in capsys.readouterr().err
    assert not picture.exists()
