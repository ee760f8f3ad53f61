"""Anderson mixing of the zeroth-order trajectory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zograph
from zograph.errors import LogError, OptionError
from zograph.seedlog import read_log
from zograph.trajectory import path
from zograph.trajectory.control import State, advance, plain_loss
from zograph.trajectory.mixing import mix

torch.manual_seed(0)
X, Y = torch.randn(64, 12), torch.randint(0, 3, (64,))
MIXED = zograph.Anderson(directions=4, inner_steps=5, window=4, gate=10.0)


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), y)


def compiled(**options: Any) -> zograph.ZOStep:
    given = {"loss_fn": loss_fn, "lr": 0.1, "backend": "eager", "device": "cpu"} | options
    return zograph.compile(make_model(), **given)


def weights(step: zograph.ZOStep) -> torch.Tensor:
    return torch.cat([w.flatten() for w in step.state_dict().values()])


def run(step: zograph.ZOStep, steps: int) -> torch.Tensor:
    for _ in range(steps):
        step(x=X, y=Y)
    return weights(step)


def test_mixing_minimises_over_the_span_of_the_measured_displacements() -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 3))
    a, b = root @ root.T + np.eye(3), rng.standard_normal(3)
    points = [np.zeros(3), rng.standard_normal(3), rng.standard_normal(3)]
    plane = np.array([points[0] - points[2], points[1] - points[2]])
    grads = [a @ p + b for p in points]
    given = ([p.tolist() for p in points], [g.tolist() for g in grads])
    found = mix(*given, 2, rate=0.0, ridge=0.0, damping=1.0)
    best = points[2] - plane.T @ np.linalg.solve(plane @ a @ plane.T, plane @ grads[2])
    assert np.allclose(found, best, atol=1e-12)
    points.append(rng.standard_normal(3))
    given = ([p.tolist() for p in points], [(a @ p + b).tolist() for p in points])
    found = mix(*given, 3, rate=0.1, ridge=0.0, damping=1.0)
    assert np.allclose(found, -np.linalg.solve(a, b), atol=1e-9)  # the whole space


def test_no_mixing_where_the_curvature_is_not_positive() -> None:
    assert mix([[0.0], [1.0]], [[0.0], [-1.0]], 1, rate=0.1, ridge=0.0, damping=1.0) is None


def test_repeated_points_say_nothing_new() -> None:
    points, grads = [[1.0], [0.0], [1.0]], [[2.0], [0.0], [2.0]]
    found = mix(points, grads, 2, rate=0.0, ridge=0.0, damping=1.0)
    assert found == pytest.approx([0.0], abs=1e-12)


Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


def simulate(
    function: Function, size: int, mixing: zograph.Anderson, lr: float, evaluations: int, seed: int
) -> tuple[float, State]:
    """Run where losses are measured exactly; return the last one."""
    rng, w, q, state = np.random.default_rng(seed), np.zeros(size), mixing.directions, State()
    for _ in range(evaluations // (2 * q)):
        if not state.points:
            z = rng.standard_normal((q, size))
        loss, grad = function(w)
        slopes = z @ grad
        pairs = [(loss + 1e-3 * s, loss - 1e-3 * s) for s in slopes.tolist()]
        state, moved = advance(state, mixing, pairs, lr=lr, eps=1e-3)
        w = w + (-lr / q * slopes if moved is None else np.array(moved)) @ z
        if loss > 1e6:
            break
    return function(w)[0], state


def quadratic(w: np.ndarray) -> tuple[float, np.ndarray]:
    """Curvatures i^-4."""
    spectrum, away = np.arange(1, 301.0) ** -4, w - np.random.default_rng(0).standard_normal(300)
    return float(spectrum @ away**2) / 2, spectrum * away


def logistic(w: np.ndarray) -> tuple[float, np.ndarray]:
    """Logistic regression of labels by chance; 60 directions of 400 have like curvatures."""
    rng = np.random.default_rng(0)
    x, y = 0.15 * rng.standard_normal((60, 400)), np.where(rng.random(60) < 0.5, 1.0, -1.0)
    margins = -y * (x @ w)
    slopes = -(x * (y / (1 + np.exp(-margins)))[:, None]).mean(0)
    loss = np.logaddexp(0, margins).mean() + 0.5e-3 * w @ w
    return float(loss), slopes + 1e-3 * w


def test_a_third_of_the_evaluations_of_the_best_plain_run() -> None:
    plain, ratios = zograph.Anderson(directions=1, gate=0), []
    mixing = zograph.Anderson(directions=16, inner_steps=8, window=8)
    for seed in range(1, 6):
        runs = [simulate(quadratic, 300, plain, r, 9000, seed)[0] for r in (0.3, 0.4, 0.5, 0.7)]
        found, state = simulate(quadratic, 300, mixing, 1.2, 3000, seed)
        ratios.append(found / min(runs))
        assert state.mixed > 50
    assert max(ratios) < 1


def test_within_two_percent_of_plain_steps_where_mixing_does_not_pay() -> None:
    ratios = []
    for seed in range(4):
        shut, mixing = (zograph.Anderson(directions=8, gate=gate) for gate in (0.0, 0.1))
        expected, _ = simulate(logistic, 400, shut, 2.0, 8000, seed)
        found, state = simulate(logistic, 400, mixing, 2.0, 8000, seed)
        ratios.append(found / expected)
        assert state.mixed > 0
        assert state.slow > 0
    assert max(ratios) <= 1.02


def test_a_closed_gate_is_plain_zo_sgd_bit_for_bit() -> None:
    shut = compiled(anderson=zograph.Anderson(directions=4, gate=0.0))
    plain = run(compiled(directions=4), 12)
    assert torch.equal(run(shut, 12), plain)
    mixed = compiled(anderson=MIXED)
    assert not torch.equal(run(mixed, 12), plain)
    assert mixed.mixing is not None
    assert mixed.mixing.mixed > 0


def test_the_same_bits_on_every_budget_and_storage(tmp_path: Path) -> None:
    expected = run(compiled(anderson=MIXED), 13)
    for more in (
        {"memory": "minimum", "fold_every": 4},
        {"memory": "minimum", "storage": tmp_path / "work", "fold_every": 3},
    ):
        step = compiled(anderson=MIXED, **more)
        assert torch.equal(run(step, 13), expected)
        step.close()


@pytest.mark.parametrize("cut", [2, 3])
def test_resume_in_the_middle_of_a_cycle(tmp_path: Path, cut: int) -> None:
    whole, part = tmp_path / "whole.zolog", tmp_path / "part.zolog"
    with compiled(anderson=MIXED, log=whole) as step:
        expected = run(step, 24)
        told = step.mixing
    with compiled(anderson=MIXED, log=part) as step:
        run(step, cut)
        assert step.mixing is not None
        assert len(step.mixing.points) > 1
    with zograph.resume(make_model(), part, loss_fn=loss_fn, device="cpu") as step:
        assert step.options.anderson == MIXED
        assert torch.equal(run(step, 24 - cut), expected)
        assert step.mixing == told
    assert part.read_bytes() == whole.read_bytes()
    out = zograph.replay(make_model(), whole, out=tmp_path / "out")
    assert out.is_dir()


def test_a_log_that_was_mixed_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "run.zolog"
    with compiled(anderson=MIXED, log=log) as step:
        run(step, 4)
    with pytest.raises(LogError, match="anderson="):
        zograph.resume(
            make_model(), log, loss_fn=loss_fn, device="cpu", anderson=zograph.Anderson(4)
        )

    def other(*args: Any, **kwargs: Any) -> Any:
        state, moved = advance(*args, **kwargs)
        return state, None if moved is None else [2 * c for c in moved]

    monkeypatch.setattr(path, "advance", other)
    with pytest.raises(LogError, match="do not lead"):
        zograph.resume(make_model(), log, loss_fn=loss_fn, device="cpu")
    assert len(read_log(log)) == 4


def measured(state: State, losses: list[tuple[float, float]]) -> tuple[State, list[float] | None]:
    return advance(state, zograph.Anderson(directions=2), losses, lr=0.1, eps=0.5)


def test_noisy_losses_close_the_gate_for_longer_and_longer() -> None:
    rng, state, probes = np.random.default_rng(0), State(), []
    for step in range(400):
        if not state.points and not state.left:
            probes.append(step)
        noise = rng.standard_normal()
        state, _ = measured(state, [(noise + 0.1, noise), (noise + 0.1, noise)])
    assert state.closed == state.cycles == len(probes) == 3
    assert not state.mixed
    assert np.diff(probes).tolist() == [18, 258]


def test_a_rise_that_no_gradient_explains_takes_the_iterate_back_too() -> None:
    state, _ = measured(State(), [(1.5, 0.5), (1.0, 1.0)])
    at = state.points[-1]
    state, back = measured(state, [(100.0, 100.0), (100.0, 100.0)])
    assert (state.closed, state.rejected) == (1, 0)
    assert not state.points
    assert back is not None
    assert at[0] + back[0] == pytest.approx(-0.025)


def test_a_loss_that_rose_takes_the_iterate_back() -> None:
    state, first = measured(State(), [(1.5, 0.5), (1.0, 1.0)])  # gradient (1, 0), loss 1
    assert first is not None
    at = state.points[-1]
    slope = 21.0  # the loss has a minimum between both points, and is higher at the second
    loss = 1 + at[0] * (1 - slope) / 2
    state, back = measured(state, [(loss - slope / 2, loss + slope / 2), (loss, loss)])
    assert state.rejected == 1
    assert not state.points
    assert back is not None
    assert at[0] + back[0] == pytest.approx(-0.025)  # half a plain step from the better point


def test_a_cycle_that_gains_no_more_than_plain_steps_is_taken_back() -> None:
    state, at = State(), 0.0
    for _ in range(4):
        loss = 10 - 3 * at  # straight: nothing to mix
        state, moved = measured(state, [(loss - 1.5, loss + 1.5), (loss, loss)])
        assert moved is not None
        at += moved[0]
    assert state.slow == 1
    assert not state.points
    assert state.left == 16
    assert at == pytest.approx(0.15)  # one plain step


def test_a_cycle_that_paid_until_a_loss_rose_is_followed_by_another() -> None:
    state = State(
        points=((0.0, 0.0), (0.1, 0.0), (0.5, 0.0), (2.0, 0.0)),
        grads=((-1.0, 0.0), (-0.9, 0.0), (-0.1, 0.0)),
        losses=(1.0, 0.905, 0.6),
    )
    state, back = measured(state, [(2.625, 0.825), (1.725, 1.725)])
    assert (state.rejected, state.closed, state.left) == (1, 0, 0)
    assert back is not None
    assert 2.0 + back[0] == pytest.approx(0.5025)  # from the best point


def test_what_plain_steps_promise() -> None:
    assert plain_loss([2.0, 1.0, 5.0], 3) == pytest.approx(0.25)
    assert plain_loss([1.0, -1.0], 1.5) == -2.0
    assert plain_loss([-1.0, -3.0], 2) == -5.0


def test_a_loss_that_is_not_finite_ends_the_cycle() -> None:
    state, _ = measured(State(), [(1.5, 0.5), (1.0, 1.0)])
    state, moved = measured(state, [(float("nan"), 0.5), (1.0, 1.0)])
    assert moved is None
    assert not state.points
    assert state.step == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("directions", 0), ("directions", 257), ("directions", 2.0), ("inner_steps", 2),
        ("window", 0), ("ridge", -1.0), ("damping", 0.0), ("damping", 1.5), ("gate", -1.0),
        ("gate", float("nan")),
    ],
)  # fmt: skip
def test_numbers_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=option):
        zograph.Anderson(**{option: value})


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(OptionError, match="leave directions out"):
        compiled(anderson=MIXED, directions=3)
    with pytest.raises(OptionError, match="weight_decay"):
        compiled(anderson=MIXED, weight_decay=0.1)
    with pytest.raises(OptionError, match=r"zograph\.Anderson"):
        compiled(anderson=5)
    assert compiled(anderson=MIXED).options.directions == 4
