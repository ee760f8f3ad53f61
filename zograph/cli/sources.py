"""Data that is no plain file: the built-in lexicon and Hugging Face datasets."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zograph.cli.inputs import InputError
from zograph.cli.tables import Row, Table

CLEAR = 1.0
"""Smallest size of a mean rating (of -4 to 4) for a word to count as clear."""

FAMILY = 5
"""Words that agree in so many first letters are split together."""


def package_file(package: str, name: str, *, need: str) -> Path:
    """Locate a file or folder inside an installed package without importing it.

    Raises
    ------
    InputError
        If the package or the file is missing.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"{need}: install it with pip")
    path = Path(spec.origin).parent / name
    if not path.exists():
        raise InputError(f"{need}: this installation of {package} lacks {name}")
    return path


def vader() -> Table:
    """Read the words of vaderSentiment's lexicon (MIT) with the sign of their mean rating.

    Ten people rated each entry from -4 to 4. Kept are the entries of lower-case letters
    (with space, hyphen, apostrophe) whose mean rating is at least 1 in size: about 5600.
    The split goes by families: all words with the same first five letters are either
    trained on or held out, so that no held-out word is an inflexion of a trained one.
    """
    path = package_file(
        "vaderSentiment",
        "vader_lexicon.txt",
        need="the built-in data 'vader' is the word list of the package vaderSentiment",
    )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        word, rating = line.split("\t")[:2]
        if re.fullmatch(r"[a-z][a-z' -]*", word) and abs(float(rating)) >= CLEAR:
            values = {
                "text": word,
                "label": int(float(rating) > 0),
                "rating": float(rating),
                "family": word[:FAMILY],
            }
            rows.append(Row(f"{path}:{number}", values))
    columns = ("text", "label", "rating", "family")
    return Table("vader", columns, rows, {"label": ["negative", "positive"]})


def hugging_face(name: str) -> dict[str, Table]:
    """Load a dataset saved by ``save_to_disk`` or named on the hub, split by split.

    Parameters
    ----------
    name
        A folder, or a hub name with an optional configuration after a colon
        (``glue:sst2``).

    Raises
    ------
    InputError
        If ``datasets`` is not installed, or finds nothing usable by that name.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name} is no csv, tsv, jsonl or txt file; to read it as a Hugging Face dataset, "
            f"install the package datasets"
        ) from error
    folder = Path(name)
    try:
        if folder.is_dir():
            loaded = datasets.load_from_disk(str(folder))
        else:
            hub_name, _, configuration = name.partition(":")
            loaded = datasets.load_dataset(hub_name, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        what = "a folder written by save_to_disk" if folder.is_dir() else "a file or a hub dataset"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name}: not readable as {what}: {first}") from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {split: from_dataset(f"{name} ({split})", data) for split, data in splits.items()}


def from_dataset(source: str, data: Any) -> Table:
    """Turn one split of a Hugging Face dataset into a table."""
    columns = tuple(data.column_names)
    rows = [Row(f"{source}, row {i}", dict(values)) for i, values in enumerate(data)]
    names = {
        column: list(feature.names)
        for column, feature in data.features.items()
        if getattr(feature, "names", None)
    }
    return Table(source, columns, rows, names)
