"""Writing a model's folder, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from zograph.errors import ModelError, StoreError
from zograph.loading import quiet
from zograph.stores.checkpoint import INDEX, SINGLE
from zograph.stores.files import bytes_of, write_range
from zograph.stores.header import CODES, Entry, build_header
from zograph.stores.lazy import LazyTensor, fill, leaf
from zograph.stores.source import origin_of

SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

Read = Callable[[str], torch.Tensor]
"""Gives the newest value of a parameter by its first name, in memory of its own."""


def save_pretrained(model: nn.Module, folder: Path) -> None:
    """Write `model` into `folder` as its own `save_pretrained` does, or as safetensors.

    The files are written beside the folder first and moved into it when all are complete.

    Raises
    ------
    OSError
        If the folder or its parent cannot be written; the folder is left as it was.
    """
    with _staged(folder) as staging:
        own = getattr(model, "save_pretrained", None)
        if callable(own):
            own(staging)
        else:
            save_model(model, str(staging / SINGLE))


def save_streamed(
    model: nn.Module,
    read: Read,
    folder: Path,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a model whose weights are not in memory, one tensor after the other.

    The files are those that `save_pretrained` writes: config and weights in the original
    format, tied weights once.

    Parameters
    ----------
    model
        Its parameters may be on the meta device.
    read
        Gives a parameter by name.
    folder
        Written as a whole or left as it was; weight files of an earlier save are removed.
    max_shard_bytes
        Size of a file's tensors from which on another file is begun.

    Raises
    ------
    StoreError
        If the model's weights are still read from `folder`, or `read` fails.
    ModelError
        If the model has state that is no tensor, or of a dtype that safetensors lacks.
    OSError
        If the folder cannot be written.
    """
    if folder.resolve() in origins(model):
        raise StoreError(
            f"{folder} is where the model's weights are read from, and these files are never "
            f"changed. Save into another folder."
        )
    with _staged(folder) as staging:
        own = getattr(model, "save_pretrained", None)
        if callable(own):
            with quiet():
                own(staging, state_dict={})  # everything but weights
            for path in staging.glob("*.safetensors*"):
                path.unlink()
        else:
            max_shard_bytes = float("inf")  # safetensors.torch.load_model reads one file
        _write_shards(_Values(model, read), staging, max_shard_bytes)


def origins(model: nn.Module) -> set[Path]:
    """Return the folders of checkpoints that a model's weights are read from."""
    found = set()
    for parameter in model.parameters():
        origin = origin_of(parameter)
        if origin is not None and isinstance(origin.value, LazyTensor):
            path = getattr(origin.value.recipe.checkpoint, "path", None)
            if path is not None:
                found.add(path.resolve())
    return found


