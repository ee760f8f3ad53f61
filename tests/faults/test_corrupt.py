"""Some damages of each kind; and the trial itself sees a wrong result."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults import corrupt
from zograph.seedlog import file as log_file
from zograph.stores import disk, extents
from zograph.stores.base import PAGE
from zograph.stores.files import bytes_of

COUNT = 60


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> list[corrupt.Whole]:
    return corrupt.runs(tmp_path_factory.mktemp("corrupt"))


@pytest.fixture(autouse=True)
def _unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOGRAPH_VERIFY", "0")


@pytest.mark.parametrize("damage", corrupt.DAMAGES)
@pytest.mark.parametrize("file", corrupt.FILES)
def test_the_same_bits_or_an_error(wholes: list[corrupt.Whole], file: str, damage: str) -> None:
    counts, faults = corrupt.attempt(
        wholes, file, corrupt.DAMAGES[damage], COUNT, random.Random(1), onward=COUNT // 2
    )
    assert not faults
    assert sum(counts.values()) == COUNT
    if (file, damage) != ("work file", "cut"):
        assert any(kind.startswith("recovered") for kind in counts)
    if (file, damage) != ("work file", "flip"):
        assert any(kind.startswith("reported") for kind in counts)


def trusting(
    self: disk.DiskStore, file: Any, name: str, buffer: Any, belongs: disk.Belongs
) -> tuple[disk.Newest | None, bool]:
    found = []
    for which in (0, 1):
        file.read(self._places[name].extents[which], buffer[:PAGE])
        header = extents.parse_extent_header(bytes(bytes_of(buffer[:PAGE])))
        if header is not None:
            found.append(disk.Newest(which, header.step, header.sequence))
    return max(found, key=lambda n: n.sequence, default=None), False


def test_a_store_without_checksums_is_found_out(
    wholes: list[corrupt.Whole], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.DiskStore, "_recover", trusting)
    _, faults = corrupt.attempt(wholes, "work file", corrupt.flip, 20, random.Random(1), onward=0)
    assert any("wrong weights" in fault for fault in faults)


def test_a_log_without_checksums_is_found_out(
    wholes: list[corrupt.Whole], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = log_file._record
    monkeypatch.setattr(log_file, "_record", lambda *args: (real(*args)[1],) * 2)
    _, faults = corrupt.attempt(wholes, "log", corrupt.flip, 60, random.Random(1), onward=0)
    assert any("wrong weights" in fault for fault in faults)


def test_advice_is_looked_for(wholes: list[corrupt.Whole], tmp_path: Path) -> None:
    assert corrupt.ADVICE.search("x is damaged. Restore it from a copy.")
    assert not corrupt.ADVICE.search("x is damaged.")
