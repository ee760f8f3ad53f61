"""The table of docs/passes.md is what the classes say."""

from __future__ import annotations

import zograph
from tests.docs.pages import DOCS, table
from zograph.passes import Pass

PAGE = DOCS / "passes.md"


def contract_columns(pass_: Pass) -> list[str]:
    c = pass_.contract
    return [pass_.name, ", ".join(sorted(c.requires)), ", ".join(sorted(c.provides)), c.numerics]


def test_the_table_states_the_contracts() -> None:
    rows = table(PAGE.read_text(encoding="utf-8"), "pass")
    assert [row[:4] for row in rows] == [contract_columns(p) for p in zograph.default_passes()]
    assert all(row[4] for row in rows)


def test_no_pass_has_a_contract_that_the_table_does_not_show() -> None:
    assert not any(p.contract.forbids for p in zograph.default_passes())
