"""`zograph log`: what it prints, checks, exports and draws; the log itself is only read."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import zograph
from tests.zograph.seedlog import runs
from zograph.cli import log_export, main
from zograph.seedlog import read_log
from zograph.seedlog.columns import COLUMNS, branch_losses, mean_losses, projected_grads

STEPS = 6
DIRECTIONS = 3
BROKEN = 2
"""The step whose batch has no finite loss."""


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[bytes, list[zograph.StepRecord], list[float]]:
    """A log with several directions and a skipped step; what its steps said and returned."""
    path = tmp_path_factory.mktemp("log") / "run.zolog"
    records, losses = [], []
    with runs.start(log=path, directions=DIRECTIONS, on_nan="skip") as step:
        for i in range(STEPS):
            batch = runs.batch(i)
            if i == BROKEN:
                batch["x"][:] = torch.inf
            losses.append(float(step(**batch)))
            assert step.last is not None
            records.append(step.last)
    return path.read_bytes(), records, losses


@pytest.fixture
def path(tmp_path: Path, run: tuple[bytes, object, object]) -> Iterator[Path]:
    found = tmp_path / "run.zolog"
    found.write_bytes(run[0])
    yield found
    assert not list(tmp_path.glob(".*"))


def log(*arguments: object) -> int:
    return main(["log", *map(str, arguments)])


def same(one: float, two: float) -> bool:
    return one == two or (np.isnan(one) and np.isnan(two))


def test_the_summary_and_the_newest_steps(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    assert log(path, "--steps", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{STEPS} steps of {24 + 24 * DIRECTIONS} bytes" in lines[0]
    assert f"{len(before)} bytes in all" in lines[0]
    text = "\n".join(lines)
    for part in ("cpu, backend eager, 2 threads", "directions 3", "eps 0.001", "1 skipped"):
        assert part in text
    assert [line.split()[0] for line in lines[-3:]] == ["step", "4", "5"]
    assert log(path, "--steps", 0) == 0
    assert "projected grad" not in capsys.readouterr().out
    assert log(path) == 0
    newest = capsys.readouterr().out.splitlines()[-5:]
    assert [line.endswith("  skipped") for line in newest] == [False, True, False, False, False]
    assert path.read_bytes() == before


def test_columns_have_the_bits_of_the_records(
    path: Path, run: tuple[bytes, list[zograph.StepRecord], list[float]]
) -> None:
    found, (_, records, losses) = read_log(path), run
    for i, record in enumerate(records):
        plus, minus = branch_losses(found)[i].tolist()
        assert same(plus, record.loss_plus)
        assert same(minus, record.loss_minus)
        assert same(projected_grads(found)[i], record.projected_grad)
        assert same(mean_losses(found)[i], losses[i])


def test_csv_reads_back_bit_for_bit(
    path: Path,
    run: tuple[bytes, list[zograph.StepRecord], list[float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zograph.seedlog.columns._BLOCK", 4)
    assert log(path, "--csv", tmp_path / "steps.csv") == 0
    assert capsys.readouterr().out.startswith("log  ")
    assert log(path, "--csv", "-") == 0
    text = capsys.readouterr().out
    assert (tmp_path / "steps.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert tuple(rows[0]) == COLUMNS
    each = [(record, d) for record in run[1] for d in record.directions]
    assert len(rows) == len(each) == STEPS * DIRECTIONS
    table = read_log(path).table["each"].reshape(-1)
    for row, (record, direction), logged in zip(rows, each, table, strict=True):
        assert (int(row["step"]), int(row["seed"])) == (record.step, direction.seed)
        assert (float(row["lr"]), row["skipped"]) == (record.lr, str(int(record.skipped)))
        for name in ("loss_plus", "loss_minus", "projected_grad"):
            value = float(row[name])
            assert same(value if "grad" in name else np.float32(value), getattr(direction, name))
        for name in ("scale", "coef"):
            assert np.float32(row[name]) == logged[name]


def test_pictures(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("new/a.svg", "b.svg", "c.png"):
        assert log(path, "--plot", tmp_path / name) == 0
    svg = (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in svg
    assert (tmp_path / "new" / "a.svg").read_bytes() == svg
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_smoothed_line_passes_over_what_is_not_finite() -> None:
    losses = np.array([np.nan, 1.0, 3.0, np.inf, *[2.0] * 100], dtype=np.float32)
    found = log_export.smoothed(losses)
    assert np.isnan(found[0])
    assert found[1:4].tolist() == [1.0, 2.0, 2.0]
    assert found[-1] == 2.0


def test_check_tells_whole_torn_and_damaged(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = path.read_bytes()
    size = (len(whole) - read_log(path).start) // STEPS
    assert log(path, "--check") == 0
    assert f"whole; {STEPS} steps, {len(whole)} bytes" in capsys.readouterr().out

    path.write_bytes(whole[:-7])
    assert log(path, "--check") == 1
    said = capsys.readouterr().out
    assert f"the last {size - 7} bytes, from byte {len(whole) - size} on" in said
    assert f"goes on after {STEPS - 1} steps" in said
    assert log(path) == 0
    assert "torn     the last" in capsys.readouterr().out
    assert path.read_bytes() == whole[:-7]

    at = len(whole) - 3 * size
    path.write_bytes(whole[: at + 5] + b"?" + whole[at + 6 :])
    for option in ((), ("--check",)):
        assert log(path, *option) == 2
        assert f"damaged at byte {at}, in the record of step {STEPS - 3}" in capsys.readouterr().err


def test_what_is_no_log(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = path.read_bytes()
    cases = {
        "is no seed log": b"text,label\n",
        "comes from a newer version": whole[:8] + b"\2\0\0\0" + whole[12:],
        "damaged in its header": whole[:40] + b"?" + whole[41:],
    }
    for message, data in cases.items():
        path.write_bytes(data)
        for option in ((), ("--check",)):
            assert log(path, *option) == 2
            assert message in capsys.readouterr().err
    for name, message in (("none.zolog", "No such file"), (".", "Is a directory")):
        assert log(tmp_path / name, "--check") == 2
        assert message in capsys.readouterr().err


def test_an_empty_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.zolog"
    runs.start(log=path).close()
    assert log(path) == 0
    assert "none yet; lr 0.05" in capsys.readouterr().out
    assert log(path, "--csv", "-") == 0
    assert capsys.readouterr().out == ",".join(COLUMNS) + "\n"
    assert log(path, "--plot", tmp_path / "a.svg") == 2
    assert "has no step yet" in capsys.readouterr().err


def test_refusals(
    path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = path.read_bytes()
    (tmp_path / "file").write_text("")
    cases = [
        ("--csv", path, "is the log itself"),
        ("--plot", path, "is the log itself"),
        ("--csv", tmp_path / "none" / "a.csv", "cannot be written: No such file"),
        ("--plot", tmp_path / "a.bmp", "the ending must be one of .svg, .png, .pdf"),
        ("--plot", tmp_path / "file" / "a.svg", "cannot write in"),
    ]
    for option, target, message in cases:
        assert log(path, option, target) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert log(path, "--plot", tmp_path / "a.svg") == 2
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_the_log_of_a_run_under_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.zolog"
    with runs.start(log=path) as step:
        runs.take(step, range(2))
        assert log(path, "--check") == 0
        assert "whole; 2 steps" in capsys.readouterr().out
        runs.take(step, range(2, 3))
    assert len(read_log(path)) == 3


@pytest.mark.slow
def test_it_answers_without_transformers_and_to_a_reader_that_leaves(path: Path) -> None:
    code = (
        "import sys; from zograph.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'transformers' in sys.modules or 'matplotlib' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "log", str(path), "--csv", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
