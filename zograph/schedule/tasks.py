"""What a schedule is made of: tasks on streams, units of slot memory, cells of stored weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stream(StrEnum):
    """A resource that runs one task at a time, in order."""

    READ = "read"
    """From the disk into host memory."""
    TO_DEVICE = "to_device"
    COMPUTE = "compute"
    TO_HOST = "to_host"
    WRITE = "write"
    """From host memory to the disk."""


@dataclass(frozen=True)
class Unit:
    """Slot memory with one life a step: filled once, read, perhaps rewritten in place, then free.

    Its memory is taken when the task that fills it starts, and is free when every task of the
    step that reads or writes it has ended.
    """

    name: str
    arena: str
    """Which memory it stands in: ``device``; ``decoded`` for what stages decode from there; or
    ``staging`` for buffers on the way."""
    bytes: int


@dataclass(frozen=True)
class Task:
    """One instruction of a step."""

    name: str
    stream: Stream
    seconds: float
    fills: str | None = None
    """The unit whose memory it takes and writes whole."""
    writes: tuple[str, ...] = ()
    """Units that it rewrites in place."""
    reads: tuple[str, ...] = ()
    """Units that it reads."""
    loads: tuple[str, ...] = ()
    """Stored weights (cells) that it reads from their store."""
    stores: tuple[str, ...] = ()
    """Stored weights (cells) that it replaces in their store."""
