"""`zograph bench trajectory` at a small size, and what its figures mean."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from zograph.cli import bench_trajectory as bench
from zograph.cli import main


def test_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "trajectory.json"
    command = ["bench", "trajectory", "--powers", "3", "--rows", "32", "--directions", "4"]
    command += ["--inner-steps", "3", "--evaluations", "200", "--seeds", "0", "1"]
    command += ["--json", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert found["anderson"]["directions"] == 4
    assert set(found["problems"]) == {"quadratic, i^-3", "logistic, batch 32"}
    for ways in found["problems"].values():
        assert set(ways) == {"plain", "plain, q = 4", "mixed"}
        assert {len(runs) for runs in ways.values()} == {2}
        assert ways["mixed"][1]["lr"] == ways["plain, q = 4"][0]["lr"]
        assert ways["mixed"][0]["gate"]["cycles"] >= 1
        assert ways["mixed"][0]["losses"][-1] != ways["mixed"][1]["losses"][-1], "another seed"
        for run in (run for runs in ways.values() for run in runs):
            assert run["evaluations"][0] == 0
            assert run["evaluations"][-1] >= 200
            assert run["losses"][-1] < run["losses"][0]
    assert "quadratic, i^-3" in capsys.readouterr().out


def test_the_rate_is_tuned() -> None:
    (problem,) = bench.problems([3], [])
    best = bench.tuned(problem, 1, 400, 0)
    for factor in (0.5, 2.0):
        assert bench.trained(problem, factor * best.lr, 1, 400, 0).final >= best.final


def test_a_run_that_blows_up_is_the_worst() -> None:
    (problem,) = bench.problems([2], [])
    run = bench.trained(problem, 1024.0, 1, 400, 0)
    assert run.final == math.inf
    assert run.evaluations[-1] < 400


def test_batches_are_the_same_for_every_run() -> None:
    data = {"x": torch.arange(100.0)}
    problem = bench.Problem("", torch.nn.Identity, data, rows=8)
    pairs = zip(problem.batches(), problem.batches(), range(3), strict=False)
    rows = [(a["x"].tolist(), b["x"].tolist()) for a, b, _ in pairs]
    assert all(a == b for a, b in rows)
    assert rows[0] != rows[1]


def test_evaluations_to_a_target() -> None:
    run = bench.Run(1.0, 1, [0, 10, 20, 30], [4.0, 2.0, 3.0, 1.0])
    assert run.reached(2.0) == 10
    assert run.reached(0.5) is None
