"""docs/walkthrough.md shows what the passes do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import zograph
from tests.docs.pages import DOCS, fences, run_page
from zograph.testing import Golden

PAGE = DOCS / "walkthrough.md"


def test_every_text_is_what_the_code_prints(golden: Golden) -> None:
    run_page(PAGE, update=golden.update)


def test_there_is_a_section_per_pass_in_order() -> None:
    headings = re.findall(r"^## (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["capture", *(p.name for p in zograph.default_passes())]


def test_a_stale_text_is_noticed_and_rewritten(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    stale = tmp_path / "walkthrough.md"
    stale.write_text(text.replace("materialize_rows: (f32", "materialize_rows: (f64", 1))
    with pytest.raises(AssertionError, match="is not what the code before it prints"):
        run_page(stale)
    run_page(stale, update=True)
    assert stale.read_text(encoding="utf-8") == text


def test_a_print_without_a_text_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n")
    with pytest.raises(AssertionError, match="no text fence follows"):
        run_page(page)
    assert [f.language for f in fences(page.read_text())] == ["python"]
