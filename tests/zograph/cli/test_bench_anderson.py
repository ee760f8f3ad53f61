"""The benchmark of fixed points, at the size of a toy."""

from __future__ import annotations

import json
import math
import pickle
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from zograph.cli import main
from zograph.cli.anderson import images, model, solvers
from zograph.cli.anderson.command import PARTS
from zograph.cli.anderson.mixing import textbook
from zograph.cli.anderson.problems import Problem, spectral_radius
from zograph.cli.anderson.solvers import Run
from zograph.fixed_points import comparing


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    path = tmp_path / "toy.npz"
    np.savez(path, **arrays())
    return path


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (44, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(44) % 10
    return {
        "train_x": pixels[:40], "train_y": labels[:40], "test_x": pixels[40:], "test_y": labels[40:]
    }  # fmt: skip


def linear(factor: float, batch: int = 3) -> Problem:
    """A diagonal map whose spectrum goes up to `factor`."""
    factors = torch.linspace(0.1, factor, 20)
    return Problem(
        "linear", lambda z: factors * z + 1, torch.zeros(batch, 20), torch.full((batch,), factor)
    )


def options(**changed: object) -> Namespace:
    return Namespace(**{"tol": [1e-2, 1e-4], "max_iter": 300, "window": 5, "rounds": 1} | changed)


@pytest.mark.filterwarnings("ignore:zograph:UserWarning")
def test_all_parts_report(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparing, "LIMIT", 0.0)
    args = ["bench", "anderson", "--data", str(cifar), "--parts", *PARTS]
    args += ["--steps", "1", "--batch", "2", "--tested", "4", "--rounds", "1", "--max-iter", "6"]
    args += ["--pixels", "8", "--train-pixels", "4", "--checks", "2"]
    args += ["--cells", "trained", "0.9", "linear", "--train-seconds", "0.001", "--seeds", "0"]
    args += ["--model", "model.pt", "--json", "found.json", "--plot", "plots"]
    assert main(args) == 0
    found = json.loads(Path("found.json").read_text())
    assert found["images"] == "CIFAR-10"
    assert [p["problem"] for p in found["solvers"]] == ["trained", "0.9", "linear"]
    for problem in found["solvers"]:
        assert {"forward", "zograph", "zograph, bfloat16"} <= set(problem["solvers"])
        for row in problem["solvers"].values():
            assert set(row["to"]) == {"0.001", "0.0001"}
            assert len(row["curve"]["seconds"]) == len(row["curve"]["residual"]) <= 6
            assert len(row["iterations"]) == 2
            assert row["penalty"] > 0
            assert row["residual"]["typical"] <= row["residual"]["largest"]
    assert set(found["mixing"]["ways"]) == {"float32", "bfloat16", "textbook"}
    assert found["mixing"]["ways"]["textbook"]["of_textbook"] == 1
    assert len(found["modes"]) == 5
    for row in found["modes"]:
        assert set(row["seconds"]) == {"always", "off", "auto"}
        assert row["chosen"] in ("anderson", "picard")
    ways = [(row["method"], row["solver"]) for row in found["training"]]
    assert ways == [
        (m, s) for m in ("backpropagation", "zeroth order") for s in ("anderson", "picard")
    ]
    assert all(row["steps"] and 0 <= row["accuracy"] <= 1 for row in found["training"])
    drawn = sorted(p.name for p in Path("plots").iterdir())
    assert drawn == ["solvers-0.9.svg", "solvers-linear.svg", "solvers-trained.svg", "training.svg"]
    out = capsys.readouterr().out
    for title in (
        "cell trained: spectral radius",
        "crossover s",
        "mixing of one iteration",
        "fluctuation",
    ):
        assert title in out
    before = Path("model.pt").read_bytes()
    assert main([*args[:-4], "--parts", "mixing"]) == 0  # the model is read again, not trained
    assert Path("model.pt").read_bytes() == before
    assert "training the cell" not in capsys.readouterr().out


def test_solvers_are_compared_at_equal_accuracy_and_time() -> None:
    found = solvers.measure(options(), linear(0.97))
    forward, mixed = (found["solvers"][name] for name in ("forward", "zograph"))
    count = forward["to"]["0.0001"]["evaluations"]
    assert forward["to"]["0.01"]["evaluations"] < count < math.log(1e-4) / math.log(0.97)
    assert mixed["to"]["0.0001"]["evaluations"] < count / 3
    assert forward["to"]["0.0001"]["of_forward"] == 1
    assert forward["penalty"] == 1
    assert mixed["penalty"] > 1
    assert "crossover" in mixed
    assert "crossover" not in forward
    assert mixed["iterations"] == [mixed["to"]["0.0001"]["evaluations"]] * 3


def test_a_solver_that_does_not_arrive_has_no_time() -> None:
    found = solvers.measure(options(max_iter=12), linear(0.999))["solvers"]["forward"]
    assert found["to"]["0.0001"] == {
        "evaluations": None, "mean": None, "converged": 0, "seconds": None, "of_forward": None
    } | {k: None for k in found["to"]["0.0001"] if k == "of_torchdeq"}  # fmt: skip


def test_torchdeq_is_left_out_if_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(solvers, "find_spec", lambda name: None)
    assert "torchdeq" not in solvers.measure(options(), linear(0.5))["solvers"]


def test_torchdeq_stands_beside() -> None:
    pytest.importorskip("torchdeq")
    found = solvers.measure(options(), linear(0.9))["solvers"]
    assert found["torchdeq"]["to"]["0.01"]["of_torchdeq"] == 1
    assert found["zograph"]["to"]["0.01"]["of_torchdeq"] > 0


def run(residuals: list[float], seconds: list[float]) -> Run:
    return Run(torch.tensor(residuals).unsqueeze(1), seconds, seconds[-1])


def test_crossover_is_the_last_time_that_the_curves_meet() -> None:
    forward = run([1.0, 0.5, 0.25, 0.12, 0.06], [1.0, 2.0, 3.0, 4.0, 5.0])
    mixed = run([1.0, 0.5, 0.1, 0.01], [1.1, 2.3, 3.4, 4.5])
    found = solvers.equal_time(mixed, forward)
    assert found["crossover"] == 3.4
    assert found["equal_time"] == pytest.approx(0.01 / 0.12)
    worse = run([1.0, 0.9, 0.8, 0.7], [1.1, 2.3, 3.4, 4.5])
    assert solvers.equal_time(worse, forward)["crossover"] is None
    quick = run([1.0, 0.3], [0.1, 0.2])  # done before the other's first evaluation
    assert solvers.equal_time(quick, forward) == {
        "crossover": 1.0,
        "equal_time": pytest.approx(0.3),
    }


def test_the_spectral_radius_of_a_rotation_is_its_factor() -> None:
    turn = torch.tensor([[0.0, -0.8], [0.8, 0.0]])
    found = spectral_radius(lambda z: z @ turn, torch.ones(3, 2))
    assert found.tolist() == pytest.approx([0.8] * 3, rel=1e-5)


def test_the_textbook_formula_converges() -> None:
    problem = linear(0.9)
    z = textbook(problem.f, problem.z0, 5, 30)
    assert torch.allclose(problem.f(z), z, rtol=1e-3)


def test_the_recipe_is_reproducible() -> None:
    pixels, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    one, two = (model.train(pixels, labels, 2).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["cell.first.weight"], model.Classifier().cell.first.weight)


def test_batches_of_cifar_are_read_as_files_are(tmp_path: Path, cifar: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    given = arrays()
    for i, name in enumerate([*images.TRAIN, *images.TEST]):
        part, rows = ("test", slice(0, 4)) if i == 5 else ("train", slice(8 * i, 8 * i + 8))
        data = given[f"{part}_x"][rows].reshape(-1, 3072)
        batch = {b"data": data, b"labels": given[f"{part}_y"][rows].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    one, two = images.load(folder), images.load(cifar)
    for part in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(one, part), getattr(two, part))


def test_digits_stand_in() -> None:
    found = images.load(None)
    assert found.source == "digits"
    assert found.train_x.shape == (1500, 3, 32, 32)
    assert -2 <= float(found.train_x.min()) < float(found.train_x.max()) <= 2


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("run",)


def test_bad_input_is_refused(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("part.npz", **{k: v for k, v in arrays().items() if k != "test_y"})
    np.savez("small.npz", **arrays() | {"train_x": np.zeros((40, 3, 8, 8), np.uint8)})
    np.savez("labels.npz", **arrays() | {"test_y": np.full(4, 10)})
    Path("text.npz").write_text("no array")
    Path("empty").mkdir()
    Path("evil").mkdir()
    (Path("evil") / images.TRAIN[0]).write_bytes(pickle.dumps(Evil()))
    Path("bad.pt").write_text("no model")
    torch.save({"weight": torch.ones(2)}, "other.pt")
    data = ["--data", str(cifar)]
    cases = [
        (["--data", "part.npz"], "needs the arrays train_x, train_y, test_x, test_y"),
        (["--data", "small.npz"], "train images are uint8[40, 3, 8, 8]"),
        (["--data", "labels.npz"], "test labels must be integers from 0 to 9"),
        (["--data", "text.npz"], "cannot be read as an npz file"),
        (["--data", "nowhere.npz"], "cannot be read"),
        (["--data", "empty"], "data_batch_1 cannot be read"),
        (["--data", "evil"], "is no batch of CIFAR-10"),
        ([*data, "--batch", "5"], "--batch 5: there are 4 test images"),
        ([*data, "--batch", "2", "--tested", "5"], "--tested 5: there are 4 test images"),
        ([*data, "--batch", "2", "--tested", "2", "--model", "bad.pt"], "bad.pt: holds no model"),
        ([*data, "--batch", "2", "--tested", "2", "--model", "other.pt"], "other.pt: holds no"),
        (["--json", "cifar.npz/x/y.json"], "cannot write"),
    ]
    Path("cifar.npz").write_text("")
    for args, message in cases:
        assert main(["bench", "anderson", *args]) == 2
        found = capsys.readouterr()
        assert message in found.err
        assert "run" not in found.out.split()
    for args in (["--cells", "0"], ["--cells", "other"], ["--parts", "all"], ["--tol", "-1"]):
        with pytest.raises(SystemExit):
            main(["bench", "anderson", *args])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "anderson", *data, "--plot", "plots"]) == 2
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err
