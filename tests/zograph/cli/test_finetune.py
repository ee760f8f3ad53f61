"""`zograph finetune` on tiny models: the whole job, and every refusal."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zograph.cli import main
from zograph.cli.batches import IGNORED, Encoded, collate, in_order, padded_length, shuffled
from zograph.cli.scores import Score, change, score
from zograph.output import OutputFolder

CLASSIFY = ["--task", "sequence-classification"]
QUICK = [
    "--backend",
    "eager",
    "--steps",
    "6",
    "--batch-size",
    "8",
    "--lr",
    "1e-3",
    "--device",
    "cpu",
]


def finetune(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments), *QUICK])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run with bad input; return the one line that it says."""
    assert finetune(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("zograph finetune: error: ")
    return lines[0].removeprefix("zograph finetune: error: ")


def test_classification_end_to_end(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "model"
    assert finetune(bert, *CLASSIFY, "--data", sentences, "--out", out, "--schedule", "linear") == 0
    printed = capsys.readouterr().out
    assert "drawn at random: classifier.bias, classifier.weight" in printed
    record = json.loads((out / "zograph.json").read_text())
    assert record["steps_done"] == 6
    assert record["settings"]["lr"] == 1e-3
    assert record["before"]["train"]["loss"] != record["after"]["train"]["loss"]
    after, reloaded = record["after"]["held_out"], record["reloaded"]["held_out"]
    assert after["accuracy"] == reloaded["accuracy"]
    assert after["loss"] == pytest.approx(reloaded["loss"], rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["model"]


@pytest.mark.parametrize("trained", [(), ("--train", "LayerNorm|classifier")], ids=["all", "few"])
def test_a_budget_changes_no_bit_of_the_result(
    trained: tuple[str, ...],
    bert: Path,
    sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ways = {"resident": (), "host": ("--memory", "minimum"),
            "disk": ("--memory", "minimum", "--storage", "disk")}  # fmt: skip
    weights = {}
    for name, options in ways.items():
        out = tmp_path / name
        assert finetune(bert, *CLASSIFY, "--data", sentences, "--out", out, *trained, *options) == 0
        weights[name] = (out / "model.safetensors").read_bytes()
        printed = capsys.readouterr().out
        assert ("memory   " in printed) == (name != "resident")
    assert weights["host"] == weights["resident"]
    assert weights["disk"] == weights["resident"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(ways)
    assert "is too small" in refused(capsys, bert, *CLASSIFY, "--data", sentences, "--memory", "9")


def test_the_result_is_a_model_to_go_on_with(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert finetune(bert, *CLASSIFY, "--data", sentences, "--out", one) == 0
    assert finetune(one, *CLASSIFY, "--data", sentences, "--out", two) == 0
    first, second = (json.loads((p / "zograph.json").read_text()) for p in (one, two))
    for part in ("train", "held_out"):
        assert second["before"][part] == pytest.approx(first["after"][part])
    capsys.readouterr()
    three = tmp_path / "three.csv"
    three.write_text("text,label\ngood,1\nbad,2\nsad,0\n")
    assert "label '2' is out of range" in refused(capsys, one, *CLASSIFY, "--data", three)


def test_causal_lm_end_to_end(
    gpt2: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm"
    assert finetune(gpt2, "--task", "causal-lm", "--data", sentences, "--out", out) == 0
    assert "perplexity" in capsys.readouterr().out
    record = json.loads((out / "zograph.json").read_text())
    assert record["reloaded"]["held_out"]["loss"] == pytest.approx(
        record["after"]["held_out"]["loss"], rel=1e-5
    )


@pytest.mark.slow
def test_runs_are_reproducible(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name
        finetune(bert, *CLASSIFY, "--data", sentences, "--out", out, "--seed", seed)
        losses.append(json.loads((out / "zograph.json").read_text())["after"]["train"]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_only_what_matches_is_trained(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "out"
    finetune(bert, *CLASSIFY, "--data", sentences, "--out", out, "--train", "LayerNorm|classifier")
    before, after = load_file(bert / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {n for n, t in before.items() if not torch.equal(t, after[f"bert.{n}"])}
    assert changed
    assert all("LayerNorm" in name for name in changed)
    assert "trained  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text-column", "words"], "no column 'words'; its columns: text, label"),
        (["--data", "none.csv"], "none.csv: cannot be read: No such file or directory"),
        (["--eval-data", "none.csv"], "none.csv: cannot be read"),
        (["--train", "nothing"], "--train 'nothing' matches no parameter; the first names: bert."),
        (["--train", "("], "--train '(' is no regular expression"),
        (["--anderson", "4x4", "--directions", "2"], "directions is 2, and anderson shares 4"),
        (["--anderson", "4x4", "--weight-decay", "0.1"], "use one of weight_decay and anderson"),
        (["--max-length", "64"], "--max-length 64: the model has only 32 positions"),
        (["--draw", "step.bmp"], "the ending must be one of .svg, .png, .pdf, .dot"),
    ],
)
def test_refusals(
    bert: Path,
    sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    said = refused(capsys, bert, *CLASSIFY, "--data", sentences, "--out", out, *arguments)
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_refused_device(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", str(bert), *CLASSIFY, "--data", str(sentences)]
    assert main([*command, "--out", str(tmp_path / "out"), "--device", "abacus"]) == 2
    assert "device='abacus' is unknown" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_label_only(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.csv"
    data.write_text("text,label\ngood,1\nfine,1\nnice,1\n")
    assert "every training row has the label" in refused(capsys, bert, *CLASSIFY, "--data", data)


UNUSABLE = [["--task", "poetry"], ["--steps", "0"], ["--lr", "nan"]]
UNUSABLE += [["--anderson", text] for text in ("16", "x8", "16x", "0x8", "16x1", "-4x8", "512x8")]


@pytest.mark.parametrize("option", UNUSABLE)
def test_unusable_values_are_refused_by_the_parser(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "m", *CLASSIFY, "--data", "d", *option])
    assert stop.value.code == 2
    assert f"argument {option[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["./none", "/none", "builtin:none"])
def test_missing_model(name: str, sentences: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in refused(capsys, name, *CLASSIFY, "--data", sentences)


def test_folders_that_are_no_model(
    sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "config.json is missing" in refused(capsys, tmp_path, *CLASSIFY, "--data", sentences)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in refused(capsys, tmp_path, *CLASSIFY, "--data", sentences)


def test_out_that_cannot_be_written(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    command = [bert, *CLASSIFY, "--data", sentences, "--out"]
    assert "is not empty" in refused(capsys, *command, full)
    assert "there is a file of that name" in refused(capsys, *command, full / "mine.txt")
    assert "cannot write there" in refused(capsys, *command, full / "mine.txt" / "deeper")
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    assert finetune(*command, full, "--overwrite") == 0
    assert "zograph.json" in {p.name for p in full.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_out(
    bert: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for out in (locked, locked / "model"):
        said = refused(capsys, bert, *CLASSIFY, "--data", sentences, "--out", out)
        assert "cannot write there" in said


def test_output_folder_leaves_nothing_without_commit(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "a" / "b") as out:
        (out.staging / "half").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_saves_the_weights_so_far(
    bert: Path,
    sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zograph.cli import training
    from zograph.cli.progress import Progress

    class Stopping(Progress):
        def step(self, done: int, loss: torch.Tensor, lr: float) -> None:
            super().step(done, loss, lr)
            if done == 3:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "Progress", Stopping)
    handler = signal.getsignal(signal.SIGINT)
    out = tmp_path / "out"
    assert finetune(bert, *CLASSIFY, "--data", sentences, "--out", out) == 130
    assert "interrupted after 3 of 6 steps; the weights so far are in" in capsys.readouterr().err
    assert json.loads((out / "zograph.json").read_text())["steps_done"] == 3
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_request_to_end_leaves_nothing(
    bert: Path,
    sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zograph.cli import training

    def stop(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "choose_trainable", stop)
    assert finetune(bert, *CLASSIFY, "--data", sentences, "--out", tmp_path / "out") == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_reads_back_differently_is_told(
    bert: Path,
    sentences: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Score, "agrees", lambda self, other, tolerance: False)
    assert finetune(bert, *CLASSIFY, "--data", sentences, "--out", tmp_path / "out") == 1
    assert "NOT the score above" in capsys.readouterr().out


@pytest.mark.slow
def test_help_answers_without_what_is_slow_to_import() -> None:
    code = (
        "import sys, zograph.cli; zograph.cli.build_parser(); "
        "print({'transformers', 'torch._dynamo', 'torch._inductor', 'matplotlib'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout == "set()\n"
    for command in ([], ["finetune"], ["log"], ["draw"], ["bench", "step"]):
        shown = subprocess.run(
            [sys.executable, "-m", "zograph", *command, "--help"], capture_output=True, check=True
        )
        assert b"usage: zograph" in shown.stdout


def test_batches_have_one_size_and_few_lengths() -> None:
    rows = [Encoded(list(range(1, n + 1)), n % 2) for n in range(1, 11)]
    batches = list(in_order(rows, 0, 10, 4))
    assert [tuple(b["input_ids"].shape) for b in batches] == [(4, 8), (4, 8), (4, 10)]
    assert batches[-1]["labels"].tolist() == [1, 0, IGNORED, IGNORED]
    assert [padded_length(n, 100) for n in (1, 8, 9, 70)] == [8, 8, 16, 100]


def test_padding_is_masked_and_ignored() -> None:
    batch = collate([Encoded([5, 6, 7], None), Encoded([5, 6], None)], 0, 8, 2)
    assert batch["attention_mask"].sum(1).tolist() == [3, 2]
    assert batch["labels"][1].tolist() == [5, 6] + [IGNORED] * 6


def test_every_epoch_visits_every_row_once() -> None:
    rows = [Encoded([i], 0) for i in range(10)]
    batches = shuffled(rows, 0, 8, 4, seed=0)
    seen = [i for _ in range(5) for i in next(batches)["input_ids"][:, 0].tolist()]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_score_says_its_error() -> None:
    score = Score(0.5, 0.8, 400, 0.01)
    assert str(score) == "loss 0.5000 +- 0.0100  accuracy 0.800 +- 0.020  (400 examples)"
    assert Score(0.0, None, 3).perplexity == 1.0


def test_change_is_told_in_standard_errors() -> None:
    before, after = Score(0.7, 0.5, 400, 0.03), Score(0.5, 0.8, 400, 0.04)
    assert change(before, after) == (
        "loss -0.2000 (4.0 standard errors), accuracy +0.3000 (9.4 standard errors)"
    )
    assert change(Score(1.0, None, 4), Score(0.0, None, 4)) == "loss -1.0000, perplexity -1.72"


def test_score_is_the_mean_over_the_real_rows() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 0, 0, IGNORED])
    each = torch.nn.functional.cross_entropy(logits[:3], labels[:3], reduction="none")
    out = SimpleNamespace(loss=each.mean(), logits=logits)
    found = score(lambda **batch: out, [{"labels": labels}], torch.device("cpu"))
    assert found.loss == pytest.approx(each.mean().item())
    assert found.loss_error == pytest.approx(each.std(correction=0).item() / 3**0.5)
    assert (found.accuracy, found.count) == (pytest.approx(2 / 3), 3)
