"""Anderson mixing of the zeroth-order trajectory."""

from __future__ import annotations

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
from zograph.trajectory.control import State, advance
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


def simulate(mixing: zograph.Anderson, lr: float, evaluations: int) -> tuple[float, State]:
    """Run on a quadratic with eigenvalues 1/i^3, measured exactly."""
    spectrum, rng = np.arange(1, 301.0) ** -3, np.random.default_rng(1)
    w, q, state = np.random.default_rng(0).standard_normal(300), mixing.directions, State()
    for _ in range(evaluations // (2 * q)):
        if not state.points:
            z = rng.standard_normal((q, 300))
        loss, slopes = float(spectrum @ w**2) / 2, z @ (spectrum * w)
        pairs = [(loss + 1e-3 * s, loss - 1e-3 * s) for s in slopes.tolist()]
        state, moved = advance(state, mixing, pairs, lr=lr, eps=1e-3)
        w = w + (-lr / q * slopes if moved is None else np.array(moved)) @ z
        if loss > 1e6:
            break
    return float(spectrum @ w**2) / 2, state


def test_a_third_of_the_evaluations_of_the_best_plain_run() -> None:
    plain = zograph.Anderson(directions=1, gate=0)
    best = min(simulate(plain, lr, 9000)[0] for lr in (0.3, 0.4, 0.5, 0.7))
    mixing = zograph.Anderson(directions=16, inner_steps=8, window=8)
    found, state = simulate(mixing, 1.2, 3000)
    assert found < best
    assert state.mixed > 50


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


@pytest.mark.parametrize("cut", [2, 4])
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
    assert state.closed == state.cycles >= 4
    assert not state.mixed
    assert np.all(np.diff(np.diff(probes)) > 0)


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


def test_a_loss_that_is_not_finite_ends_the_cycle() -> None:
    state, _ = measured(State(), [(1.5, 0.5), (1.0, 1.0)])
    state, moved = measured(state, [(float("nan"), 0.5), (1.0, 1.0)])
    assert moved is None
    assert not state.points
    assert state.step == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("directions", 0), ("directions", 257), ("directions", 2.0), ("inner_steps", 1),
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
