"""The bytes of a seed log: one header, then one record a step, all of one size.

::

    header   "zographL", format version u32, length u32, JSON of that length, checksum u64
    record   step u32, directions u16, flags u16, lr f64,
             for each direction: seed i64, scale f32, coef f32, loss+ f32, loss- f32,
             checksum u64

All numbers are little-endian. A checksum is XXH3 of what stands before it, of its header or
record; a record's is seeded with the checksum before it, so that records form a chain: the
checksum of a record, its *lineage*, stands for the whole log up to there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import xxhash

MAGIC = b"zographL"
VERSION = 1
SKIPPED = 1
"""Flag of a step whose losses were not finite; it moved nothing."""

START = struct.Struct("<8sII")
_STEP = struct.Struct("<IHHd")
_DIRECTION = struct.Struct("<qffff")
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True)
class LogHeader:
    """What every record of a log is about."""

    model: str
    """Hash of the parameters' names, shapes and dtypes."""
    base: str
    """Hash of the values that the run started from."""
    trained: str
    """Hash of the names of the trainable parameters."""
    options: dict[str, Any]
    """The options that change numbers: those of `zograph.seedlog.identity`."""
    engine: dict[str, Any]
    """Device type, backend, threads and version of torch: what the losses' last bits depend on."""
    noise: int
    """Version of the noise's definition."""
    lr: float
    """Learning rate of the first step, unless it was assigned since."""
    decided: dict[str, Any] = field(default_factory=dict)
    """What options set to ``auto`` have come to mean."""
    zograph: str = ""
    """Version of the software that began the log."""

    @property
    def directions(self) -> int:
        """Directions a step."""
        return int(self.options["directions"])

    def pack(self) -> bytes:
        """Return the header's bytes."""
        text = json.dumps(asdict(self), sort_keys=True).encode()
        body = START.pack(MAGIC, VERSION, len(text)) + text
        return body + _CHECK.pack(checksum(body))


def checksum(body: bytes | memoryview, seed: int = 0) -> int:
    """Return the checksum of a header, or of a record after the one with checksum `seed`."""
    return int(xxhash.xxh3_64_intdigest(body, seed=seed))


def parse_header(data: bytes) -> tuple[LogHeader, int] | None:
    """Return the header that `data` begins with and its size, None if it is damaged.

    The magic and the version were looked at before.
    """
    if len(data) < START.size:
        return None
    end = START.size + START.unpack_from(data)[2]
    if len(data) < end + _CHECK.size or _CHECK.unpack_from(data, end)[0] != checksum(data[:end]):
        return None
    found = json.loads(data[START.size : end])
    known = {f.name for f in fields(LogHeader)}
    return LogHeader(**{k: v for k, v in found.items() if k in known}), end + _CHECK.size


def record_size(directions: int) -> int:
    """Return the bytes of a record."""
    return _STEP.size + directions * _DIRECTION.size + _CHECK.size


def pack_record(
    step: int,
    lr: float,
    directions: Sequence[tuple[int, float, float, float, float]],
    lineage: int,
    *,
    skipped: bool = False,
) -> tuple[bytes, int]:
    """Return a record's bytes and its lineage.

    Parameters
    ----------
    directions
        Seed, scale, coefficient, loss+ and loss- of each.
    lineage
        Of the record before, or of the header.
    """
    body = _STEP.pack(step, len(directions), SKIPPED if skipped else 0, lr)
    body += b"".join(_DIRECTION.pack(*d) for d in directions)
    check = checksum(body, lineage)
    return body + _CHECK.pack(check), check


def record_dtype(directions: int) -> np.dtype[Any]:
    """Return the layout of a record as a numpy dtype."""
    each = [("seed", "<i8"), ("scale", "<f4"), ("coef", "<f4"), ("losses", "<f4", (2,))]
    return np.dtype(
        [
            ("step", "<u4"),
            ("directions", "<u2"),
            ("flags", "<u2"),
            ("lr", "<f8"),
            ("each", each, (directions,)),
            ("check", "<u8"),
        ]
    )
