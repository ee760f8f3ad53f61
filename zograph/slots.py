"""What is in the slots of a running schedule, and how it gets there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zograph.arena import Arena
from zograph.ir import ParamInfo
from zograph.passes.schedule import decoded
from zograph.schedule import Schedule, Stream
from zograph.stores.base import page_aligned
from zograph.stores.pinned import pin
from zograph.weights import Weights


class Slots:
    """The slots of one schedule on the CPU: filled from the store, written back to it.

    Parameters
    ----------
    held
        For each slot, the parameters that it holds, in order.
    coded
        For each stage, the parameters that it decodes, in order.
    """

    def __init__(
        self,
        schedule: Schedule,
        held: Mapping[str, tuple[str, ...]],
        params: Mapping[str, ParamInfo],
        weights: Weights,
        coded: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.held, self.weights = held, weights
        self.moved_bytes = dict.fromkeys(Stream, 0)
        """Bytes that each stream has moved so far."""
        self.versions = {(slot, n): 0 for slot, names in held.items() for n in names}
        """The version of each weight in a slot."""
        self.arena = Arena(self.buffer(schedule.peak.get("device", 0)), schedule, held, params)
        wanted = {decoded(slot): names for slot, names in coded.items()}
        memory = self.buffer(schedule.peak.get("decoded", 0))
        self.decoded = Arena(memory, schedule, wanted, params, decoded=True)

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Return the memory of the arena."""
        return page_aligned(nbytes)

    def action(self, kind: str) -> Callable[[str, Sequence[str]], None]:
        """Return what a task does with a slot and its weights: ``fetch`` or ``writeback``."""
        return {"fetch": self.fetch, "writeback": self.write_back}[kind]

    def close(self) -> None:
        """Give back what is more than memory."""

    def fetch(self, slot: str, names: Sequence[str]) -> None:
        """Fill a slot from the store."""
        stream = Stream.READ if self.weights.store.tier == "disk" else Stream.TO_DEVICE
        for name in names:
            raw, version = self.arena.raw(slot, name), self.weights.version.get(name, 0)
            self.moved_bytes[stream] += self.weights.store.read(name, raw)
            self.versions[slot, name] = version

    def fold(self, slot: str, name: str) -> None:
        """Fold a weight in its slot."""
        weight, version = self.arena.weight(slot, name), self.versions[slot, name]
        self.versions[slot, name] = self.weights.fold(name, weight, version)

    def decode(self, slot: str, name: str) -> None:
        """Decode a weight from its slot or from where it stands, with what it owes."""
        out = self.decoded.weight(decoded(slot), name)
        if (slot, name) not in self.versions:
            self.weights.decode_resident(name, out)
            return
        stored, version = self.arena.weight(slot, name), self.versions[slot, name]
        self.versions[slot, name] = self.weights.decode(name, stored, version, out)

    def encode(self, slot: str, name: str) -> None:
        """Encode a weight that is to be written, into its slot or where it stands."""
        weight = self.decoded.weight(decoded(slot), name)
        if (slot, name) not in self.versions:
            self.weights.encode_resident(name, weight)
        elif self.newer(slot, [name]):
            self.weights.encode(name, weight, self.arena.weight(slot, name))

    def weight(self, slot: str, name: str) -> torch.Tensor | None:
        """Return a weight as a stage takes it; None if it is in no slot of the stage."""
        if self.weights.table[name].format is not None:
            return self.decoded.weight(decoded(slot), name)
        return self.arena.weight(slot, name) if (slot, name) in self.versions else None

    def write_back(self, slot: str, names: Sequence[str]) -> None:
        """Write what the slot has newer than the store."""
        stream = Stream.WRITE if self.weights.store.tier == "disk" else Stream.TO_HOST
        for name in self.newer(slot, names):
            raw, version = self.arena.raw(slot, name), self.versions[slot, name]
            self.moved_bytes[stream] += self.weights.write(name, raw, version)

    def newer(self, slot: str, names: Sequence[str]) -> list[str]:
        """List the weights that were folded since they were stored, and are to be written now."""
        weights, found = self.weights, ((n, self.versions[slot, n]) for n in names)
        return [n for n, v in found if v > weights.version[n] and weights.is_fold_point(n, v)]


