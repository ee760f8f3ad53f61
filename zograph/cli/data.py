"""From a data source to texts and labels, split into training and held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from zograph.cli.inputs import InputError
from zograph.cli.sources import hugging_face, vader
from zograph.cli.tables import READERS, Row, Table, read_table

TEXT_COLUMNS = ("text", "sentence", "content", "review")
LABEL_COLUMNS = ("label", "labels", "target", "class")
HELD_OUT_SPLITS = ("validation", "test", "eval", "dev")
MAX_CLASSES = 1000


@dataclass(frozen=True)
class Example:
    """A text with its class number (0 for a task without labels)."""

    text: str
    label: int = 0


@dataclass(frozen=True)
class Dataset:
    """Training and held-out examples and the names of the classes (empty without labels)."""

    train: list[Example]
    held_out: list[Example]
    classes: list[str]
    split: str
    """How the held-out examples were chosen, in words."""


def load_tables(
    name: str, held_out: str | None = None, *, fraction: float = 0.1
) -> tuple[Table, Table, str]:
    """Find the rows to train on and the rows to hold out.

    Parameters
    ----------
    name
        ``vader``, a file, a folder of ``save_to_disk`` or a hub name.
    held_out
        The same for the held-out rows; by default the source's own validation or test
        split, else a share of the rows chosen by a hash of their content.
    fraction
        That share.

    Returns
    -------
    tuple
        Training table, held-out table, and how they were split, in words.

    Raises
    ------
    InputError
        If a source is missing, unreadable or empty.
    """
    tables = load_splits(name)
    train = tables.get("train") or next(iter(tables.values()))
    if held_out is not None:
        others = load_splits(held_out)
        other = next((others[s] for s in HELD_OUT_SPLITS if s in others), None)
        other = other or next(iter(others.values()))
        how = f"held out: {held_out}"
    elif found := next((s for s in HELD_OUT_SPLITS if s in tables and tables[s].rows), None):
        other, how = tables[found], f"held out: the split {found!r}"
    elif name == "vader":
        train, other = split_rows(train, 0.2, key=lambda row: str(row.values["family"]))
        how = "held out: every fifth word family (words with the same first five letters)"
    else:
        train, other = split_rows(train, fraction, key=lambda row: repr(row.values))
        how = f"held out: {fraction:.0%} of the rows, chosen by a hash of their content"
    for table in (train, other):
        if not table.rows:
            raise InputError(f"{table.source}: no rows")
    return train, other, how


def load_splits(name: str) -> dict[str, Table]:
    """Load one source as a table per split."""
    path = Path(name)
    if name == "vader":
        return {"train": vader()}
    if path.suffix.lower() in READERS or path.is_file():
        return {"train": read_table(path)}
    return hugging_face(name)


def split_rows(table: Table, fraction: float, *, key: Callable[[Row], str]) -> tuple[Table, Table]:
    """Split rows by a hash of `key`: rows of equal key stay together, in any order of rows."""
    if len(table.rows) < 2:
        raise InputError(f"{table.source}: {len(table.rows)} rows; at least 2 are needed")
    hashes = [hash_of(key(row)) for row in table.rows]
    limit = sorted(set(hashes))[: max(1, round(len(set(hashes)) * fraction))][-1]
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, value in zip(table.rows, hashes, strict=True):
        parts[value <= limit].append(row)
    train, other = (Table(table.source, table.columns, p, table.class_names) for p in parts)
    return train, other


def hash_of(text: str) -> int:
    """Return a stable 64-bit hash."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def find_column(table: Table, asked: str | None, usual: Sequence[str], option: str) -> str:
    """Return the asked column, or the first usual one that the table has."""
    columns = ", ".join(table.columns)
    if asked is not None:
        if asked not in table.columns:
            raise InputError(f"{table.source}: no column {asked!r}; its columns: {columns}")
        return asked
    for name in usual:
        if name in table.columns:
            return name
    raise InputError(f"{table.source}: name a column with {option}; its columns: {columns}")


