"""`zograph plan` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zograph.cli import main, plan, shapes

COMMON = ["--seq", "32", "--device", "a100-40gb"]
PUBLISHED = {  # parameters in billions, from the papers and model cards
    "opt-125m": 0.125, "opt-350m": 0.331, "opt-1.3b": 1.316, "opt-2.7b": 2.65, "opt-6.7b": 6.66,
    "opt-13b": 12.85, "opt-30b": 29.97, "opt-66b": 65.7, "opt-175b": 174.6,
    "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98,
    "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
}  # fmt: skip


def test_tables_and_json(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "plan.json"
    args = ["plan", str(gpt2), *COMMON, "--memory", "all", "1MB", "minimum", "1kB"]
    assert main([*args, "--link", "slow", "7.5", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "1 x 32 tokens, 1 direction, weights on the host" in text
    first, second = (text.split("\n\n")[i].splitlines() for i in (1, 2))
    assert [line.split()[0] for line in first] == ["memory", "all", "1MB", "minimum", "1kB"]
    assert first[0].split()[1:3] == ["device", "MB"]
    assert float(first[-1].split("needs")[1]) == float(first[-2].split()[1])
    assert len(second) == 1 + 4 * 2
    assert sum("too small" in line for line in second) == 2
    assert sum("a100-40gb, 7.5 GB/s" in line for line in second) == 4

    written = json.loads(out.read_text())
    assert (written["batch"], written["seq"], written["dtype"]) == (1, 32, "float16")
    assert written["weights_bytes"] == 2 * written["parameters"]
    plans = written["plans"]
    assert [p["memory"] for p in plans[::2]] == ["all", "1MB", "minimum", "1kB"]
    everything, _, least, small = (p.get("plan", p) for p in plans[::2])
    assert everything["device_bytes"] == sum(everything["items"].values())
    assert everything["bytes_moved"] == {}
    assert least["device_bytes"] == small["minimum"] < everything["device_bytes"]
    assert plans[4]["tokens_per_second"] == pytest.approx(32 / least["step_seconds"])
    slow, fast = plans[5]["plan"], plans[4]["plan"]  # 7.5 GB/s and 25 GB/s
    assert slow["transfer_seconds"] == pytest.approx(fast["transfer_seconds"] * 25 / 7.5)
    assert slow["bytes_moved"] == fast["bytes_moved"]


def test_other_kinds_of_models(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    args = ["--dtype", "float32", "--storage", "disk", "--directions", "2", "--json", str(out)]
    assert main(["plan", str(bert), *COMMON, *args]) == 0
    assert "2 directions, weights on the disk" in capsys.readouterr().out
    found = json.loads(out.read_text())["plans"][0]["plan"]
    assert set(found["bytes_moved"]) == {"read", "to_device", "to_host", "write"}
    assert found["disk_bytes"] > 0


def test_a_host_that_is_too_small_is_named(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zograph.presets.HOST_MEMORY", 1000)
    assert main(["plan", str(gpt2), *COMMON]) == 0
    assert "its host memory of 0 GB is too small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["opt-125m", "--seq", "4096", "--device", "h200"], "opt-125m has 2048 positions"),
        (["opt-125m", "--device", "a100-41gb"], "a100-40gb"),
        (["opt-125m", "--device", "this", "--link", "slow"], "this machine's link is measured"),
        (["opt-125m", "--device", "h200", "--link", "quick"], "slow, fast or a rate in GB/s"),
        (["opt-125m", "--device", "h200", "--link", "0"], "slow, fast or a rate in GB/s"),
        (["opt-125m", "--device", "h200", "--memory", "much"], "no size"),
        (["opt-125m", "--device", "h200", "--memory", "-1"], "no budget"),
        (["./nowhere", "--device", "h200"], "there is no such model folder"),
    ],
)
def test_bad_input(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_budget_too_small_says_what_is_enough(
    gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(gpt2), *COMMON, "--memory", "1kB"]) == 2
    assert "this batch needs" in capsys.readouterr().err


def test_published_sizes() -> None:
    assert set(shapes.names()) == set(PUBLISHED)
    assert shapes.ZO2.keys() <= PUBLISHED.keys()
    assert shapes.known("opt-7b") is None
    assert all(shapes.known(name) is not None for name in shapes.names())


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameters(name: str) -> None:
    import transformers

    config = plan.config(name, "float16", 16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e9 == pytest.approx(PUBLISHED[name], rel=0.02)


def test_a_line_of_the_family(monkeypatch: pytest.MonkeyPatch, gpt2: Path, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    small = shapes.opt("125m")
    small.num_hidden_layers = 2
    monkeypatch.setattr(plan, "names", lambda: ["opt-1.3b", "opt-350m", "qwen3-4b"])
    monkeypatch.setattr(plan, "known", lambda name: small)
    out = tmp_path / "family.json"
    assert main(["plan", "opt", *COMMON, "--json", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0].startswith("opt-")}
    assert rows["opt-1.3b"][3:5] == ["3.75", "|"]
    assert rows["opt-350m"][3:] == ["-", "|"]
    family = json.loads(out.read_text())["family"]
    assert [m["zo2_bytes"] for m in family] == [3_750_000_000, None]
    assert len(family[0]["plans"]) == 2
