"""Writing a seed log as a run goes."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from zograph.errors import StoreError
from zograph.records import Outcome
from zograph.seedlog.file import LogFile, read_log
from zograph.seedlog.format import LogHeader, pack_record
from zograph.seedlog.placing import place
from zograph.stores.files import failure, write_range
from zograph.stores.lock import FileLock


class Journal:
    """The log of a run: a record for every step, in order, each appended as one write.

    Made by :meth:`create` or :meth:`go_on`. A log is locked while a run writes it; the lock ends
    with the process.

    Parameters
    ----------
    found
        What the file holds already.
    fsync_every
        Records from one flush to the next; a flush runs on a thread of its own and is waited for
        when the next one is due. 0: the operating system decides.
    """

    def __init__(self, found: LogFile, fsync_every: int) -> None:
        self.path, self.header = found.path, found.header
        self._every, self._unflushed = fsync_every, 0
        self._chain = array("Q", found.lineages())
        """The lineage of the header and of each record."""
        self._size = found.end
        self._waiting: list[Outcome] = []
        self._guard = threading.Lock()
        self._flush: Future[None] | None = None
        try:
            self._lock = FileLock(
                self.path,
                f"another run writes the log {self.path}. Wait until it has ended, or resume into "
                f"a copy (log=).",
            )
            try:
                self._fd = self._open(found.torn)
            except BaseException:
                self._lock.release()
                raise
        except StoreError:
            raise
        except OSError as e:
            raise failure(e, f"the log {self.path} cannot be written") from e
        self._end = weakref.finalize(self, os.close, self._fd)
        self._thread = ThreadPoolExecutor(1, "zograph-log")

    def _open(self, torn: int) -> int:
        """Open the file for writing, and cut its torn tail."""
        fd = os.open(self.path, os.O_RDWR)
        try:
            if os.fstat(fd).st_size != self._size + torn:
                raise StoreError(
                    f"the log {self.path} was written by another run meanwhile: try again."
                )
            if torn:
                os.ftruncate(fd, self._size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def create(path: Path, header: LogHeader, fsync_every: int) -> Journal:
        """Begin a log; its header appears whole or not at all.

        Raises
        ------
        StoreError
            If there is such a file already, or it cannot be written.
        """
        place(path, header.pack())
        return Journal(read_log(path), fsync_every)

    @staticmethod
    def go_on(found: LogFile, path: Path, fsync_every: int) -> Journal:
        """Append to a log that was read, behind its last whole record.

        Parameters
        ----------
        path
            The log's own path, or where to begin with a copy of it.

        Raises
        ------
        StoreError
            If another run writes it, it has changed since, or it cannot be written.
        """
        if path.absolute() == found.path.absolute():
            return Journal(found, fsync_every)
        place(path, found.path.read_bytes()[: found.end])
        return Journal(read_log(path), fsync_every)

    def __len__(self) -> int:
        """Return the number of steps in it."""
        return len(self._chain) - 1

    def add(self, outcome: Outcome) -> None:
        """Append the record of a step, or of a GPU's step as soon as its losses are there.

        Raises
        ------
        StoreError
            If the disk is full or fails, or the log was closed. It is as before, and the step can
            be run again.
        """
        with self._guard:
            if not self._end.alive:
                raise StoreError(
                    f"the log {self.path} was closed. Go on with it in a new step (zograph.resume)."
                )
            self._waiting.append(outcome)
            try:
                self._append(wait=False)
            except BaseException:
                self._waiting.remove(outcome)
                raise

    def flush(self) -> None:
        """Make every step's record survive a loss of power.

        Raises
        ------
        StoreError
            If the disk is full or fails.
        """
        with self._guard:
            if self._end.alive:
                self._append(wait=True)
                self._begin_flush()
                self._await_flush()

    def lineage(self, version: int) -> int:
        """Return what stands for the first `version` steps; waits for a GPU's losses.

        Raises
        ------
        StoreError
            If a record that was waiting cannot be written.
        """
        with self._guard:
            if version >= len(self._chain):
                self._append(wait=True)
            return self._chain[version]

    def belongs(self, version: int, lineage: int) -> bool:
        """Whether a value with these updates in it is of this run."""
        return version < len(self._chain) and self._chain[version] == lineage

    def copy_to(self, path: Path) -> None:
        """Write the log so far to another place, whole or not at all.

        Raises
        ------
        StoreError
            If there is such a file already, or it cannot be written.
        """
        with self._guard:
            self._append(wait=True)
            place(path, self.path.read_bytes()[: self._size])

    def close(self) -> None:
        """Flush what was written, and let go of the file; twice is fine."""
        if self._end.alive:
            try:
                self.flush()
            finally:
                self._thread.shutdown()
                self._end()
                self._lock.release()

    def _append(self, *, wait: bool) -> None:
        while self._waiting and (wait or self._waiting[0].ready()):
            outcome = self._waiting[0]
            record, lineage = pack_record(
                outcome.step,
                outcome.lr,
                outcome.applied(),
                self._chain[-1],
                skipped=outcome.record.skipped,
            )
            due = 0 < self._every <= self._unflushed + 1
            if due:  # before the record is there: a flush that failed leaves the step undone
                self._await_flush()
            try:
                write_range(self._fd, memoryview(record), self._size)
            except OSError as e:
                with contextlib.suppress(OSError):  # what is behind the end is a torn tail
                    os.ftruncate(self._fd, self._size)  # to make a file shorter takes no space
                raise failure(e, f"the log {self.path} cannot be written") from e
            self._waiting.pop(0)
            self._size += len(record)
            self._chain.append(lineage)
            self._unflushed += 1
            if due:
                self._begin_flush()

    def _begin_flush(self) -> None:
        self._await_flush()
        self._unflushed = 0
        self._flush = self._thread.submit(os.fdatasync, self._fd)

    def _await_flush(self) -> None:
        if self._flush is not None:
            flush, self._flush = self._flush, None
            try:
                flush.result()
            except OSError as e:
                raise failure(e, f"the log {self.path} cannot be flushed") from e
