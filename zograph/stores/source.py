"""Where the first values of weights come from, before a store holds newer ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from zograph.errors import StoreError
from zograph.ir import ParamInfo
from zograph.stores.lazy import fill, fill_rows

_ORIGIN = "_zograph_origin"


class Source(ABC):
    """The base values of parameters, by first name."""

    storage: str | Path = "disk"
    """What the loader was told of where newer values should live: ``disk`` or a folder."""

    @abstractmethod
    def read(self, info: ParamInfo, buffer: torch.Tensor) -> int:
        """Fill the start of a uint8 buffer; return the bytes read from files (0: from memory).

        Raises
        ------
        StoreError
            If the values cannot be read, or there are none.
        """

    @abstractmethod
    def read_rows(self, info: ParamInfo, rows: torch.Tensor, out: torch.Tensor) -> int:
        """Fill `out` with rows of a parameter, as `Store.read_rows` does."""


def as_tensor(info: ParamInfo, buffer: torch.Tensor) -> torch.Tensor:
    """View the start of a uint8 buffer as the parameter that it holds."""
    return buffer[: info.bytes].view(info.dtype).view(info.shape)


def as_stored(info: ParamInfo, buffer: torch.Tensor) -> torch.Tensor:
    """View the start of a uint8 buffer as what is stored: the parameter, or its encoded bytes."""
    return as_tensor(info, buffer) if info.format is None else buffer[: info.stored_bytes]


class TensorSource(Source):
    """Values in memory, looked up by name at every read."""

    def __init__(self, tensors: Callable[[str], torch.Tensor]) -> None:
        self._tensors = tensors

    def read(self, info: ParamInfo, buffer: torch.Tensor) -> int:
        as_tensor(info, buffer).copy_(info.view(self._tensors(info.parameter).detach()))
        return 0

    def read_rows(self, info: ParamInfo, rows: torch.Tensor, out: torch.Tensor) -> int:
        torch.index_select(info.view(self._tensors(info.parameter).detach()), 0, rows, out=out)
        return 0


class RecipeSource(Source):
    """Values that are read from a checkpoint as recipes say; some may be in memory."""

    def __init__(self, values: Mapping[str, torch.Tensor], storage: str | Path) -> None:
        self._values = dict(values)
        self.storage = storage

    def read(self, info: ParamInfo, buffer: torch.Tensor) -> int:
        return fill(info.view(self._values[info.parameter].detach()), as_tensor(info, buffer))

    def read_rows(self, info: ParamInfo, rows: torch.Tensor, out: torch.Tensor) -> int:
        return fill_rows(info.view(self._values[info.parameter].detach()), rows, out)


@dataclass(frozen=True)
class Origin:
    """Where one parameter on the meta device has its values."""

    value: torch.Tensor
    """Lazy, or in memory."""
    storage: str | Path


def set_origin(parameter: nn.Parameter, origin: Origin) -> None:
    """Say where a parameter on the meta device has its values."""
    setattr(parameter, _ORIGIN, origin)


def origin_of(parameter: nn.Parameter) -> Origin | None:
    """Return what `set_origin` said of a parameter."""
    found = getattr(parameter, _ORIGIN, None)
    return found if isinstance(found, Origin) else None


def source_of(model: nn.Module) -> Source | None:
    """Return the source of a model whose weights are not in memory, None if all of them are.

    Parameters with values in memory, such as a new head, are part of the source.

    Raises
    ------
    StoreError
        If a parameter is on the meta device and nothing says where its values are.
    """
    named = dict(model.named_parameters())
    origins = {name: origin_of(p) for name, p in named.items() if p.is_meta}
    if not origins:
        return None
    lost = [name for name, origin in origins.items() if origin is None]
    if lost:
        raise StoreError(
            f"{len(lost)} parameters have no values, {lost[0]!r} among them: they are on the meta "
            f"device. Load the model with zograph.from_pretrained, or give it values "
            f"(to_empty, then load_state_dict)."
        )
    known = [origin for origin in origins.values() if origin is not None]
    values = {name: (o.value if (o := origins.get(name)) else p) for name, p in named.items()}
    return RecipeSource(values, known[0].storage)
