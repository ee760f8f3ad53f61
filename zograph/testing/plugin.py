"""The pytest plugin: `golden` and ``--update-golden``."""

from __future__ import annotations

import os

import pytest

from zograph.testing.golden import Golden


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden``."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden texts that zograph.testing compares with (never where CI is set)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to rewrite golden texts in continuous integration."""
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("--update-golden is refused where CI is set")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Golden texts in the folder ``golden`` of the test's root folder of tests."""
    root = request.config.rootpath
    tests = next((p for p in (root / "tests", request.path.parent) if p.is_dir()), root)
    return Golden(tests / "golden", bool(request.config.getoption("--update-golden")))