class DeviceSlots(Slots):
    """Slots on a CUDA device, copied from and to pinned host memory; copies are only issued."""

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Return the memory of the arena."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.weights.device)

    def fetch(self, slot: str, names: Sequence[str]) -> None:
        """Issue the copies into a slot."""
        for name in names:
            stored = self.weights.store.tensor(name)
            assert stored is not None
            self.arena.weight(slot, name).copy_(stored, non_blocking=True)
            self.versions[slot, name] = self.weights.version.get(name, 0)
            self.moved_bytes[Stream.TO_DEVICE] += stored.nbytes

    def write_back(self, slot: str, names: Sequence[str]) -> None:
        """Issue the copies of what the slot has newer than the store."""
        for name in self.newer(slot, names):
            stored = self.weights.store.tensor(name)
            assert stored is not None
            stored.copy_(self.arena.weight(slot, name), non_blocking=True)
            self.weights.version[name] = self.versions[slot, name]
            self.moved_bytes[Stream.TO_HOST] += stored.nbytes


class StagedSlots(DeviceSlots):
    """Slots on a CUDA device for weights on a disk: through pinned buffers of host memory."""

    def __init__(
        self,
        schedule: Schedule,
        held: Mapping[str, tuple[str, ...]],
        params: Mapping[str, ParamInfo],
        weights: Weights,
        coded: Mapping[str, tuple[str, ...]],
        cudart: Any = None,
    ) -> None:
        super().__init__(schedule, held, params, weights, coded)
        ways = {f"{slot} {way}": n for slot, n in held.items() for way in ("in", "out")}
        ways = {buffer: names for buffer, names in ways.items() if buffer in schedule.units}
        memory = page_aligned(schedule.peak.get("staging", 0))
        self._pinned = pin(memory, cudart)
        self.staging = Arena(memory, schedule, ways, params)
        self._saved: dict[str, dict[str, int]] = {}
        """For each slot on its way to the disk, the versions of the weights in its buffer."""

    def action(self, kind: str) -> Callable[[str, Sequence[str]], None]:
        """Return what a task does: also ``read`` and ``write``, between disk and buffers."""
        return {"read": self.read, "write": self.write}.get(kind) or super().action(kind)

    def close(self) -> None:
        """Unpin the buffers."""
        self._pinned.close()

    def read(self, slot: str, names: Sequence[str]) -> None:
        """Read a slot's weights into its buffer."""
        for name in names:
            raw = self.staging.raw(f"{slot} in", name)
            self.moved_bytes[Stream.READ] += self.weights.store.read(name, raw)

    def fetch(self, slot: str, names: Sequence[str]) -> None:
        """Issue the copies from the buffer into the slot."""
        for name in names:
            staged = self.staging.raw(f"{slot} in", name)
            self.arena.raw(slot, name).copy_(staged, non_blocking=True)
            self.versions[slot, name] = self.weights.version.get(name, 0)
            self.moved_bytes[Stream.TO_DEVICE] += staged.numel()

    def write_back(self, slot: str, names: Sequence[str]) -> None:
        """Issue the copies into the buffer of what is newer than the store."""
        newer = self.newer(slot, names)
        self._saved[slot] = {n: self.versions[slot, n] for n in newer}
        for name in newer:
            raw = self.arena.raw(slot, name)
            self.staging.raw(f"{slot} out", name).copy_(raw, non_blocking=True)
            self.moved_bytes[Stream.TO_HOST] += raw.numel()

    def write(self, slot: str, names: Sequence[str]) -> None:
        """Write what the buffer holds to the disk."""
        for name, version in self._saved.pop(slot, {}).items():
            raw = self.staging.raw(f"{slot} out", name)
            self.moved_bytes[Stream.WRITE] += self.weights.write(name, raw, version)


def open_slots(
    schedule: Schedule,
    held: Mapping[str, tuple[str, ...]],
    params: Mapping[str, ParamInfo],
    weights: Weights,
    coded: Mapping[str, tuple[str, ...]],
) -> Slots:
    """Make the slots that suit the device and the store."""
    kind = Slots
    if weights.device.type == "cuda":
        kind = StagedSlots if weights.store.tier == "disk" else DeviceSlots
    return kind(schedule, held, params, weights, coded)
