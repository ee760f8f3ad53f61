"""`solver="auto"` measures before the first step, records what it chose and measures no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zograph
from tests.zograph.test_fixed_point_graphs import Model, batch, compiled, loss
from zograph import printer
from zograph.cli import main
from zograph.fixed_points import Choice, SolveOptions, comparing, nodes
from zograph.fixed_points.comparing import choose, compare, evaluations_until
from zograph.fixed_points.progress import FixedPointInfo
from zograph.passes import Anderson
from zograph.pipeline import default_passes
from zograph.seedlog import read_log

FORWARD = [[0.0, 9.0, 1.0], [0.0, 8.0, 2.0]]
MIXING = [[0.0, 90.0, 1.0], [0.0, 8.0, 2.0]]

Trials = list[int]
Decide = Callable[..., Trials]


def auto(blocks: int = 3, **options: Any) -> nn.Module:
    return Model(blocks, **{"solver": "auto"} | options)


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Decide:
    """Let the trials to come find what the test says; the list counts their samples."""

    def fake(*findings: list[list[float]]) -> Trials:
        trials: Trials = []

        def found(cell: Any, z0: Any, options: SolveOptions) -> Any:
            z, info, _ = compare(cell, z0, options)
            trials.append(len(z0[0]))
            return z, info, torch.tensor(findings[len(trials) - 1], dtype=torch.float64)

        monkeypatch.setattr(nodes, "compare", found)
        monkeypatch.setattr(comparing, "ROUNDS", 1)
        return trials

    return fake


def solvers(step: zograph.ZOStep) -> dict[str, str]:
    return {name: choice.solver for name, choice in step.solvers.items()}


def take(step: zograph.ZOStep, steps: range) -> list[tuple[float, float]]:
    """Losses of steps on batches of two sizes."""
    found = []
    for i in steps:
        step(**batch(6 + i % 2, seed=i))
        assert step.last is not None
        found.append((step.last.loss_plus, step.last.loss_minus))
    return found


NAMES = ["blocks.0", "blocks.1", "blocks.2"]
MIXED = dict(zip(NAMES, ["picard", "anderson", "picard"], strict=True))


def test_each_fixed_point_is_measured_once(decide: Decide) -> None:
    trials = decide(FORWARD, MIXING, FORWARD)
    step = compiled(auto())
    assert step.solvers == {}
    take(step, range(3))
    step.evaluate(x=batch(5)["x"])
    assert trials == [6, 6, 6]  # other sizes and an evaluation follow what was found
    assert solvers(step) == MIXED
    assert step.solvers["blocks.1"] == Choice("anderson", 90.0, 8.0, 1.0)


def test_the_graph_has_what_was_chosen_in_both_branches(decide: Decide) -> None:
    decide(FORWARD, MIXING, FORWARD)
    step = compiled(auto())
    step(**batch())
    text = printer.text(step.graph)
    assert text.count("= anderson_solve(") == text.count("= picard_solve(") == 2
    assert "trial_solve" not in text
    step.evaluate(x=batch()["x"])
    text = printer.text(step.graph)
    assert text.count("= anderson_solve(") == text.count("= picard_solve(") == 1


def test_a_trial_changes_nothing(decide: Decide) -> None:
    """Bits are those of a run whose calls name the same solvers."""
    decide(FORWARD, MIXING, FORWARD)
    step, state = compiled(auto()), torch.random.get_rng_state()
    weights = [p.detach().clone() for p in step.model.parameters()]
    step.prepare(**batch())
    assert solvers(step) == MIXED
    assert step.last is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, step.model.parameters(), weights))
    named = auto()
    for cell, solver in zip(named.blocks, MIXED.values(), strict=True):  # type: ignore[arg-type]
        cell.options["solver"] = solver
    assert take(step, range(3)) == take(compiled(named), range(3))


@pytest.mark.parametrize("mode", ["always", "off"])
def test_a_named_mode_measures_nothing(mode: Any, decide: Decide) -> None:
    trials = decide()
    step = compiled(auto(), passes=default_passes().replace("anderson", Anderson(mode)))
    take(step, range(2))
    assert trials == []
    assert step.solvers == {}


def test_named_solvers_are_not_measured(decide: Decide) -> None:
    trials = decide()
    take(compiled(Model(2, solver="picard")), range(1))
    assert trials == []


WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "host": {"memory": "minimum"},
    "disk": {"memory": "minimum", "storage": "disk"},
    "periods": {"memory": "minimum", "storage": "disk", "fold_every": "auto"},
    "encoded": {"memory": "minimum", "storage": "disk", "transfer_dtype": "bfloat16"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_has_the_same_bits(
    way: str, decide: Decide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    decide(FORWARD, MIXING, FORWARD)
    whole = compiled(auto(), log="whole", **WAYS[way])
    expected = take(whole, range(5))
    decide(FORWARD, MIXING, FORWARD)
    with compiled(auto(), log="log", **WAYS[way]) as step:
        take(step, range(2))
    trials = decide(*[MIXING] * 3)
    with zograph.resume(auto(), "log", loss_fn=loss, **WAYS[way]) as step:
        assert take(step, range(2, 5)) == expected[2:]
        assert solvers(step) == MIXED
        ends = [s.state_dict() for s in (step, whole)]
        assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
    whole.close()
    assert trials == []
    assert Path("log").read_bytes() == Path("whole").read_bytes()


CHILD = """
    import sys, warnings
    from pathlib import Path
    import zograph
    from tests.zograph.test_fixed_point_auto import auto, compiled, loss, take
    log = Path(sys.argv[1])
    if log.exists():
        step = zograph.resume(auto(), log, loss_fn=loss)
    else:
        step = compiled(auto(), log=log)
    first = 0 if step.last is None else step.last.step + 1
    take(step, range(first, first + 2))
    print("ready", flush=True)
    take(step, range(first + 2, 4000))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_what_it_measured(tmp_path: Path) -> None:
    """Real measurements, in processes that are killed; the end is a run with what they chose."""
    log = tmp_path / "log"
    recorded = []
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(log)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGKILL)
        recorded.append(read_log(log, warn=False).header.decided)
    assert recorded[0] == recorded[1] == recorded[2]
    assert list(recorded[0]["solvers"]) == NAMES
    named = auto()
    for cell, choice in zip(named.blocks, recorded[0]["solvers"].values(), strict=True):  # type: ignore[arg-type]
        cell.options["solver"] = choice["solver"]
    done = len(read_log(log, warn=False))
    with zograph.resume(auto(), log, loss_fn=loss) as step:
        found = take(step, range(done, done + 3))
    assert found == take(compiled(named), range(done + 3))[done:]


