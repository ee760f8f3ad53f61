"""Images for the benchmark: CIFAR-10 from a folder or a file, or the digits of scikit-learn."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zograph.cli.inputs import InputError

CLASSES = 10
SIZE = 32
"""Images are 3 x SIZE x SIZE."""

ARRAYS = ("train_x", "train_y", "test_x", "test_y")
TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
TEST = ["test_batch"]
ALLOWED = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
}
"""What a pickled array is made of."""

UNREADABLE = (
    AttributeError, EOFError, ImportError, IndexError, KeyError, pickle.UnpicklingError,
    TypeError, ValueError,
)  # fmt: skip
"""What a file that is no such batch makes its reader raise."""

TESTED = 297
"""The last so many of the 1797 digits are for testing."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Images:
    """Images, float32[N, 3, 32, 32] in about -2 to 2, and labels, int64[N] below 10.

    Attributes
    ----------
    source : str
        What they are, for the report.
    """

    source: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(path: Path | None) -> Images:
    """Read images.

    Parameters
    ----------
    path
        The folder of CIFAR-10's "python version" (``data_batch_1`` to ``data_batch_5``,
        ``test_batch``), or an npz file with ``train_x`` and ``test_x``, uint8[N, 3, 32, 32], and
        ``train_y`` and ``test_y``, integers from 0 to 9. None: scikit-learn's digits, 8 x 8 pixels
        each repeated 4 x 4 times in 3 channels.

    Raises
    ------
    InputError
        If there is no such file, it is not of these shapes, or scikit-learn is missing.
    """
    if path is None:
        found, source = _digits(), "digits"
    else:
        found, source = (_from_folder if path.is_dir() else _from_file)(path), "CIFAR-10"
    for part in ("train", "test"):
        _check(path, part, found[f"{part}_x"], found[f"{part}_y"])
    pixels = {p: torch.from_numpy(found[f"{p}_x"]).float() / 64 - 2 for p in ("train", "test")}
    labels = {p: torch.from_numpy(found[f"{p}_y"].astype(np.int64)) for p in ("train", "test")}
    return Images(source, pixels["train"], labels["train"], pixels["test"], labels["test"])


def _digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "without --data the images are scikit-learn's digits: pip install scikit-learn"
        ) from error
    small, labels = load_digits(return_X_y=True)
    gray = np.kron(small.reshape(-1, 1, 8, 8), np.ones((1, 1, 4, 4))) * (255 / 16)
    images = gray.astype(np.uint8).repeat(3, axis=1)
    return {
        "train_x": images[:-TESTED],
        "train_y": labels[:-TESTED],
        "test_x": images[-TESTED:],
        "test_y": labels[-TESTED:],
    }


def _from_file(path: Path) -> Arrays:
    try:
        with np.load(path) as file:
            return {name: file[name] for name in ARRAYS}
    except KeyError as error:
        raise InputError(f"--data {path}: needs the arrays {', '.join(ARRAYS)}") from error
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"--data {path}: cannot be read as an npz file: {error}") from error


def _from_folder(path: Path) -> Arrays:
    arrays: Arrays = {}
    for part, names in (("train", TRAIN), ("test", TEST)):
        batches = [_batch(path / name) for name in names]
        arrays[f"{part}_x"] = np.concatenate([rows for rows, _ in batches])
        arrays[f"{part}_y"] = np.concatenate([labels for _, labels in batches])
    return arrays


def _batch(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        found = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        rows, labels = np.asarray(found[b"data"]), np.asarray(found[b"labels"])
        return rows.reshape(-1, 3, SIZE, SIZE), labels
    except OSError as error:
        raise InputError(f"--data: {path} cannot be read: {error.strerror}") from error
    except UNREADABLE as error:
        raise InputError(f"--data: {path} is no batch of CIFAR-10 ({error!r})") from error


class _Plain(pickle.Unpickler):
    """Reads arrays and plain values, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _check(path: Path | None, part: str, images: NDArray[Any], labels: NDArray[Any]) -> None:
    """Raise InputError unless images and labels are what they must be."""
    shape, kind = (len(labels), 3, SIZE, SIZE), images.dtype
    if labels.ndim != 1 or images.shape != shape or kind != np.uint8 or not len(labels):
        raise InputError(
            f"--data {path}: the {part} images are {kind}{list(images.shape)} with labels "
            f"{list(labels.shape)}; they must be uint8[N, 3, {SIZE}, {SIZE}] with N labels, N > 0"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
        raise InputError(f"--data {path}: the {part} labels must be integers from 0 to 9")
