"""The safetensors format: its header, read and written.

A file is 8 bytes (length of the header, little endian), the header (JSON), then the tensors'
bytes one after the other, without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zograph.errors import StoreError

MOST = 100_000_000
"""Longest header in bytes that readers of the format accept."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

AGAIN = "Download or copy it again, or save the model again with transformers."


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


def parse_header(raw: bytes, size: int, where: str) -> list[Entry]:
    """Read the header of a file and check it against the file's size.

    Parameters
    ----------
    raw
        What follows the first 8 bytes, of the length that they announce.
    size
        The file's size in bytes.
    where
        How messages name the file.

    Raises
    ------
    StoreError
        If the header is no header of this format, or does not describe this file.
    """
    try:
        header = json.loads(raw.decode("utf-8"))
        items = [(k, v) for k, v in header.items() if k != "__metadata__"]
        entries = [_entry(name, item, 8 + len(raw), where) for name, item in items]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise StoreError(f"{where}: its header is damaged ({e}). {AGAIN}") from e
    end = 8 + len(raw)
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise StoreError(
                f"{where}: tensor {entry.name!r} starts at byte {entry.offset}, and the one before "
                f"it ends at {end}: the header is damaged. {AGAIN}"
            )
        end += entry.nbytes
    if end > size:
        raise StoreError(
            f"{where} is truncated: its header describes {end} bytes and the file has {size}. "
            f"{AGAIN}"
        )
    if end < size:
        raise StoreError(
            f"{where}: {size - end} bytes follow the last tensor: header and data do not belong "
            f"together. {AGAIN}"
        )
    return entries


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Read the length that the first 8 bytes of a file announce.

    Raises
    ------
    StoreError
        If no header of that length fits the file.
    """
    if len(prefix) < 8:
        raise StoreError(f"{where} is truncated: it has {len(prefix)} bytes. {AGAIN}")
    (length,) = struct.unpack("<Q", prefix)
    assert isinstance(length, int)
    if length > MOST or length < 2:
        raise StoreError(f"{where} is no safetensors file: it does not start with a header.")
    if 8 + length > size:
        raise StoreError(
            f"{where} is truncated: its header alone takes {length} bytes and the file has {size}. "
            f"{AGAIN}"
        )
    return length


def _entry(name: str, item: Mapping[str, Any], start: int, where: str) -> Entry:
    shape = tuple(int(n) for n in item["shape"])
    first, last = (int(n) for n in item["data_offsets"])
    dtype = DTYPES.get(str(item["dtype"]))
    if dtype is None:
        raise StoreError(
            f"{where}: tensor {name!r} is of dtype {item['dtype']}, which is none of "
            f"{', '.join(DTYPES)}. Save the model in one of these."
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if min((*shape, first), default=0) < 0 or last - first != nbytes:
        raise StoreError(
            f"{where}: tensor {name!r} of shape {list(shape)} and dtype {dtype} takes {nbytes} "
            f"bytes, and its place has {last - first}: the header is damaged. {AGAIN}"
        )
    return Entry(name, dtype, shape, start + first, nbytes)


def build_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Write the first bytes of a file that will hold these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
