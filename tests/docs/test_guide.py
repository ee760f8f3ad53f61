"""docs/guide.md: its examples run, its tables name what the code has."""

from __future__ import annotations

import builtins
import inspect

import zograph
from tests.docs.pages import DOCS, run_page, table
from zograph import env, errors
from zograph.errors import ZographError
from zograph.graphs import MANY_CAPTURES
from zograph.signature import LEVELS
from zograph.testing import Golden

PAGE = DOCS / "guide.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_examples(golden: Golden) -> None:
    run_page(PAGE, update=golden.update)


def test_the_options_are_those_of_compile() -> None:
    parameters = list(inspect.signature(zograph.compile).parameters.values())[1:]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
    rows = table(TEXT, "option")
    assert [row[:2] for row in rows] == [[p.name, repr(p.default)] for p in parameters]


def test_the_environment_variables_are_those_of_env() -> None:
    assert [row[0] for row in table(TEXT, "variable")] == sorted(env.TABLE)


def test_the_errors_are_those_of_errors() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    named = {c.__name__: c for c in classes if c is not ZographError}
    rows = table(TEXT, "error")
    assert {row[0] for row in rows} == set(named)
    for name, base, _ in rows:
        assert base in {c.__name__ for c in named[name].__mro__}, name
        assert getattr(builtins, base) not in (Exception, BaseException), name


def test_the_levels_and_the_limit_of_captures() -> None:
    assert tuple(row[0] for row in table(TEXT, "level")) == LEVELS
    assert f"more than {MANY_CAPTURES} have been made" in TEXT
