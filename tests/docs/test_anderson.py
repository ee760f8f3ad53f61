"""docs/anderson.md shows what its code prints."""

from __future__ import annotations

from tests.docs.pages import DOCS, run_page
from zograph.testing import Golden


def test_every_text_is_what_the_code_prints(golden: Golden) -> None:
    run_page(DOCS / "anderson.md", update=golden.update)