class LazyStateDict(Mapping[str, torch.Tensor]):
    """A model's state dict whose parameters are read when they are asked for.

    Keys are those of ``model.state_dict()``, aliases of tied weights included. Every access
    to a parameter reads it anew into memory of its own; buffers are the model's.
    """

    def __init__(self, model: nn.Module, read: Read) -> None:
        self._read = read
        self._names = state_names(model)
        self._buffers = dict(model.named_buffers(remove_duplicate=False))

    def __getitem__(self, key: str) -> torch.Tensor:
        name = self._names[key]
        return self._buffers[key].detach() if name is None else self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def state_names(model: nn.Module) -> dict[str, str | None]:
    """Return for each key of the model's state dict the parameter's first name.

    Buffers have None.

    Raises
    ------
    ModelError
        If something in the state dict is no tensor.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    names: dict[str, str | None] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor) or value.dtype not in CODES:
            raise ModelError(
                f"{key!r} of the state dict is {getattr(value, 'dtype', type(value).__name__)}, "
                f"which cannot be saved as safetensors. Save the model with torch.save."
            )
        names[key] = first.get(id(value))
    return names


class _Values:
    """A model's values as something to read lazily; the parameter read last is held."""

    def __init__(self, model: nn.Module, read: Read) -> None:
        self._read, self._held, self._tensor = read, "", torch.empty(0)
        self.model = model
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.entries: dict[str, Entry] = {}
        self._names = state_names(model)
        parameters = dict(model.named_parameters())
        for key in kept_keys(model, self._names):
            name = self._names[key]
            of = self.buffers[key] if name is None else parameters[name]
            shape = tuple(of.shape)
            nbytes = torch.Size(shape).numel() * of.dtype.itemsize
            self.entries[key] = Entry(key, of.dtype, shape, 0, nbytes)

    def get(self, key: str) -> torch.Tensor:
        """Return the value of a key of the state dict."""
        name = self._names[key]
        if name is None:
            return self.buffers[key].detach().cpu()
        if name != self._held:
            self._held, self._tensor = "", torch.empty(0)  # never two at a time
            self._held, self._tensor = name, self._read(name).detach().cpu()
        return self._tensor

    def read(self, name: str, out: torch.Tensor, first: int = 0) -> int:
        """Fill `out` with consecutive elements of a value, from element `first` on."""
        flat = self.get(name).reshape(-1)
        out.copy_(flat[first : first + out.numel()].view(out.shape))
        return out.nbytes

    def original(self) -> dict[str, torch.Tensor]:
        """Return lazy tensors under the names and in the shapes that the files have."""
        lazy: dict[str, torch.Tensor] = {key: leaf(self, key) for key in self.entries}
        if not callable(getattr(self.model, "save_pretrained", None)):
            return lazy
        from transformers.core_model_loading import revert_weight_conversion

        revert: Any = revert_weight_conversion
        return dict(revert(self.model, lazy))

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Carry out what `original` says of one tensor."""
        if isinstance(tensor, LazyTensor) and (key := tensor.recipe.leaf) is not None:
            entry, meta = self.entries[key], tensor.recipe.meta
            if meta.is_contiguous() and meta.numel() * meta.dtype.itemsize == entry.nbytes:
                return self.get(key).contiguous()
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        fill(tensor, out)
        return out


def kept_keys(model: nn.Module, names: Mapping[str, str | None]) -> list[str]:
    """Return the keys to save: one of each tied weight, and none that the model leaves out."""
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    aliases = dict(getattr(model, "all_tied_weights_keys", None) or {})
    keys = [key for key in names if key not in left_out]
    preferred = sorted(keys, key=lambda key: key in aliases)
    chosen: dict[str, str] = {}
    for key in preferred:
        chosen.setdefault(names[key] or f"buffer {key}", key)
    return [key for key in keys if key in set(chosen.values())]


def _write_shards(values: _Values, staging: Path, most: float) -> None:
    tensors = values.original()
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    weight_map = {}
    for i, keys in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(keys, file))
        _write_shard(values, {key: tensors[key] for key in keys}, staging / file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(values: _Values, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    header = build_header((key, t.dtype, tuple(t.shape)) for key, t in tensors.items())
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_range(fd, memoryview(header), 0)
        end = len(header)
        for tensor in tensors.values():
            data = bytes_of(values.value(tensor))
            write_range(fd, data, end)
            end += len(data)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files then replace those of `folder`."""
    folder = folder.absolute()
    existing = folder if folder.exists() else next(p for p in folder.parents if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{folder} cannot be written: {existing} is read-only or no folder. Choose another."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=existing))
    try:
        yield staging
        folder.mkdir(exist_ok=True)
        written = sorted(path.name for path in staging.iterdir())
        for name in written:
            os.replace(staging / name, folder / name)
        if any(SHARD.fullmatch(name) for name in written):
            for path in folder.iterdir():
                if SHARD.fullmatch(path.name) and path.name not in written:
                    path.unlink()  # of an earlier save: a reader would take it for a part
    finally:
        shutil.rmtree(staging, ignore_errors=True)
