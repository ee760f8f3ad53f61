"""What is captured in a model's and a batch's place: the same, without values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_copy(
    model: nn.Module, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """Copy a module tree with fake parameters and buffers, in eval mode, caches off."""
    persistent = {id(b) for b in model.state_dict(keep_vars=True).values()}

    def fake(t: torch.Tensor, cast: bool) -> torch.Tensor:
        to = dtype if dtype is not None and cast and t.is_floating_point() else t.dtype
        return torch.empty_strided(t.shape, t.stride(), dtype=to, device=device)

    memo: dict[int, Any] = {}
    with mode:
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(fake(p, True), requires_grad=False)
        for b in model.buffers():
            memo[id(b)] = fake(b, id(b) in persistent)
    twin = copy.deepcopy(model, memo)
    twin.eval()
    for module in twin.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "use_cache", False) is True:
            config.use_cache = False
    return twin


@contextmanager
def castable(model: nn.Module) -> Iterator[None]:
    """Let a forward that is traced cast a module, as ``self.router.to(torch.float32)`` does.

    What `nn.Module.to` would replace for good the graph casts whenever it runs.
    """
    modules = list(model.modules())
    for module in modules:
        vars(module)["_apply"] = partial(_cast, module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["_apply"]


def _cast(
    module: nn.Module, cast: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    for part in module.modules() if recurse else (module,):
        for held in (part._parameters, part._buffers):
            for name, t in held.items():
                if t is not None and (new := cast(t)).dtype != t.dtype:
                    held[name] = new  # type: ignore[assignment]
    return module


def placed(leaf: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Move a stand-in to the device and, if it is floating, to the compute dtype."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.to(device, dtype if leaf.is_floating_point() else None)
