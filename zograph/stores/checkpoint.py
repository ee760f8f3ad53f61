"""A user's safetensors checkpoint, read tensor by tensor and never written."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from zograph.errors import StoreError
from zograph.stores.files import bytes_of, failure, read_range
from zograph.stores.header import AGAIN, Entry, header_length, parse_header

CHUNK = 8 << 20
"""Bytes read before the page cache is advised away, and converted at a time."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Identity:
    """What tells whether a file is still the one that was opened."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @staticmethod
    def of(stat: os.stat_result) -> Identity:
        """Take the identity from what `os.stat` or `os.fstat` returns."""
        return Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class Shard:
    """One safetensors file, open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError as e:
            raise StoreError(e.errno, f"shard {path} is missing. {AGAIN}") from e
        except OSError as e:
            raise failure(e, f"{path} cannot be opened") from e
        self._close = weakref.finalize(self, os.close, self._fd)
        self._identity = Identity.of(os.fstat(self._fd))
        size, where = self._identity.size, str(path)
        prefix = bytearray(min(8, size))
        read_range(self._fd, memoryview(prefix), 0, where)
        raw = bytearray(header_length(bytes(prefix), size, where))
        read_range(self._fd, memoryview(raw), 8, where)
        entries = parse_header(bytes(raw), size, where)
        self.entries = {entry.name: entry for entry in entries}

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from a byte of the file, and leave nothing of it in the page cache.

        Raises
        ------
        StoreError
            If the file is no longer the one that was opened, or cannot be read.
        """
        if not self._close.alive:
            raise StoreError(f"{self.path} was closed. Load the model again.")
        self._check()
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            read_range(self._fd, piece, offset + start, str(self.path))
            os.posix_fadvise(self._fd, offset + start, len(piece), os.POSIX_FADV_DONTNEED)

    def _check(self) -> None:
        try:
            now = {Identity.of(os.fstat(self._fd)), Identity.of(os.stat(self.path))}
        except OSError as e:
            raise failure(e, f"{self.path} went away while in use") from e
        if now != {self._identity}:
            raise StoreError(
                f"{self.path} was changed or replaced while in use: its weights would no longer be "
                f"those that the run started from. Put the old file back or start the run again."
            )

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._close()


class Checkpoint:
    """The tensors of a folder (or one file) of safetensors, by the names they have there.

    Parameters
    ----------
    path
        A folder with ``model.safetensors`` or ``model.safetensors.index.json`` and its shards,
        or one safetensors file.

    Raises
    ------
    StoreError
        If a file is missing, truncated, damaged or of another format; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._shards: dict[str, Shard] = {}
        if path.is_file() or (path / SINGLE).exists():
            shard = Shard(path if path.is_file() else path / SINGLE)
            self._add(shard, list(shard.entries))
        elif (path / INDEX).exists():
            for file, names in read_index(path / INDEX).items():
                self._add(Shard(path / file), names)
        else:
            raise StoreError(_nothing(path))

    def _add(self, shard: Shard, names: list[str]) -> None:
        for name in names:
            if name not in shard.entries:
                raise StoreError(
                    f"{shard.path} does not hold tensor {name!r}, which {INDEX} places there: the "
                    f"shard belongs to another checkpoint. {AGAIN}"
                )
            self.entries[name] = shard.entries[name]
            self._shards[name] = shard

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._shards[name].path

    def read_bytes(self, name: str, start: int, view: memoryview) -> int:
        """Fill `view` from byte `start` of a tensor; return the bytes read.

        Raises
        ------
        StoreError
            If the file has changed, is short, or the disk fails.
        """
        entry = self.entries[name]
        assert 0 <= start <= start + len(view) <= entry.nbytes
        self._shards[name].read(view, entry.offset + start)
        return len(view)

    def read(self, name: str, out: torch.Tensor, first: int = 0) -> int:
        """Fill a tensor with consecutive elements of a stored one, from element `first` on.

        Another dtype of `out` converts, `CHUNK` bytes at a time. Returns the bytes read.
        """
        dtype = self.entries[name].dtype
        if out.is_contiguous() and out.dtype == dtype:
            return self.read_bytes(name, first * dtype.itemsize, bytes_of(out))
        if out.numel() * dtype.itemsize <= CHUNK:
            return self._convert(name, out, first)
        if out.is_contiguous():
            out = out.view(-1)
        if out.shape[0] == 1:
            return self.read(name, out[0], first)
        head, tail = out.tensor_split(2)
        return self.read(name, head, first) + self.read(name, tail, first + head.numel())

    def _convert(self, name: str, out: torch.Tensor, first: int) -> int:
        """Read a small piece whole, then cast it into its place."""
        piece = torch.empty(out.shape, dtype=self.entries[name].dtype)
        count = self.read_bytes(name, first * piece.element_size(), bytes_of(piece))
        out.copy_(piece)
        return count

    def close(self) -> None:
        """Close all files; twice is fine."""
        for shard in self._shards.values():
            shard.close()


def read_index(path: Path) -> dict[str, list[str]]:
    """Return the tensors of each shard that an index names.

    Raises
    ------
    StoreError
        If the file is no index, or names files outside of its folder.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(file, []).append(name)
        outside = [f for f in shards if Path(f).is_absolute() or ".." in Path(f).parts]
    except OSError as e:
        raise failure(e, f"{path} cannot be read") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise StoreError(f"{path} is no index of a checkpoint ({e!r}). {AGAIN}") from e
    if outside:
        raise StoreError(f"{path} names a file outside of its folder: {outside[0]}. {AGAIN}")
    return shards


def _nothing(path: Path) -> str:
    """Say why a folder holds no checkpoint that can be read."""
    if not path.is_dir():
        return f"{path} is neither a folder nor a file. Check the path."
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        return (
            f"{path} holds {pickled[0]}, a pickled checkpoint, which cannot be read in parts. "
            f"Convert it once: load it with transformers' from_pretrained and save_pretrained it "
            f"into another folder (that writes safetensors)."
        )
    return f"{path} holds neither {SINGLE} nor {INDEX}: there are no weights to read."
