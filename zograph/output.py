"""The folder of a result: complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from zograph.errors import OptionError


class OutputFolder:
    """A folder that appears, with all that was written, at :meth:`commit` only.

    Entering makes a hidden folder beside the final one, which proves before any work that
    it can be written; leaving without a commit removes it.

    Attributes
    ----------
    staging
        Where to write until :meth:`commit`.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path.absolute()
        self.staging = Path()
        self._overwrite = overwrite
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        if self.path.exists():
            if not self.path.is_dir():
                raise OptionError(f"out {self.path}: there is a file of that name")
            if any(self.path.iterdir()) and not self._overwrite:
                raise OptionError(f"out {self.path} is not empty; choose another or overwrite")
        try:
            if self.path.exists() and not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError(13, "the folder is read-only")
            self._make_parents()
            self.staging = Path(
                tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent)
            )
            self.staging.chmod(0o755)
        except OSError as error:
            self._remove_parents()
            raise OptionError(f"out {self.path}: cannot write there: {error.strerror}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        self._remove_parents()

    def commit(self) -> None:
        """Put the written folder in its place, instead of an older one.

        Raises
        ------
        OptionError
            If it cannot be put there; an older folder is back in its place.
        """
        old = self.staging.with_name(self.staging.name + "-old")
        try:
            if self.path.exists():
                self.path.rename(old)
            try:
                self.staging.rename(self.path)
            except OSError:
                if old.exists():
                    old.rename(self.path)
                raise
        except OSError as error:
            raise OptionError(f"out {self.path}: cannot write there: {error.strerror}") from error
        shutil.rmtree(old, ignore_errors=True)

    def _make_parents(self) -> None:
        for parent in reversed(self.path.parents):
            if not parent.exists():
                parent.mkdir()
                self._made.append(parent)

    def _remove_parents(self) -> None:
        """Remove the parents made here, as far as they are empty."""
        for parent in reversed(self._made):
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