def test_a_log_has_it_before_the_first_step(decide: Decide, tmp_path: Path) -> None:
    """A run that ends between its measurement and its first step is not measured again."""
    path = tmp_path / "log"
    decide(FORWARD, MIXING, FORWARD)
    with compiled(auto(), log=path) as step:
        assert read_log(path).header.decided == {}
        step.evaluate(x=batch()["x"])
        assert list(read_log(path).header.decided["solvers"]) == NAMES
        with pytest.raises(zograph.errors.StoreError, match="another run writes"):
            zograph.resume(auto(), path, loss_fn=loss)
    trials = decide()
    with zograph.resume(auto(), path, loss_fn=loss) as step:
        take(step, range(1))
        assert solvers(step) == MIXED
    assert trials == []
    assert {p.name for p in tmp_path.iterdir()} == {"log"}


def test_a_log_without_an_entry_mixes(decide: Decide, tmp_path: Path) -> None:
    """Logs of earlier versions have none; with a step in them nothing is measured any more."""
    path = tmp_path / "log"
    mixes = default_passes().replace("anderson", Anderson("always"))
    with compiled(auto(), log=path, passes=mixes) as step:
        expected = take(step, range(2))
        expected += take(step, range(2, 4))
    trials = decide()
    whole = read_log(path)
    path.write_bytes(path.read_bytes()[: whole.start + 2 * whole.table.itemsize])
    with zograph.resume(auto(), path, loss_fn=loss) as step:
        assert take(step, range(2, 4)) == expected[2:]
        assert step.solvers == {}
    assert trials == []


