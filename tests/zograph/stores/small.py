"""A small table of parameters, and stores over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from zograph.ir import ParamInfo
from zograph.stores.base import padded, page_aligned
from zograph.stores.disk import DiskStore
from zograph.stores.folder import open_work_folder
from zograph.stores.source import TensorSource, as_tensor

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "a": ((3, 5), torch.float32),
    "b": ((5000,), torch.bfloat16),
    "c": ((), torch.float32),
    "d": ((0, 4), torch.float16),
    "e": ((2048,), torch.float16),
}
TABLE = {n: ParamInfo(n, s, d, True, False, i) for i, (n, (s, d)) in enumerate(SHAPES.items())}


def value(name: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    info = TABLE[name]
    return torch.randn(info.shape, generator=generator).to(info.dtype)


def buffer_of(name: str, tensor: torch.Tensor | None = None) -> torch.Tensor:
    buffer = page_aligned(padded(TABLE[name].bytes))
    if tensor is not None:
        as_tensor(TABLE[name], buffer).copy_(tensor)
    return buffer


def disk_store(folder: Path | None, *, resume: bool = False) -> DiskStore:
    source = TensorSource(lambda name: value(name, 0))
    work = open_work_folder(folder)
    try:
        return DiskStore(work, TABLE, source, resume=(lambda *_: True) if resume else None)
    except BaseException:
        work.close()
        raise


def read(store: object, name: str) -> torch.Tensor:
    buffer = buffer_of(name)
    reader: Callable[[str, torch.Tensor], int] = store.read  # type: ignore[attr-defined]
    reader(name, buffer)
    return as_tensor(TABLE[name], buffer)


def same(store: object, name: str, seed: int) -> bool:
    return torch.equal(read(store, name), value(name, seed))
