"""Small runs with a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import zograph

Batch = dict[str, torch.Tensor]
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "backend": "eager", "device": "cpu"}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*blocks).to(dtype)


def loss(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(m(x).float(), y)


def batch(i: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(5, 8, generator=generator).to(dtype)
    return {"x": x, "y": torch.randint(0, 4, (5,), generator=generator)}


def start(dtype: torch.dtype = torch.float32, **options: Any) -> zograph.ZOStep:
    return zograph.compile(model(dtype), loss_fn=loss, **OPTIONS | options)


def resume(path: Path | str, dtype: torch.dtype = torch.float32, **options: Any) -> zograph.ZOStep:
    return zograph.resume(model(dtype), path, loss_fn=loss, device="cpu", **options)


def take(step: zograph.ZOStep, steps: range, dtype: torch.dtype = torch.float32) -> list[float]:
    return [float(step(**batch(i, dtype))) for i in steps]


def values(step: zograph.ZOStep) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in step.state_dict().items()}
