"""Reads and writes of a disk that have nothing to do with the work beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from zograph.measure_disk import REQUEST, DirectFile, pages, random_bytes
from zograph.stores.base import PAGE

AREA = 64
"""Requests that the file holds."""


class Traffic:
    """So many bytes read from a disk and written to it at once, by two threads.

    What work takes beside it is what the traffic costs where all of it hides: on few cores the
    threads, the kernel and the memory are shared.

    Parameters
    ----------
    folder
        On the disk; a file without a name lives there for the time.
    read, write
        Bytes of a turn, moved in whole pages.

    Raises
    ------
    OSError
        If the disk fails or is full.
    """

    def __init__(self, folder: Path, read: int, write: int) -> None:
        self._file, self._workers = DirectFile(folder), ThreadPoolExecutor(2)
        out, back = pages(REQUEST), pages(REQUEST)
        out[:] = random_bytes(REQUEST)
        for i in range(AREA):
            self._file.write(out, i * REQUEST)
        self._moves = (
            (self._file.read, back, read // PAGE, 0),
            (self._file.write, out, write // PAGE, AREA // 2),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.shutdown()
        self._file.__exit__(*error)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Move everything once while the block runs; leave it when both are done."""
        running = [self._workers.submit(_move, *move) for move in self._moves]
        yield
        for move in running:
            move.result()


def _move(move: Callable[[memoryview, int], None], data: memoryview, count: int, at: int) -> None:
    """Move so many pages, going round the file from its request `at`."""
    whole = REQUEST // PAGE
    while count > 0:
        move(data[: min(count, whole) * PAGE], at % AREA * REQUEST)
        count, at = count - whole, at + 1
