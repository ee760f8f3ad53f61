"""What the C allocator may keep under a budget."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from zograph.memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_little

MIB = 1 << 20


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (None, {}),
        (1000 * MIB, {}),
        (400 * MIB, {M_MMAP_THRESHOLD: 20 * MIB, M_TRIM_THRESHOLD: 20 * MIB}),
        (100 * MIB, {M_MMAP_THRESHOLD: MIB}),
        ("minimum", {M_MMAP_THRESHOLD: MIB}),
    ],
)
def test_the_allocator_keeps_a_share(
    budget: Any, told: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=said.__setitem__))
    keep_little(budget)
    assert said == told