class Late(nn.Module):
    """Batches of more rows than three have a second fixed point."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + (x.shape[0] > 3)):
            x, _ = zograph.fixed_point(lambda z, x=x: torch.tanh(z @ self.w + x), x)
        return x.square().mean()


def test_what_comes_after_the_first_step_mixes(decide: Decide) -> None:
    trials = decide(FORWARD)
    step = zograph.compile(Late(), lr=0.1, backend="eager", dynamic=False)
    step(x=torch.ones(3, 4))
    step(x=torch.ones(5, 4))
    assert trials == [3]
    assert solvers(step) == {"model": "picard"}
    text = printer.text(step.graph)
    assert text.count("= picard_solve(") == text.count("= anderson_solve(") == 2


def test_all_batches_of_the_first_step_are_looked_at(decide: Decide) -> None:
    trials = decide(FORWARD, FORWARD)
    step = zograph.compile(Late(), lr=0.1, backend="eager", dynamic=False)
    step(batches=[{"x": torch.ones(3, 4)}, {"x": torch.ones(5, 4)}])
    assert trials == [3, 5]
    assert solvers(step) == {"model": "picard", "model#1": "picard"}


def test_a_frozen_fixed_point_keeps_the_names_in_order(decide: Decide) -> None:
    """Hoisted ones, which both branches share, are counted with those of each branch."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(0.1 * torch.ones(4, 4), requires_grad=False)
            self.w = nn.Parameter(0.1 * torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            a, _ = zograph.fixed_point(lambda z: torch.tanh(z @ self.frozen + x), x)
            b, _ = zograph.fixed_point(lambda z: torch.tanh(z @ self.w + a), a)
            return b.mean()

    decide(FORWARD, MIXING)
    step = zograph.compile(Two(), lr=0.1, backend="eager")
    step(x=torch.ones(3, 4))
    assert solvers(step) == {"model": "picard", "model#1": "anderson"}
    text = printer.text(step.graph)
    assert (text.count("= picard_solve("), text.count("= anderson_solve(")) == (1, 2)


def test_a_trial_needs_the_memory_of_mixing(decide: Decide) -> None:
    """It fits wherever a step that mixes does; not where forward iteration alone would."""
    least = {}
    for mode in ("always", "off"):
        passes = default_passes().replace("anderson", Anderson(mode))  # type: ignore[arg-type]
        step = compiled(auto(window=9), memory="minimum", passes=passes)
        step.prepare(**batch(200))
        least[mode] = step.plan.device_bytes
    decide(FORWARD, FORWARD, FORWARD)
    step = compiled(auto(window=9), memory=least["always"])
    step.prepare(**batch(200))
    assert list(step.solvers) == NAMES
    with pytest.raises(zograph.errors.PlanError) as error:
        compiled(auto(window=9), memory=least["off"]).prepare(**batch(200))
    assert least["off"] < error.value.minimum <= least["always"]


def test_zograph_log_shows_it(
    decide: Decide, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decide(FORWARD, MIXING, [[1.0, 3.0, 1.0], [0.0, 80.0, 1.5]])
    with compiled(auto(), log=tmp_path / "log") as step:
        take(step, range(1))
    assert main(["log", str(tmp_path / "log")]) == 0
    said = capsys.readouterr().out
    words = "evaluations forward, 8 mixing, which take 2.00 times as long)"
    assert f"solver   blocks.0: auto, so picard (9 {words}\n" in said
    assert f"solver   blocks.1: auto, so anderson (90 {words}\n" in said
    assert "blocks.2: auto, so anderson (no end evaluations forward, 80 mixing" in said
    assert "solvers" not in said


def info(*samples: tuple[int, float, bool]) -> FixedPointInfo:
    iterations, residual, converged = zip(*samples, strict=True)
    return FixedPointInfo(*map(torch.tensor, (iterations, residual, converged)))


def test_evaluations_are_continued_at_their_rate() -> None:
    options, first = SolveOptions(tol=1e-4, max_iter=10), torch.ones(2)
    done = evaluations_until(first, info((3, 1e-5, True), (7, 9e-5, True)), options)
    assert done == (0, 7.0)
    half = evaluations_until(first, info((3, 1e-5, True), (10, 1e-2, False)), options)
    assert half == (0, pytest.approx(20.0))
    stuck = evaluations_until(first, info((10, 1.0, False), (10, 1e-2, False)), options)
    assert stuck == (1, pytest.approx(20.0))
    diverged = evaluations_until(first, info((4, 0.5, False), (6, 0.1, False)), options)
    assert diverged == (2, 0.0)
    broken = evaluations_until(first, info((4, torch.nan, False), (5, 1e-5, True)), options)
    assert broken == (1, 5.0)


@pytest.mark.parametrize(
    ("forward", "mixing", "solver"),
    [
        ((0, 10, 1.0), (0, 9, 1.2), "picard"),
        ((0, 10, 1.0), (0, 5, 1.2), "anderson"),
        ((1, 10, 1.0), (0, 99, 1.2), "anderson"),
        ((0, 99, 1.0), (1, 9, 1.2), "picard"),
        ((2, 0, 1.0), (2, 0, 1.2), "anderson"),
    ],
)
def test_the_choice(forward: Any, mixing: Any, solver: str) -> None:
    found = choose(torch.tensor([forward, mixing], dtype=torch.float64))
    assert found.solver == solver
    assert found.penalty == pytest.approx(0.2)
    assert (found.forward is None) == (forward[0] > 0)
    assert (found.mixing is None) == (mixing[0] > 0)


def test_mixing_is_chosen_where_forward_iteration_is_slow() -> None:
    """Measured for real: 400 evaluations against 60, and 5 against as many that take longer."""
    values = torch.linspace(0, 0.99, 4096)
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    for scale, solver in ((1.0, "anderson"), (0.01, "picard")):
        options = SolveOptions(tol=1e-4, max_iter=600)
        _, _, findings = compare(
            lambda z, s=scale: (z[0] * values * s + x,), (torch.zeros_like(x),), options
        )
        assert choose(findings).solver == solver


def test_a_solve_with_no_end_is_no_choice() -> None:
    """A map that only mixing solves within its evaluations: z = 1 - 3 z."""
    options = SolveOptions(tol=1e-5, max_iter=30)
    start = (torch.zeros(2, 3),)
    _, end, findings = compare(lambda z: (1 - 3 * z[0],), start, options)
    found = choose(findings)
    assert (found.solver, found.forward) == ("anderson", None)
    assert found.mixing is not None
    assert end.converged.all()
