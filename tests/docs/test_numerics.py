"""docs/numerics.md names tests that exist and bounds that they check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, table
from tests.zograph import test_contract

PAGE = DOCS / "numerics.md"
TESTS = DOCS.parent / "tests"
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))))


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file: str, name: str) -> None:
    assert name in functions(TESTS / file)


def test_every_promise_names_its_test() -> None:
    text = PAGE.read_text(encoding="utf-8")
    cells = [row[-1] for first in ("what", "clause") for row in table(text, first)]
    assert len(cells) > 15
    assert all(".py::" in cell or cell == "the same" for cell in cells)


def test_the_bounds_are_those_of_the_contract_test() -> None:
    clauses = {row[0]: row[1] for row in table(PAGE.read_text(encoding="utf-8"), "clause")}
    code = Path(test_contract.__file__).read_text(encoding="utf-8")
    assert "rel=1e-5)  # (a)" in code
    assert "within 1e-5 relative" in clauses["1a"]
    assert "<= 1e-6 * (q.norm() + moved), n  # (b)" in code
    assert f"after {test_contract.STEPS} steps" in clauses["1b"]
    assert "within 1e-6 (" in clauses["1b"]
    assert "<= 1e-5 * abs(plus) / EPS  # (c)" in code
    assert "at most 1e-5 |loss| / eps" in clauses["1c"]
