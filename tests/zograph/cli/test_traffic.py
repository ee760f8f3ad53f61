"""Traffic beside other work: its bytes really move, and a turn ends when both are done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zograph.cli import traffic
from zograph.measure_disk import REQUEST, DirectFile
from zograph.stores.base import PAGE


def test_a_turn_moves_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"read": 0, "write": 0}

    class Counted(DirectFile):
        def read(self, into: memoryview, offset: int) -> None:
            super().read(into, offset)
            moved["read"] += len(into)

        def write(self, data: memoryview, offset: int) -> None:
            super().write(data, offset)
            moved["write"] += len(data)

    monkeypatch.setattr(traffic, "AREA", 2)
    monkeypatch.setattr(traffic, "DirectFile", Counted)
    with traffic.Traffic(tmp_path, 2 * REQUEST + 3 * PAGE + 1, PAGE) as load:
        assert not list(tmp_path.iterdir()), "the file has no name"
        assert moved.pop("write") == 2 * REQUEST, "its blocks are there before the first turn"
        moved["write"] = 0
        for turns in (1, 2):
            with load.turn():
                pass
            assert moved == {"read": turns * (2 * REQUEST + 3 * PAGE), "write": turns * PAGE}


def test_a_failing_disk_is_the_turns_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("gone")

    monkeypatch.setattr(traffic, "AREA", 1)
    with traffic.Traffic(tmp_path, PAGE, 0) as load:
        monkeypatch.setattr(load, "_moves", ((fail, memoryview(b""), 1, 0),))
        with pytest.raises(OSError, match="gone"), load.turn():
            pass
