from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.zograph.fake_cuda import FakeCuda
from zograph.fixed_points import SolveOptions
from zograph.fixed_points import progress as progress_module
from zograph.fixed_points.flag import Flag
from zograph.fixed_points.solvers import SOLVE


def test_on_a_cpu_it_is_read_at_once() -> None:
    flag = Flag(False, 2)
    assert flag.send(torch.tensor([3, 1])) == [3, 1]
    assert flag.send(torch.tensor([0, 1])) == flag.newest() == [0, 1]


def test_on_a_gpu_it_is_one_iteration_late() -> None:
    flag = Flag(True, 1, FakeCuda())
    assert [flag.send(torch.tensor([n])) for n in (5, 4, 3)] == [None, [5], [4]]
    assert flag.newest() == [3]


def test_the_host_does_not_wait_for_the_newest_iteration() -> None:
    """The device hangs in iteration 1; the host still queues it and reads iteration 0."""
    cuda, gate = FakeCuda(), threading.Event()
    flag = Flag(True, 1, cuda)
    flag.send(torch.tensor([7]))
    cuda.current_stream().issue(gate.wait)  # type: ignore[arg-type]
    assert flag.send(torch.tensor([6])) == [7]
    gate.set()
    assert flag.newest() == [6]


@pytest.mark.parametrize("solver", ["anderson", "picard"])
def test_a_late_flag_changes_nothing_but_one_evaluation(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def cell(state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal count
        count += 1
        return (state[0].cos(),)

    z0 = (torch.linspace(0, 1, 5).unsqueeze(1),)
    options = SolveOptions(tol=1e-5, max_iter=99)
    (z,), info, status = SOLVE[solver](cell, z0, options)
    at_once, count = count, 0
    cuda = FakeCuda()
    monkeypatch.setattr(progress_module, "Flag", lambda late, n: Flag(True, n, cuda))
    (late,), late_info, late_status = SOLVE[solver](cell, z0, options)
    assert torch.equal(late, z)
    assert torch.equal(late_info.iterations, info.iterations)
    assert torch.equal(late_info.residual, info.residual)
    assert late_status == status
    assert count == at_once + 1
    assert len(FakeCuda.host_waits) == count  # one event each, the last at the end
