"""`zograph finetune --log --resume`: kills and stops change no bit; other commands are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import zograph
from zograph.cli import main, training
from zograph.cli.batches import Encoded, shuffled
from zograph.cli.progress import Progress
from zograph.cli.resuming import beside
from zograph.seedlog import read_log

COMMON = ["--task", "sequence-classification", "--backend", "eager", "--device", "cpu"]
COMMON += ["--batch-size", "8", "--lr", "1e-2", "--log-every", "3"]
STEPS = 5
AUTO = ("--fold-every", "auto")


def command(model: Path, data: Path, log: Path, *arguments: object) -> list[str]:
    """Arguments of a run; those of the test come last, and count."""
    common = [model, *COMMON, "--steps", STEPS, "--data", data, "--log", log, *arguments]
    return ["finetune", *map(str, common)]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "zograph.json").read_text())
    return found


def stop(arguments: list[str], log: Path, steps: int, sent: signal.Signals) -> tuple[int, str]:
    """Run a process and send it a signal as soon as its log has so many steps."""
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    with subprocess.Popen(
        [sys.executable, "-m", "zograph", *arguments],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not log.exists() or log.stat().st_size < read_log(log).start + 48 * steps:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
        return process.returncode, said


@pytest.mark.slow
def test_a_run_that_is_killed_terminated_and_interrupted(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out, steps = tmp_path / "run.zolog", tmp_path / "out", 48
    options = ("--schedule", "linear", "--steps", steps, "--out", out, "--resume")
    arguments = command(bert, sentences, log, *options)

    assert stop(arguments, log, 3, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not out.exists()
    shutil.rmtree(next(tmp_path.glob(".out-*")))

    code, said = stop(arguments, log, 12, signal.SIGTERM)
    done = len(read_log(log))
    assert code == 0, said
    assert 12 <= done < steps
    assert f"stopped after {done} of {steps} steps; the weights so far are in {out}" in said
    assert "with --resume goes on" in said
    assert record(out)["steps_done"] == done
    assert record(out)["after"] == {}

    code, said = stop(arguments, log, done + 3, signal.SIGINT)
    assert code == 130, said
    assert done + 3 <= len(read_log(log)) < steps
    assert f"interrupted after {len(read_log(log))} of {steps} steps" in said

    assert main(arguments) == 0
    whole = tmp_path / "whole"
    undisturbed = ("--schedule", "linear", "--steps", steps, "--out", whole)
    assert main(command(bert, sentences, tmp_path / "whole.zolog", *undisturbed)) == 0
    assert weights(out) == weights(whole)
    assert log.read_bytes() == (tmp_path / "whole.zolog").read_bytes()
    for part in ("before", "after", "reloaded", "loss", "steps_done"):
        assert record(out)[part] == record(whole)[part]
    names = {"run.zolog", "whole.zolog"}
    assert {p.name for p in tmp_path.iterdir()} == {
        *names, *(f"{n}.batches.json" for n in names), "out", "whole",
    }  # fmt: skip


@pytest.mark.slow
def test_more_steps_with_a_torn_log_and_weights_on_a_disk(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "run.zolog", tmp_path / "out"
    options = ["--out", out, "--eval-size", 2]
    assert main(command(bert, sentences, log, *options, "--steps", 3, "--fold-every", 2)) == 0
    assert read_log(log).header.options["fold_every"] == 2
    log.write_bytes(log.read_bytes()[:-9])
    capsys.readouterr()
    disk = ["--memory", "minimum", "--storage", "disk", "--fsync-every", 2, "--resume"]
    assert main(command(bert, sentences, log, *options, *disk)) == 0
    said = capsys.readouterr().out
    assert "the last 39 bytes" in said
    assert "goes on after 2 steps" in said
    assert (tmp_path / "run.zolog.work").is_dir()

    plain = command(bert, sentences, log, "--out", tmp_path / "plain", "--eval-size", 2)
    where = plain.index("--log")
    assert main(plain[:where] + plain[where + 2 :]) == 0
    assert weights(out) == weights(tmp_path / "plain")
    assert record(out)["loss"] == record(tmp_path / "plain")["loss"]


def test_a_mixed_trajectory(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is resumed as the log has it, whether the flag is given again or not."""
    whole, log, out = tmp_path / "whole.zolog", tmp_path / "run.zolog", tmp_path / "out"
    mixed, more = ("--anderson", "3x4", "--eval-size", 3), ("--eval-size", 3, "--resume")
    assert main(command(bert, sentences, whole, *mixed, "--out", out)) == 0
    said = capsys.readouterr().out
    assert re.search(r"mixing   \d of 5 steps mixed; 1 cycles, \d too noisy", said)
    header = read_log(whole).header
    assert header.options["anderson"] == asdict(zograph.Anderson(directions=3, inner_steps=4))
    assert header.directions == 3
    assert record(out)["settings"]["anderson"].startswith("Anderson(directions=3, inner_steps=4")
    assert main(command(bert, sentences, log, *mixed, "--steps", 2)) == 0
    assert main(command(bert, sentences, log, *more, "--steps", 4)) == 0
    assert main(command(bert, sentences, log, *more, "--anderson", "3x4")) == 0
    assert log.read_bytes() == whole.read_bytes()
    said = refused(capsys, command(bert, sentences, log, *more, "--anderson", "3x5"))
    assert "was written with anderson={" in said
    assert "'inner_steps': 5" in said


