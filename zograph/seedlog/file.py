"""Reading a seed log: every whole record, or one error that names the place."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zograph.errors import LogError
from zograph.history import Terms
from zograph.records import Outcome
from zograph.seedlog.format import (
    MAGIC,
    SKIPPED,
    START,
    VERSION,
    LogHeader,
    checksum,
    parse_header,
    record_dtype,
    record_size,
)
from zograph.stores.files import failure


@dataclass(frozen=True, eq=False)
class LogFile:
    """The contents of a log.

    Attributes
    ----------
    path : Path
    header : LogHeader
    table : numpy structured array
        The whole records, in order: fields ``step``, ``lr``, ``flags``, ``check`` and, for each
        direction, ``each`` with ``seed``, ``scale``, ``coef`` and ``losses``.
    start : int
        Bytes of the header.
    head : int
        The header's checksum, which the first record's follows.
    torn : int
        Bytes after the last whole record.
    """

    path: Path
    header: LogHeader
    table: np.ndarray[Any, np.dtype[Any]]
    start: int
    head: int
    torn: int

    def __len__(self) -> int:
        return len(self.table)

    @property
    def end(self) -> int:
        """Bytes up to the last whole record's end."""
        return self.start + self.table.nbytes

    def lineages(self) -> list[int]:
        """Return the header's checksum and then each record's."""
        return [self.head, *map(int, self.table["check"])]

    def lr(self) -> float:
        """Return the learning rate of the last step; of the first one, if there is none yet."""
        return float(self.table["lr"][-1]) if len(self) else self.header.lr

    def terms(self, until: int | None = None) -> tuple[Terms, torch.Tensor]:
        """Return the updates as they were applied.

        Returns
        -------
        terms
            Of all steps before `until`, in order.
        counts
            int64 [steps]: how many terms each step has.
        """
        rows = self.table[:until]
        counts = np.full(len(rows), self.header.directions)
        if self.header.engine["device"] == "cpu":  # a GPU has applied terms of zero by then
            moved = (rows["flags"] & SKIPPED) == 0
            counts *= moved
            rows = rows[moved]
        columns = (rows["each"][name].reshape(-1) for name in ("seed", "coef", "scale"))
        return Terms(*(torch.from_numpy(c.copy()) for c in columns)), torch.from_numpy(counts)

    def last(self) -> Outcome | None:
        """Return what the newest step measured, None if there is none."""
        if not len(self):
            return None
        row, options = self.table[-1], self.header.options
        return Outcome(
            int(row["step"]),
            row["each"]["seed"].tolist(),
            torch.from_numpy(row["each"]["losses"].copy()),
            lr=float(row["lr"]),
            eps=options["eps"],
            decay=options["weight_decay"],
        )


def read_log(path: str | Path, *, warn: bool = True) -> LogFile:
    """Read a seed log. A torn tail is left out, with a warning; the file is not changed.

    Raises
    ------
    LogError
        If it is no seed log, of a newer version, or damaged before its end.
    StoreError
        If it cannot be read.
    """
    path = Path(path).expanduser()
    try:
        data = path.read_bytes()
    except OSError as e:
        raise failure(e, f"the log {path} cannot be read") from e
    header, start = _header(path, data)
    dtype = record_dtype(header.directions)
    head = checksum(data[: start - 8])
    whole = _whole_records(path, data, header, start, head)
    table = np.frombuffer(data, dtype, count=whole, offset=start)
    torn = len(data) - start - table.nbytes
    if torn and warn:
        warnings.warn(
            f"{path}: the last {torn} bytes, from byte {start + table.nbytes} on, are no whole "
            f"record: a kill or a loss of power cut it. The log ends with {whole} steps; what "
            f"came after is run again.",
            stacklevel=2,
        )
    return LogFile(path, header, table, start, head, torn)


def _header(path: Path, data: bytes) -> tuple[LogHeader, int]:
    if not data.startswith(MAGIC) or len(data) < START.size:
        raise LogError(
            f"{path} is no seed log of zograph, or is damaged at byte 0. Check the path, or "
            f"restore the log from a copy."
        )
    version = START.unpack_from(data)[1]
    if version != VERSION:
        raise LogError(
            f"{path} is of format {version}, and this zograph reads format {VERSION}: it comes "
            f"from a newer version, or is damaged at byte 8. Update zograph."
        )
    found = parse_header(data)
    if found is None:
        raise LogError(
            f"{path} is damaged in its header, between byte 8 and byte {len(data)}. Restore it "
            f"from a copy."
        )
    return found


def _whole_records(path: Path, data: bytes, header: LogHeader, start: int, lineage: int) -> int:
    """Count the records before the torn tail, if any.

    Raises
    ------
    LogError
        If a damaged record has a whole one behind it.
    """
    size = record_size(header.directions)
    view = memoryview(data)
    count = (len(data) - start) // size
    for i in range(count):
        found, stored = _record(view, start + i * size, size, lineage)
        if found != stored or int.from_bytes(view[start + i * size :][:4], "little") != i:
            if _goes_on(view, start + (i + 1) * size, size, (found, stored)):
                raise LogError(
                    f"{path} is damaged at byte {start + i * size}, in the record of step {i}, "
                    f"and goes on behind it. Restore it from a copy, or cut it there (truncate "
                    f"--size={start + i * size}) to resume from step {i}."
                )
            return i
        lineage = found
    return count


def _record(view: memoryview, at: int, size: int, lineage: int) -> tuple[int, int]:
    """Return the checksum that a record should have, and the one that it has."""
    body = view[at : at + size - 8]
    return checksum(body, lineage), int.from_bytes(view[at + size - 8 : at + size], "little")


def _goes_on(view: memoryview, at: int, size: int, lineages: tuple[int, int]) -> bool:
    """Whether there is a whole record at `at` or behind, after one that is damaged."""
    while at + size <= len(view):
        pairs = [_record(view, at, size, lineage) for lineage in lineages]
        if any(found == stored for found, stored in pairs):
            return True
        lineages = pairs[0]
        at += size
    return False
