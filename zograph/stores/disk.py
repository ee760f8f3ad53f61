"""The disk tier: values come from their source until written, then from the work file."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import xxhash

from zograph.clipping import Clipped
from zograph.codec import encode
from zograph.errors import StoreError
from zograph.ir import ParamInfo
from zograph.stores import extents
from zograph.stores.base import PAGE, Store, padded, page_aligned
from zograph.stores.checkpoint import CHUNK
from zograph.stores.extents import ExtentHeader
from zograph.stores.files import bytes_of, failure
from zograph.stores.folder import WorkFolder
from zograph.stores.source import Source, as_tensor
from zograph.stores.workfile import WorkFile, page

WORK_FILE = "weights.zo"


Belongs = Callable[[int, int], bool]
"""Whether a stored value of this step and lineage is of the run that goes on."""


@dataclass(frozen=True)
class Newest:
    """Which extent of a parameter holds its newest value."""

    which: int
    step: int
    sequence: int


class DiskStore(Store):
    """Weights on a disk. What they were loaded from is read and never written.

    Written values go into one sparse file, alternating between two extents per parameter:
    payload first, then its header with the step, a sequence number and a checksum. So a kill
    at any moment leaves the newest complete value. A parameter with a format is encoded when it
    is first read, and written as the value of step 0.

    Parameters
    ----------
    folder
        Where the work file stands; `close` closes it too.
    table
        The model's parameters, in its order.
    source
        The values of parameters that were never written.
    resume
        Go on with the work file of an earlier run, if there is one, and take from it the newest
        values that are whole and of which this says that they belong to the run.
    clipped
        Counts what formats cannot hold.

    Raises
    ------
    StoreError
        If the folder holds a work file that is not resumed, of another model, or cut.
    """

    tier: ClassVar[Literal["host", "disk"]] = "disk"

    def __init__(
        self,
        folder: WorkFolder,
        table: Mapping[str, ParamInfo],
        source: Source,
        *,
        resume: Belongs | None = None,
        clipped: Clipped | None = None,
    ) -> None:
        self.origin: Callable[[], int] = lambda: 0
        """Gives the lineage of the values that a run starts from."""
        self._clipped = Clipped() if clipped is None else clipped
        self.folder = folder
        self.path = folder.path / WORK_FILE
        self._table = dict(table)
        self._source = source
        self._places, self._size = extents.places(table)
        self._newest: dict[str, Newest] = {}
        self._steps = dict.fromkeys(table, 0)
        self._file: WorkFile | None = None
        self._making = threading.Lock()
        self._closed = False
        if self._any_written():
            if resume is None:
                raise StoreError(
                    f"{folder.path} holds the weights of an earlier run ({WORK_FILE}). Resume that "
                    f"run, name another folder, or delete this one."
                )
            self._reopen(resume)

    def tensor(self, name: str) -> torch.Tensor | None:
        return None

    def read(self, name: str, buffer: torch.Tensor) -> int:
        self._check_open()
        newest = self._newest.get(name)
        if newest is None:
            return self._first(self._table[name], buffer)
        assert self._file is not None
        return self._file.read(self._places[name].payload(newest.which), buffer)

    def _first(self, info: ParamInfo, buffer: torch.Tensor) -> int:
        """Read a parameter that was never written; keep it, if it has to be encoded."""
        if info.format is None:
            return self._source.read(info, buffer)
        given = page_aligned(padded(info.bytes))
        count = self._source.read(info, given)
        stored = buffer[: info.stored_bytes]
        self._clipped.add(info.name, encode(as_tensor(info, given), info.format, stored))
        self.write(info.name, buffer, 0, self.origin())
        return count

    def read_rows(self, name: str, rows: torch.Tensor, out: torch.Tensor) -> int:
        self._check_open()
        if name not in self._newest:
            return self._source.read_rows(self._table[name], rows, out)
        buffer = page_aligned(padded(self._table[name].bytes))
        count = self.read(name, buffer)
        torch.index_select(as_tensor(self._table[name], buffer), 0, rows, out=out)
        return count

    def write(self, name: str, buffer: torch.Tensor, step: int, lineage: int = 0) -> int:
        self._check_open()
        place, old = self._places[name], self._newest.get(name)
        new = Newest(0, step, 1) if old is None else Newest(1 - old.which, step, old.sequence + 1)
        check = extents.checksum(bytes_of(buffer)[: place.nbytes])
        header = ExtentHeader(
            extents.name_hash(name), place.nbytes, step, new.sequence, lineage, check
        )
        try:
            file = self._made()
            count = file.write(place.payload(new.which), buffer)
            count += file.write(place.extents[new.which], page(header.pack()))
        except StoreError:
            raise
        except OSError as e:
            raise failure(
                e,
                f"{name!r} cannot be written to {self.path}; its value from before is still there",
            ) from e
        self._newest[name] = new
        self._steps[name] = step
        return count

    def fold_steps(self) -> Mapping[str, int]:
        return dict(self._steps)

    def sync(self) -> None:
        """Make what was written survive a loss of power too.

        Raises
        ------
        StoreError
            If the disk fails.
        """
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._file is not None:
                self._file.close()
            self.folder.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the store in {self.folder.path} was closed.")

    def _made(self) -> WorkFile:
        """Return the work file, which the first write makes."""
        with self._making:
            if self._file is None:
                file = WorkFile(self.path, self._size, create=True)
                header = extents.pack_file_header(extents.fingerprint(self._table))
                try:
                    file.write(0, page(header))
                except OSError:
                    file.close()
                    self.path.unlink()
                    raise
                self._file = file
            return self._file

    def _any_written(self) -> bool:
        """Whether there is a work file; one that a kill left before its first page is removed."""
        try:
            if not self.path.exists():
                return False
            if not any(self._first_page()):
                self.path.unlink()
                return False
        except OSError as e:
            raise failure(e, f"{self.path} cannot be read") from e
        return True

    def _first_page(self) -> bytes:
        with open(self.path, "rb") as f:
            return f.read(PAGE)

    def _reopen(self, belongs: Belongs) -> None:
        """Open an earlier run's file and find the newest good value of every parameter."""
        found = extents.parse_file_header(self._first_page())
        if found is None:
            raise StoreError(
                f"{self.path} is no work file of zograph, or its start is damaged. Delete it: what "
                f"it held is made again from the base and the log."
            )
        version, model = found
        if version != extents.VERSION or model != extents.fingerprint(self._table):
            raise StoreError(
                f"{self.path} belongs to another model: parameter names, shapes or dtypes (also "
                f"transfer_dtype) differ. "
                f"Load the model that the run started with, or name another folder."
            )
        self._file = WorkFile(self.path, self._size, create=False)
        buffer, lost = page_aligned(CHUNK), []
        for name in self._table:
            newest, damaged = self._recover(self._file, name, buffer, belongs)
            if newest is not None:
                self._newest[name], self._steps[name] = newest, newest.step
            elif damaged:
                lost.append(name)
        if lost:
            warnings.warn(
                f"{self.path} holds no good value of {len(lost)} parameters ({lost[0]!r} among "
                f"them): they are damaged, or of another run. These are made again from the base "
                f"and the log.",
                stacklevel=2,
            )

    def _recover(
        self, file: WorkFile, name: str, buffer: torch.Tensor, belongs: Belongs
    ) -> tuple[Newest | None, bool]:
        """Return the newest good extent of a parameter, and whether both hold bad ones."""
        place, good, untouched = self._places[name], [], 0
        head = buffer[:PAGE]
        for which in (0, 1):
            file.read(place.extents[which], head)
            if not head.any():
                untouched += 1
                continue
            header = extents.parse_extent_header(bytes(bytes_of(head)))
            if header is None or header.name != extents.name_hash(name):
                continue
            if not belongs(header.step, header.lineage):
                continue
            if self._checksum(file, place.payload(which), place.nbytes, buffer) == header.checksum:
                good.append(Newest(which, header.step, header.sequence))
        return max(good, key=lambda n: (n.step, n.sequence), default=None), not untouched

    def _checksum(self, file: WorkFile, offset: int, nbytes: int, buffer: torch.Tensor) -> int:
        check = xxhash.xxh3_64()
        for start in range(0, nbytes, CHUNK):
            piece = buffer[: min(CHUNK, padded(nbytes - start))]
            file.read(offset + start, piece)
            check.update(bytes_of(piece)[: nbytes - start])
        return check.intdigest()
