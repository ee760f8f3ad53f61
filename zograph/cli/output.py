"""Checks of the files that a command will write."""

from __future__ import annotations

import os
from pathlib import Path

from zograph.cli.inputs import InputError

PICTURES = (".svg", ".png", ".pdf", ".dot")


def check_file(path: Path, option: str) -> None:
    """Refuse a file that could not be written after a long run.

    Raises
    ------
    InputError
        If its folder cannot be written.
    """
    existing = next(p for p in path.absolute().parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: cannot write in {existing}")


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn after a long run.

    Raises
    ------
    InputError
        If its ending is unknown or its folder cannot be written.
    """
    if path.suffix not in PICTURES:
        raise InputError(f"--draw {path}: the ending must be one of {', '.join(PICTURES)}")
    check_file(path, "--draw")
