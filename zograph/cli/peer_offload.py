"""A plain MeZO loop over accelerate's disk offload, at its own best setting.

accelerate keeps every weight in a memory-mapped file, loads a module's weights before its forward
and drops them behind it. MeZO's step on top of that needs three directions' worth of noise and
two forwards, whatever is done; what can be chosen is how often files are read and written.

Perturbing the stored weights in place, as MeZO does in memory, reads and writes every file four
times a step. Here weights are perturbed as they are loaded instead, with a generator seeded by
step and weight, so that a direction is drawn again wherever it is needed and no more than one
weight's copy is alive. Nothing is written but the update, in place in the mapped file:

``update pass``
    the textbook order: after both forwards every file is mapped once more and updated;
``update on load``
    a step's update is applied by the next step's first forward, just before a weight is loaded,
    which saves one pass over the files;
``update on load, blocks``
    the same with whole transformer blocks loaded at once (accelerate's ``preload_module_classes``)
    instead of one linear layer after the other.

The benchmark runs all of them and takes the fastest. Files are read through the page cache, which
holds the whole model if the machine has the memory: that is to the peer's advantage. Tied weights
share one file, as a user would link them, and get one noise and one update. The process runs with
a fixed ``MALLOC_MMAP_THRESHOLD_``, so that glibc returns freed weights at once.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    OffloadedWeightsLoader,
    offload_weight,
    save_offload_index,
)
from safetensors import safe_open
from torch import nn

VARIANTS = ("update pass", "update on load", "update on load, blocks")


class Perturbed(OffloadedWeightsLoader):  # type: ignore[misc]
    """accelerate's map of offloaded weights; what is loaded is moved along the step's direction.

    Parameters
    ----------
    folder
        What :func:`offload` wrote.
    alias
        For each further name of a tied weight its first one; the file has one of them.
    """

    def __init__(self, folder: Path, alias: Mapping[str, str]) -> None:
        super().__init__(save_folder=folder)
        self.folder = folder
        self.alias = {a: b for a, b in alias.items() if b in self.index}
        self.alias |= {b: a for a, b in alias.items() if b not in self.index}
        self.seed, self.scale = 0, 0.0
        self.pending: dict[str, tuple[int, float]] = {}
        """For each weight, the seed and coefficient of an update that is still to be applied."""

    def __getitem__(self, key: str) -> torch.Tensor:
        name = self.alias.get(key, key)
        self.settle(name)
        value: torch.Tensor = super().__getitem__(name)
        return value.add_(noise(self.seed, name, value), alpha=self.scale)

    def settle(self, name: str) -> None:
        """Apply a weight's pending update, in its file."""
        found = self.pending.pop(name, None)
        if found is not None:
            seed, coefficient = found
            weight = self.mapped(name)
            weight.add_(noise(seed, name, weight), alpha=coefficient)

    def mapped(self, name: str) -> torch.Tensor:
        """Return a stored weight as a tensor on its file."""
        entry = self.index[name]
        dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
        path = str(self.folder / f"{name}.dat")
        return torch.from_file(path, shared=True, size=shape.numel(), dtype=dtype).view(shape)

    def names(self) -> list[str]:
        """List the distinct weights."""
        return list(self.index)


class Peer:
    """The loop: a model without weights, its offloaded files, and MeZO's step.

    Parameters
    ----------
    config
        Of a causal language model.
    folder
        What :func:`offload` wrote.
    variant
        One of `VARIANTS`.
    """

    def __init__(
        self, config: Any, folder: Path, variant: str, *, eps: float, lr: float, seed: int = 0
    ) -> None:
        from transformers import AutoModelForCausalLM

        with accelerate.init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.tie_weights()
        self.model = model.eval()
        self.eps, self.lr, self.seed, self.steps = eps, lr, seed, 0
        self.late = variant != "update pass"
        self.weights = Perturbed(folder, aliases(model))
        add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
        accelerate.big_modeling.attach_align_device_hook(
            model,
            execution_device=torch.device("cpu"),
            offload=True,
            weights_map=self.weights,
            preload_module_classes=list(model._no_split_modules or ())
            if variant.endswith("blocks")
            else None,
        )

    @torch.no_grad()
    def step(self, batch: Mapping[str, Any]) -> tuple[float, float]:
        """Run one step; return the losses at w + eps z and w - eps z."""
        weights, seed = self.weights, self.seed * 1_000_003 + self.steps
        weights.seed = seed
        losses = []
        for sign in (1, -1):
            weights.scale = sign * self.eps
            losses.append(float(self.model(**batch, use_cache=False).loss))
        self.finish()  # what no module has loaded
        plus, minus = losses
        gradient = (plus - minus) / (2 * self.eps)
        weights.pending = dict.fromkeys(weights.names(), (seed, -self.lr * gradient))
        self.steps += 1
        if not self.late:
            self.finish()
        return plus, minus

    @torch.no_grad()
    def finish(self) -> None:
        """Apply what is pending."""
        for name in self.weights.names():
            self.weights.settle(name)


def noise(seed: int, name: str, like: torch.Tensor) -> torch.Tensor:
    """Return the direction of one weight in one step."""
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    return torch.normal(0.0, 1.0, like.shape, generator=generator, dtype=like.dtype)


def aliases(model: nn.Module) -> dict[str, str]:
    """Return the first name of each further name of a tied weight."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def offload(checkpoint: Path, folder: Path) -> None:
    """Write the files of accelerate's disk offload from a checkpoint, one weight at a time."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                offload_weight(file.get_tensor(name), name, str(folder), index=index)
    save_offload_index(index, str(folder))
    os.sync()


def run(
    config: Any, folder: Path, batch: Mapping[str, Any], request: Any, *, eps: float, lr: float
) -> dict[str, Any]:
    """Take one step to warm up and the request's number of timed ones."""
    peer = Peer(config, folder, request["variant"], eps=eps, lr=lr)
    losses, seconds = [peer.step(batch)], []
    for _ in range(request["repeats"]):
        start = time.perf_counter()
        losses.append(peer.step(batch))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses}
