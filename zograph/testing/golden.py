"""Golden texts: what a graph looks like, pinned in a file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from zograph import printer


@dataclass(frozen=True)
class Golden:
    """Compares texts with files of one folder; the `golden` fixture makes one.

    Attributes
    ----------
    folder
        Where the files are.
    update
        Write the files instead of comparing (``pytest --update-golden``).
    """

    folder: Path
    update: bool = False

    def check(self, found: fx.GraphModule | str, name: str) -> None:
        """Compare a graph's canonical text (or any text) with ``<folder>/<name>.txt``.

        Raises
        ------
        AssertionError
            With the difference, or if the file is missing.
        """
        text = found if isinstance(found, str) else printer.text(found)
        path = self.folder / f"{name}.txt"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        if not path.exists():
            raise AssertionError(f"{path} is missing; run pytest --update-golden and read it")
        expected = path.read_text()
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), str(path), "found", lineterm=""
            )
            raise AssertionError(
                "\n".join(lines) + "\nIf the change is meant: pytest --update-golden"
            )
