"""Shared by all tests."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import sharing
from zograph.device import DeviceSpec
from zograph.options import pick_device

SPEC = DeviceSpec(
    name="the tests' machine",
    kind="cpu",
    memory=8 << 30,
    host_memory=8 << 30,
    gemm={"float32": 1e11, "bfloat16": 2e10},
    bandwidth=1e10,
    noise=2e8,
    fold=5e8,
    to_device=5e9,
    to_host=5e9,
    link_both=8e9,
    read=1e9,
    write=1e9,
    disk_both=1.5e9,
)
CAPTURED_ONCE = (
    "test_contract",
    "test_elision",
    "test_engine",
    "test_file",
    "test_journal",
    "test_journal_errors",
    "test_low_bit",
    "test_meter",
    "test_offload",
    "test_offload_errors",
    "test_offload_gpu",
    "test_pieces",
    "test_planner",
    "test_replaying",
    "test_resume",
    "test_resume_losses",
    "test_trajectory",
)
"""Files whose tests share captures: they are about what is made of one."""
MEASURING = ("test_device", "test_doctor")
"""Files whose tests are about the measurement itself."""

_MEASURE: Any = DeviceSpec.__dict__["measure"]


def _spec(cls: type, device: Any = None, folder: object = None, **_: object) -> DeviceSpec:
    return dataclasses.replace(SPEC, kind=pick_device(device).type)


def pytest_collection_finish() -> None:
    """Spare the collector what all tests have imported."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _known_machine() -> Iterator[None]:
    """Budgets need rates: give fixed ones instead of measuring for ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceSpec, "measure", classmethod(_spec))
        yield


@pytest.fixture(autouse=True)
def _own_measurement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem in MEASURING:
        monkeypatch.setattr(DeviceSpec, "measure", _MEASURE)


@pytest.fixture(scope="session")
def _captures() -> sharing.Known:
    return {}


@pytest.fixture(autouse=True)
def _capture_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _captures: sharing.Known
) -> Iterator[None]:
    if request.path.stem in CAPTURED_ONCE:
        monkeypatch.setattr("zograph.graphs.capture", sharing.shared(_captures))
    known = len(_captures)
    yield
    if len(_captures) > known:
        gc.collect()
        gc.freeze()  # what stays to the end need not be looked through again and again


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)
