"""`zograph doctor` as a user runs it, with small measurements."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from zograph import kernels, measure
from zograph.cli import doctor, main
from zograph.device import DeviceSpec


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    sizes = measure.Sizes(
        tokens=4, width=16, elements=5000, copy=1 << 16, disk=1 << 20, repeats=2, limit=0.01
    )
    monkeypatch.setattr(measure, "SIZES", sizes)
    kernels.available()  # compiled into the user's own cache
    monkeypatch.setenv("ZOGRAPH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_prints_and_writes(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "doctor.json"
    common = ["doctor", "--device", "cpu", "--folder", str(tmp_path)]
    assert main([*common, "--json", str(out)]) == 0
    first = capsys.readouterr().out
    for word in ("python", torch.__version__, "transformers", "2 of", "compiler", "kernels"):
        assert word in first
    for word in ("memory", "locked memory", "CUDA devices", "dot"):
        assert f"\n{word}  " in first
    assert "measuring" in first
    assert f"measured now, kept in {cache}" in first
    table = first[first.index("(cpu)") :].splitlines()[1:-1]
    assert len(table) == 2 + 3 + len(doctor.FIELDS)
    assert len({len(line) for line in table if line.endswith("B/s") and " GB/s" in line}) <= 1
    assert all(line.rstrip()[-1] in "sB" for line in table)

    written = json.loads(out.read_text())
    assert DeviceSpec.from_json(written["device"]).kind == "cpu"
    assert written["versions"]["torch"] == torch.__version__
    assert written["threads"] == 2
    assert Path(written["cache"]).exists()
    assert written["kernels"]["available"] == kernels.available()

    assert main(common) == 0
    second = capsys.readouterr().out
    assert "measuring" not in second
    assert "measured before" in second
    assert main([*common, "--refresh"]) == 0
    assert "measured now" in capsys.readouterr().out
    Path(written["cache"]).write_text("{")
    assert main(common) == 0
    assert "measured now" in capsys.readouterr().out


def test_says_why_there_are_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "_library", None)
    monkeypatch.setattr(kernels, "_reason", "switched off by the test\nentirely")
    assert main(["doctor", "--device", "cpu", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert (
        "kernels          torch only: switched off by the test\n                 entirely" in shown
    )


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file where the folder should be")
    assert main(["doctor", "--device", "cpu", "--folder", str(tmp_path)]) == 0
    assert f"not kept: {cache} cannot be written" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--folder", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder; create it" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["doctor", "--json", str(tmp_path / "file" / "x.json")]) == 2
    assert "--json" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["doctor", "--device", "cuda"]) == 2
        assert "is not there: 0 CUDA devices" in capsys.readouterr().err


def test_scaled() -> None:
    assert doctor.scaled(1.234, "B/s") == "1.23 B/s"
    assert doctor.scaled(9.96e9, "B/s") == "10.0 GB/s"
    assert doctor.scaled(999.6e9, "FLOP/s") == "1.00 TFLOP/s"
    assert doctor.scaled(123456, "elements/s") == "123 k elements/s"
    assert doctor.scaled(5e18, "B") == "5000 PB"
    assert doctor.scaled(12, "elements/s") == "12.0 elements/s"


def test_the_file_is_gone_while_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    seen: list[list[str]] = []
    real = os.preadv

    def preadv(*args: object) -> int:
        seen.append(os.listdir(folder))
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    assert main(["doctor", "--device", "cpu", "--folder", str(folder)]) == 0
    assert seen
    assert not any(seen)
