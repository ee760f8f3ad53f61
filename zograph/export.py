"""Writing a model's folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_model
from torch import nn


def save_pretrained(model: nn.Module, folder: Path) -> None:
    """Write `model` into `folder` as its own `save_pretrained` does, or as safetensors.

    The files are written beside the folder first and moved into it when all are complete.

    Raises
    ------
    OSError
        If the folder or its parent cannot be written; the folder is left as it was.
    """
    folder = folder.absolute()
    existing = folder if folder.exists() else next(p for p in folder.parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{folder} cannot be written: {existing} is read-only or no folder. Choose another."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=existing))
    try:
        own = getattr(model, "save_pretrained", None)
        if callable(own):
            own(staging)
        else:
            save_model(model, str(staging / "model.safetensors"))
        folder.mkdir(exist_ok=True)
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
