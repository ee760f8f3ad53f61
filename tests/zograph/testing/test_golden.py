from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zograph.testing import Golden, GraphBuilder
from zograph.testing.plugin import pytest_configure


def test_missing_equal_and_different(tmp_path: Path) -> None:
    b = GraphBuilder()
    gm = b.build(b.call(torch.ops.aten.relu.default, b.input("x", (2,))))
    with pytest.raises(AssertionError, match="missing; run pytest --update-golden"):
        Golden(tmp_path).check(gm, "relu")
    Golden(tmp_path, update=True).check(gm, "relu")
    Golden(tmp_path).check(gm, "relu")
    with pytest.raises(AssertionError, match=r"(?s)-return \(%relu,\).*\+other.*If the change"):
        Golden(tmp_path).check("other\n", "relu")


class _Config:
    def getoption(self, name: str) -> bool:
        return name == "--update-golden"


def test_update_is_refused_in_continuous_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    pytest_configure(_Config())  # type: ignore[arg-type]
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.UsageError, match="refused where CI is set"):
        pytest_configure(_Config())  # type: ignore[arg-type]
