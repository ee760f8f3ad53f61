"""The memory that streamed weights pass through, and its views by slot and parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zograph.ir import ParamInfo
from zograph.schedule import Schedule
from zograph.stores.base import padded
from zograph.weights import typed


class Arena:
    """One buffer for the slots of a schedule; every parameter starts on a page.

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
    ) -> None:
        self.bytes = buffer.numel()
        self._raw: dict[tuple[str, str], torch.Tensor] = {}
        self._typed: dict[tuple[str, str], torch.Tensor] = {}
        for slot, names in weights.items():
            at = schedule.offsets[slot]
            for name in names:
                raw = buffer[at : at + padded(params[name].bytes)]
                self._raw[slot, name] = raw
                self._typed[slot, name] = typed(raw, params[name])
                at += padded(params[name].bytes)
            end = schedule.offsets[slot] + schedule.units[slot].bytes
            assert at == end <= self.bytes, f"slot {slot} exceeds the arena"

    def raw(self, slot: str, name: str) -> torch.Tensor:
        """Return a parameter's bytes in a slot: uint8, whole pages."""
        return self._raw[slot, name]

    def weight(self, slot: str, name: str) -> torch.Tensor:
        """Return a parameter in a slot, in its own shape and dtype."""
        return self._typed[slot, name]