def texts_of(
    table: Table, column: str | None, *, skip_blank: bool = False
) -> list[tuple[Row, str]]:
    """Return each row with its text; a blank one is an error unless it is to be skipped."""
    column = find_column(table, column, TEXT_COLUMNS, "--text-column")
    found = []
    for row in table.rows:
        text = row.values.get(column)
        if isinstance(text, str) and text.strip():
            found.append((row, text))
        elif not (skip_blank and (text is None or isinstance(text, str))):
            raise InputError(f"{row.where}: column {column!r} holds no text but {text!r}")
    if not found:
        raise InputError(f"{table.source}: column {column!r} holds no text at all")
    return found


def labelled(
    train: Table,
    held_out: Table,
    how: str,
    text: str | None,
    label: str | None,
    *,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Build a classification dataset.

    Parameters
    ----------
    train, held_out, how
        From :func:`load_tables`.
    text, label
        Column names, None for the usual ones.
    classes
        The classes a model already has; labels must be among them. None: the classes are
        read from the training rows.

    Raises
    ------
    InputError
        If a column is missing, a label is empty, unknown or out of range, or all training
        labels are the same.
    """
    column = find_column(train, label, LABEL_COLUMNS, "--label-column")
    if classes is None:
        classes = read_classes(train, column)
    numbers = {name: i for i, name in enumerate(classes)}
    parts: list[list[Example]] = []
    for table in (train, held_out):
        find_column(table, column, (), "--label-column")
        parts.append(
            [
                Example(content, class_number(row, column, numbers))
                for row, content in texts_of(table, text)
            ]
        )
    seen = {example.label for example in parts[0]}
    if len(seen) < 2:
        raise InputError(
            f"{train.source}: every training row has the label {classes[seen.pop()]!r}; "
            f"at least two classes are needed"
        )
    return Dataset(parts[0], parts[1], list(classes), how)


def unlabelled(train: Table, held_out: Table, how: str, text: str | None) -> Dataset:
    """Build a language-model dataset: texts only, blank ones passed over."""
    parts = [
        [Example(content) for _, content in texts_of(table, text, skip_blank=True)]
        for table in (train, held_out)
    ]
    return Dataset(parts[0], parts[1], [], how)


def read_classes(table: Table, column: str) -> list[str]:
    """Return the class names of a label column: known names, 0..n-1, or the sorted values."""
    if column in table.class_names:
        return list(table.class_names[column])
    found: dict[str, Row] = {}
    for row in table.rows:
        found.setdefault(label_text(row, column), row)
    try:
        numbers = {int(name): row for name, row in found.items()}
    except ValueError:
        if len(found) > MAX_CLASSES:
            raise InputError(
                f"{table.source}: column {column!r} has {len(found)} different values; "
                f"that is no label (at most {MAX_CLASSES} classes)"
            ) from None
        return sorted(found)
    for number, row in numbers.items():
        if not 0 <= number < MAX_CLASSES:
            raise InputError(
                f"{row.where}: label {number} is out of range: number classes from 0 to at most "
                f"{MAX_CLASSES - 1}, or use names"
            )
    return [str(i) for i in range(max(numbers) + 1)]


def class_number(row: Row, column: str, numbers: dict[str, int]) -> int:
    """Return the class of a row, given by name or by number."""
    name = label_text(row, column)
    if name in numbers:
        return numbers[name]
    if name.isdigit() and int(name) < len(numbers):
        return int(name)
    shown = ", ".join(list(numbers)[:10])
    raise InputError(
        f"{row.where}: label {name!r} is out of range: the {len(numbers)} classes are {shown}"
    )


def label_text(row: Row, column: str) -> str:
    """Return a label as text: ``1`` for 1, ``"1"``, 1.0 and True."""
    value: Any = row.values.get(column)
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if value is None or isinstance(value, (float, list, dict)) or not str(value).strip():
        raise InputError(f"{row.where}: column {column!r} holds no label but {value!r}")
    return str(value).strip()
