"""The memory that streamed weights pass through, and its views by slot and parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zograph.ir import ParamInfo
from zograph.schedule import Schedule
from zograph.stores.base import padded
from zograph.stores.source import as_stored, as_tensor


class Arena:
    """One buffer for the slots of a schedule; every parameter starts on a page.

    Slots hold weights as they are stored; with `decoded`, as stages take them.

    Parameters
    ----------
    buffer
        Bytes, page-aligned, as many as the schedule's peak in this arena.
    schedule
        Its offsets say where each slot stands.
    weights
        For each slot, the parameters that it holds, in order.
    params
        The table of parameters.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        schedule: Schedule,
        weights: Mapping[str, tuple[str, ...]],
        params: Mapping[str, ParamInfo],
        *,
        decoded: bool = False,
    ) -> None:
        view = as_tensor if decoded else as_stored
        self.bytes = buffer.numel()
        self._raw: dict[tuple[str, str], torch.Tensor] = {}
        self._typed: dict[tuple[str, str], torch.Tensor] = {}
        for slot, names in weights.items():
            at = schedule.offsets[slot]
            for name in names:
                nbytes = params[name].bytes if decoded else params[name].stored_bytes
                raw = buffer[at : at + padded(nbytes)]
                self._raw[slot, name] = raw
                self._typed[slot, name] = view(params[name], raw)
                at += padded(nbytes)
            end = schedule.offsets[slot] + schedule.units[slot].bytes
            assert at == end <= self.bytes, f"slot {slot} exceeds the arena"

    def raw(self, slot: str, name: str) -> torch.Tensor:
        """Return a parameter's bytes in a slot: uint8, whole pages."""
        return self._raw[slot, name]

    def weight(self, slot: str, name: str) -> torch.Tensor:
        """Return a parameter in a slot, in its own shape and dtype; its bytes, if encoded."""
        return self._typed[slot, name]
