"""Runs the pages of `docs`: python fences are executed, text fences are what they print."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+)\.py\n")


@dataclass(frozen=True)
class Fence:
    """One fenced block of a page."""

    language: str
    body: str
    line: int
    """Line of the page that the body starts at, from 1."""


def fences(text: str) -> list[Fence]:
    """Return the fenced blocks of a page, in order."""
    return [Fence(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in FENCE.finditer(text)]


def run_page(page: Path, *, update: bool = False, folder: Path | None = None) -> dict[str, Any]:
    """Execute a page's python fences in one namespace and compare what they print.

    A text fence holds what the python fence before it prints; a python fence that prints has
    one. A python fence whose first line is ``# name.py`` is written to `folder` and imported.

    Parameters
    ----------
    update
        Write the text fences instead of comparing them.

    Returns
    -------
    dict
        The namespace after the last fence.

    Raises
    ------
    AssertionError
        With the difference between a text fence and what was printed.
    """
    text = page.read_text(encoding="utf-8")
    blocks = fences(text)
    assert blocks, f"{page} has no fences"
    printed: dict[int, str] = {}
    with _module(f"docs_{page.stem.replace('-', '_')}") as module:
        for i, block in enumerate(blocks):
            if block.language != "python":
                continue
            shown = i + 1 < len(blocks) and blocks[i + 1].language == "text"
            found = _execute(block, page, module, folder)
            if shown:
                printed[i + 1] = found
            else:
                assert not found, f"{page}:{block.line} prints, but no text fence follows:\n{found}"
    if update:
        page.write_text(_with_bodies(text, printed), encoding="utf-8")
        return vars(module)
    for i, found in printed.items():
        if found != blocks[i].body:
            raise AssertionError(
                f"{page}:{blocks[i].line} is not what the code before it prints:\n"
                + "".join(
                    difflib.unified_diff(_lines(blocks[i].body), _lines(found), "page", "code")
                )
                + "If the change is meant: pytest --update-golden"
            )
    return vars(module)


def table(text: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose first column is headed `first`, cells stripped."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = line.replace("\\|", "\0").strip("|").split("|")
        rows.append([c.strip().replace("\0", "|") for c in cells])
    return rows


def _execute(block: Fence, page: Path, module: ModuleType, folder: Path | None) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if match := FILE.match(block.body):
            assert folder is not None, f"{page}:{block.line} is a file, but there is no folder"
            (folder / f"{match[1]}.py").write_text(block.body, encoding="utf-8")
            importlib.invalidate_caches()
            importlib.import_module(match[1])
        else:
            above = "\n" * (block.line - 1)  # so that errors name the page's own lines
            exec(compile(above + block.body, str(page), "exec"), vars(module))
    return out.getvalue()


@contextlib.contextmanager
def _module(name: str) -> Iterator[ModuleType]:
    """Make a module that classes defined in a page can find themselves in."""
    module = sys.modules[name] = ModuleType(name)
    try:
        yield module
    finally:
        del sys.modules[name]


def _with_bodies(text: str, bodies: dict[int, str]) -> str:
    matches = list(FENCE.finditer(text))
    for i in sorted(bodies, reverse=True):
        text = text[: matches[i].start(2)] + bodies[i] + text[matches[i].end(2) :]
    return text


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
