"""Reading csv, tsv, jsonl and txt files into rows that remember their line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from zograph.cli.inputs import InputError

READERS = (".csv", ".tsv", ".jsonl", ".txt")


@dataclass(frozen=True)
class Row:
    """One record of a data source.

    Attributes
    ----------
    where
        What an error calls the row: ``file:line`` or ``name, row 7``.
    values
        Column name to value.
    """

    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of one source, with its columns in the order in which the source has them."""

    source: str
    columns: tuple[str, ...]
    rows: list[Row]
    class_names: dict[str, list[str]] = field(default_factory=dict)
    """Names of the classes of a column whose values are class numbers, where known."""


def read_table(path: Path) -> Table:
    """Read a file by its ending.

    A csv follows RFC 4180; in a tsv, quotation marks are ordinary characters; both begin
    with a line of column names. A txt is one text a line, in a column ``text``.

    Raises
    ------
    InputError
        If the file is missing, unreadable, of an unknown ending or holds an unreadable line;
        the message has the line number.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise InputError(f"{path}: unknown kind of file; use one of {', '.join(READERS)}")
    try:
        with path.open("rb") as file:
            lines = decoded(path, file)
            if kind == ".jsonl":
                return from_jsonl(path, lines)
            if kind == ".txt":
                rows = [Row(f"{path}:{n}", {"text": s.rstrip("\r\n")}) for n, s in lines]
                return Table(str(path), ("text",), rows)
            return from_csv(path, lines, tabs=kind == ".tsv")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def decoded(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers from 1."""
    for number, line in enumerate(file, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: unreadable line: not UTF-8 ({error})") from error


def from_csv(path: Path, lines: Iterator[tuple[int, str]], *, tabs: bool) -> Table:
    """Read comma- or tab-separated lines with a header."""
    text = (line for _, line in lines)
    if tabs:
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(text, strict=True)
    rows: list[Row] = []
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = [name.strip() for name in fields]
                if len(set(header)) < len(header):
                    raise InputError(f"{where}: a column name stands twice in the header: {header}")
            elif len(fields) != len(header):
                raise InputError(
                    f"{where}: unreadable line: {len(fields)} fields, but the header has "
                    f"{len(header)} ({', '.join(header)})"
                )
            else:
                rows.append(Row(where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise InputError(f"{path}:{start}: unreadable line: {error}") from error
    return Table(str(path), tuple(header), rows)


def from_jsonl(path: Path, lines: Iterator[tuple[int, str]]) -> Table:
    """Read one JSON object a line; blank lines are passed over."""
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: unreadable line: {error.msg}") from error
        except RecursionError as error:
            raise InputError(f"{where}: unreadable line: nested too deeply") from error
        if not isinstance(value, dict):
            raise InputError(f"{where}: unreadable line: not a JSON object")
        columns.update(dict.fromkeys(value))
        rows.append(Row(where, value))
    return Table(str(path), tuple(columns), rows)
