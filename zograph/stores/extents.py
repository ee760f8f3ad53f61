"""Where everything stands in a work file, and the headers that tell what is there.

The file starts with one page that names the model. Then each parameter, in the model's order,
has two extents; an extent is one header page and the payload, padded to whole pages. Places
follow from the parameters' names, shapes, dtypes and formats alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import astuple, dataclass

import xxhash

from zograph.ir import ParamInfo
from zograph.stores.base import PAGE, padded

VERSION = 2
_FILE_MAGIC = b"zographW"
_EXTENT_MAGIC = b"zographX"
_FILE = struct.Struct("<8sQ32s")
_EXTENT = struct.Struct("<8sQ16sQqQQQ")
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True)
class Place:
    """The two extents of one parameter: the offsets of their header pages."""

    extents: tuple[int, int]
    nbytes: int

    def payload(self, which: int) -> int:
        """Return where the payload of an extent starts."""
        return self.extents[which] + PAGE


@dataclass(frozen=True)
class ExtentHeader:
    """What an extent holds."""

    name: bytes
    """16 bytes of a hash of the parameter's name."""
    nbytes: int
    step: int
    """Number of steps whose updates are in the value."""
    sequence: int
    """1 for a parameter's first write, then one more with each."""
    lineage: int
    """What stands for the updates in the value (`Store.write`)."""
    checksum: int
    """XXH3 of the payload, without the padding."""

    def pack(self) -> bytes:
        """Return the header page."""
        return _page(_EXTENT.pack(_EXTENT_MAGIC, VERSION, *astuple(self)))


def checksum(data: memoryview) -> int:
    """Return the checksum of a payload; the interpreter lock is free meanwhile."""
    return int(xxhash.xxh3_64_intdigest(data))


def name_hash(name: str) -> bytes:
    """Return the 16 bytes that stand for a parameter's name."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def places(table: Mapping[str, ParamInfo]) -> tuple[dict[str, Place], int]:
    """Return the place of every parameter and the size of the whole file."""
    found, end = {}, PAGE
    for name, info in table.items():
        span = PAGE + padded(info.stored_bytes)
        found[name] = Place((end, end + span), info.stored_bytes)
        end += 2 * span
    return found, end


def fingerprint(table: Mapping[str, ParamInfo]) -> bytes:
    """Return 32 bytes for the parameters' names, shapes, dtypes and formats, in order."""
    text = "\n".join(
        f"{p.name} {list(p.shape)} {p.dtype}" + (f" as {p.format.name}" if p.format else "")
        for p in table.values()
    )
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def pack_file_header(model: bytes) -> bytes:
    """Return the first page of a work file."""
    return _page(_FILE.pack(_FILE_MAGIC, VERSION, model))


def parse_file_header(page: bytes) -> tuple[int, bytes] | None:
    """Return format version and model fingerprint, None if the page is no such header."""
    if not _whole(page, _FILE.size) or not page.startswith(_FILE_MAGIC):
        return None
    _, version, model = _FILE.unpack_from(page)
    return version, model


def parse_extent_header(page: bytes) -> ExtentHeader | None:
    """Return what an extent's header page says, None if it is damaged."""
    if not _whole(page, _EXTENT.size):
        return None
    magic, version, *values = _EXTENT.unpack_from(page)
    return ExtentHeader(*values) if (magic, version) == (_EXTENT_MAGIC, VERSION) else None


def _page(body: bytes) -> bytes:
    check = _CHECK.pack(xxhash.xxh3_64_intdigest(body))
    return (body + check).ljust(PAGE, b"\0")


def _whole(page: bytes, size: int) -> bool:
    """Whether a page is what `_page` makes of its first `size` bytes."""
    return len(page) == PAGE and page == _page(page[:size])