@pytest.fixture(scope="module")
def ended(
    bert: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, bytes]]:
    """A run with a log that has taken its steps, and the files that it left."""
    folder = tmp_path_factory.mktemp("ended")
    assert main(command(bert, sentences, folder / "run.zolog", "--eval-size", 3, *AUTO)) == 0
    return folder, {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def log(ended: tuple[Path, dict[str, bytes]]) -> Path:
    folder, files = ended
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "run.zolog"


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("zograph finetune: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is there already and is not overwritten. Add --resume"),
        (["--resume", "--steps", 4], "holds 5 steps already"),
        (["--resume", "--batch-size", 4], "--batch-size 4: the run of"),
        (["--resume", "--lr", 1e-3], "began with --lr 0.01. Give the same"),
        (["--resume", "--schedule", "linear"], "began with --schedule constant"),
        (["--resume", "--seed", 1], "--seed 1"),
        (["--resume", "--train", "classifier"], "began with --train not given"),
        (["--resume", "--directions", 2], "--directions 2"),
        (["--resume", "--eval-size", 3, "--anderson", "1x3"], "was written with anderson=None"),
        (["--resume", "--compute-dtype", "bfloat16"], "--compute-dtype bfloat16"),
        (["--resume", "--eval-size", 4], "the examples to score on are not those"),
        (["--resume", "--eval-size", 3, "--max-length", 16], "--max-length 16: texts were cut"),
    ],
)
def test_other_options(
    bert: Path,
    sentences: Path,
    log: Path,
    arguments: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = log.read_bytes()
    assert message in refused(capsys, command(bert, sentences, log, *arguments))
    assert log.read_bytes() == before


def test_other_data_and_another_model(
    bert: Path, sentences: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = sentences.read_text().splitlines()
    other = tmp_path / "other.csv"
    other.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    resumed = ["--resume", "--eval-size", 3]
    said = refused(capsys, command(bert, other, log, *resumed))
    assert "the texts, labels, tokens or their order are not those" in said
    changed = tmp_path / "bert"
    shutil.copytree(bert, changed)
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    said = refused(capsys, command(changed, sentences, log, *resumed))
    assert "starts from other values of the same model" in said


def test_files_that_are_damaged_or_missing(
    bert: Path, sentences: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = command(bert, sentences, log, "--resume")
    whole, aside = log.read_bytes(), beside(log)
    for data, message in (
        (b"text,label\n", "is no seed log"),
        (whole[:8] + b"\2\0\0\0" + whole[12:], "comes from a newer version"),
        (whole[:-90] + b"?" + whole[-89:], "is damaged at byte"),
    ):
        log.write_bytes(data)
        assert message in refused(capsys, resumed)
        assert log.read_bytes() == data
    log.write_bytes(whole)
    aside.write_text("{}")
    assert "batches.json is damaged" in refused(capsys, resumed)
    aside.unlink()
    assert "nothing says which batches come next" in refused(capsys, resumed)
    nowhere = command(bert, sentences, log / "in" / "a file", "--resume")
    assert "cannot write in" in refused(capsys, nowhere)
    alone = ["finetune", str(bert), *COMMON, "--data", str(sentences), "--resume"]
    assert "--resume needs --log FILE" in refused(capsys, alone)


def test_a_log_of_a_run_under_way(
    bert: Path, sentences: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from zograph.stores.lock import FileLock

    lock = FileLock(log, "")
    try:
        resumed = command(bert, sentences, log, "--resume", "--eval-size", 3)
        assert "another run writes the log" in refused(capsys, resumed)
    finally:
        lock.release()


def test_the_result_of_the_same_run_is_replaced_and_no_other(
    bert: Path, sentences: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    resumed = command(bert, sentences, log, "--resume", "--eval-size", 3, "--out", out)
    assert main(resumed) == 0
    assert "0 steps, with compilation" in capsys.readouterr().out
    first = weights(out)
    assert read_log(log).header.decided == {"fold_every": 1}
    assert main(resumed) == 0
    assert weights(out) == first
    (out / "zograph.json").write_text(json.dumps(record(out) | {"log": "0" * 16}))
    assert "is not empty; choose another" in refused(capsys, resumed)


def test_an_interrupt_between_steps_and_result(
    bert: Path,
    sentences: Path,
    log: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "train", interrupted)
    assert main(command(bert, sentences, log, "--resume", "--eval-size", 3)) == 130
    said = capsys.readouterr().err
    assert "interrupted; the log is whole; the same command with --resume goes on" in said


@pytest.mark.parametrize("option", ["--fold-every", "--fsync-every"])
def test_periods(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["finetune", "m", *COMMON, "--data", "d", option, "-1"])
    assert end.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 23])
def test_batches_from_the_middle(start: int) -> None:
    rows = [Encoded([i + 1], 0) for i in range(10)]
    whole = list(islice(shuffled(rows, 0, 8, 4, seed=3), 30))
    part = list(islice(shuffled(rows, 0, 8, 4, seed=3, start=start), 30 - start))
    for one, two in zip(whole[start:], part, strict=True):
        assert torch.equal(one["input_ids"], two["input_ids"])


def test_progress_goes_on_as_it_would_have(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [1 / (i + 1) for i in range(70)]
    whole = Progress(70, 4, torch.device("cpu"))
    for done, loss in enumerate(losses, 1):
        whole.step(done, torch.tensor(loss), 0.1)
    part = Progress(70, 4, torch.device("cpu"), losses[:41])
    for done, loss in enumerate(losses[41:], 42):
        part.step(done, torch.tensor(loss), 0.1)
    assert part.history == whole.history
