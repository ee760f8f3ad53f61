"""docs/writing-passes.md: its pass works, its tests pass, and they fail for a broken pass."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.docs.pages import DOCS, run_page
from zograph.testing import Golden

PAGE = DOCS / "writing-passes.md"
TESTS = {
    "test_golden",
    "test_values_change_little",
    "test_idempotent",
    "test_float64_is_refused",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the page's files are written; its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("tanh_gelu", "test_tanh_gelu"):
        sys.modules.pop(name, None)


def run_tests(module: ModuleType, golden: Golden) -> set[str]:
    """Run a module's tests as pytest would; return the names of those that fail."""
    failed = set()
    for name in TESTS:
        test: Callable[..., None] = getattr(module, name)
        try:
            test(**({"golden": golden} if inspect.signature(test).parameters else {}))
        except (AssertionError, pytest.fail.Exception):
            failed.add(name)
    return failed


def test_the_page_runs_and_its_tests_can_fail(
    golden: Golden, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(PAGE, update=golden.update, folder=folder)
    module, pass_ = sys.modules["test_tanh_gelu"], sys.modules["tanh_gelu"]
    assert {name for name in vars(module) if name.startswith("test_")} == TESTS
    assert run_tests(module, Golden(folder / "golden")) == {"test_golden"}  # no text yet
    assert run_tests(module, Golden(folder / "golden", update=True)) == set()
    assert run_tests(module, Golden(folder / "golden")) == set()
    # silu in place of gelu is wrong in its text and in its values
    right = pass_.call

    def wrong(graph: torch.fx.Graph, target: object, args: object, kwargs: object, **rest: object):  # type: ignore[no-untyped-def]
        return right(graph, torch.ops.aten.silu.default, args, **rest)

    monkeypatch.setattr(pass_, "call", wrong)
    broken = run_tests(module, Golden(folder / "golden"))
    assert broken == {"test_golden", "test_values_change_little"}
    monkeypatch.undo()
    # a pass that does nothing
    monkeypatch.setattr(pass_, "gelu", torch.ops.aten.relu.default)
    assert run_tests(module, Golden(folder / "golden")) == {
        "test_golden",
        "test_float64_is_refused",
    }
