"""What kills, flips and cuts are tried on: one run on a disk, and what it must come to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.conftest import SPEC
from zograph.device import DeviceSpec
from zograph.seedlog import read_log

LOG = "run.zolog"


def known_machine() -> None:
    """Give plans fixed rates, as conftest does, instead of measuring this machine."""
    DeviceSpec.measure = classmethod(lambda *_, **__: SPEC)  # type: ignore[method-assign]


def tensors_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of names, dtypes, shapes and bits."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def folder_digest(folder: Path) -> str:
    """Return a hash of every file's name and bytes."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def difference(path: Path, expected: bytes, *, whole: bool = False) -> str | None:
    """Say in what a log is not the beginning of another, None if it is.

    Parameters
    ----------
    whole
        Whether it must have all of the other's records.
    """
    found = read_log(path, warn=False)
    data = path.read_bytes()[: found.end]
    if whole and (found.torn or len(data) != len(expected)):
        return f"{path} has {len(data)} whole bytes and {found.torn} torn ones, not {len(expected)}"
    if data == expected[: len(data)] and len(data) <= len(expected):
        return None
    pairs = enumerate(zip(data, expected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), len(expected))
    return f"{path} differs at byte {at} (records begin at {found.start})"


def show(counts: Mapping[str, Any]) -> str:
    """Lay out counts, one a line."""
    return "\n".join(f"  {value:>6}  {name}" for name, value in counts.items())
