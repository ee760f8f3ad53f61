"""The memory that streamed weights pass through, and its views by stage and parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zograph.ir import ParamInfo
from zograph.schedule import Schedule
from zograph.stores.base import padded, page_aligned
from zograph.weights import typed


class Arena:
    """One buffer for all slots of a schedule; every parameter starts on a page.

    Parameters
    ----------
    schedule
        Its offsets say where each stage's slot stands.
    weights
        For each slot, the parameters that it holds, in order.
    params
        The table of parameters.
    """

    def __init__(
        self,
        schedule: Schedule,
        weights: Mapping[str, tuple[str, ...]],
        params: Mapping[str, ParamInfo],
    ) -> None:
        self.bytes = schedule.peak.get("device", 0)
        self._buffer = page_aligned(self.bytes)
        self._raw: dict[tuple[str, str], torch.Tensor] = {}
        self._typed: dict[tuple[str, str], torch.Tensor] = {}
        for slot, names in weights.items():
            at = schedule.offsets[slot]
            for name in names:
                param = params[name]
                raw = self._buffer[at : at + padded(param.bytes)]
                self._raw[slot, name] = raw
                self._typed[slot, name] = typed(raw, param)
                at += padded(param.bytes)
            end = schedule.offsets[slot] + schedule.units[slot].bytes
            assert at == end <= self.bytes, f"slot {slot} exceeds the arena"

    def raw(self, slot: str, name: str) -> torch.Tensor:
        """Return a parameter's bytes in a slot: uint8, whole pages."""
        return self._raw[slot, name]

    def weight(self, slot: str, name: str) -> torch.Tensor:
        """Return a parameter in a slot, in its own shape and dtype."""
        return self._typed[slot, name]
