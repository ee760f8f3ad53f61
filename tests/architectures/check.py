"""One model type: found, built, trained for a few steps in every way, compared."""

from __future__ import annotations

import copy
import resource
import traceback
import warnings
from itertools import product
from math import isfinite
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

import zograph
from tests.architectures.batches import NotBuilt, batches, build, model_class, own_loss
from tests.architectures.shrink import shrunken
from tests.reference import Reference
from zograph.errors import CaptureError, PassError

STEPS = 2
BYTES = 10 << 30
EPS, LR = 1e-3, 1e-5


def found(kind: Any) -> tuple[nn.Module, dict[str, Any], Any]:
    """Return a model, a batch that it takes, and a loss function if it has no loss of its own.

    Raises
    ------
    NotBuilt
        With what the first try said.
    """
    cls = getattr(transformers, str(model_class(kind)), None)
    if cls is None:
        raise NotBuilt(f"transformers has no {model_class(kind)}")
    said: list[str] = []
    for config in shrunken(kind):
        try:
            model = build(cls, config)
        except Exception as error:  # noqa: BLE001  any failure: the next one
            said.append(first_line(error))
            continue
        tries = list(batches(model))
        if not tries:
            said.append(f"no batch for {cls.__name__}.forward")
        for batch, loss_fn in product(tries, (None, own_loss)):
            try:
                loss = Reference(model, loss_fn, eps=EPS).loss(batch)
            except Exception as error:  # noqa: BLE001
                said.append(first_line(error))
                continue
            if isfinite(loss):
                return model, batch, loss_fn
            said.append("the loss is not finite")
    raise NotBuilt(said[0] if said else "no valid small configuration")


def run(
    model: nn.Module, batch: dict[str, Any], loss_fn: Any, lr: float, memory: Any
) -> tuple[list[Any], dict[str, torch.Tensor], Any]:
    """Take steps; return their records, the weights behind them and the bytes of a plan."""
    step = zograph.compile(
        model, loss_fn=loss_fn, lr=lr, eps=EPS, backend="eager", device="cpu", memory=memory
    )
    records = []
    for _ in range(STEPS):
        step(**batch)
        records.append(step.last)
    step.synchronize()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return records, weights, step.plan.device_bytes if memory else None


def check(name: str) -> dict[str, Any]:
    """Return what was found of one model type.

    ``outcome`` is "equal", "unequal", "no graph", "not built" or "failed"; ``said`` what an error
    says; ``error`` the largest relative difference of a loss from the eager loop's.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kind = CONFIG_MAPPING[name]
    result: dict[str, Any] = {"model_type": name}
    try:
        model, batch, loss_fn = found(kind)
        result |= {"class": type(model).__name__, "batch": sorted(batch), "own_loss": bool(loss_fn)}
        result["parameters"] = sum(p.numel() for p in model.parameters())
        return result | compared(model, batch, loss_fn)
    except NotBuilt as error:
        return result | {"outcome": "not built", "said": str(error)}
    except (CaptureError, PassError) as error:
        return result | {"outcome": "no graph", "said": str(error)[:2000]}
    except Exception as error:  # noqa: BLE001  a defect, to be reported
        traceback.print_exc()
        return result | {"outcome": "failed", "said": first_line(error)}


def compared(model: nn.Module, batch: dict[str, Any], loss_fn: Any) -> dict[str, Any]:
    """Compare a resident run with the eager loop, and one at the least budget with it."""
    probe = Reference(copy.deepcopy(model), loss_fn, eps=EPS)
    streamed = copy.deepcopy(model)
    lr = LR / max(1.0, abs(probe.loss(batch)))  # a large loss takes large steps
    records, weights, _ = run(model, batch, loss_fn, lr, None)
    eager = probe.losses(batch, records[0].seed)
    ours = (records[0].loss_plus, records[0].loss_minus)
    error = max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, eager, strict=True))
    others, moved, budget = run(streamed, batch, loss_fn, lr, "minimum")
    same = [(r.loss_plus, r.loss_minus) for r in records] == [
        (r.loss_plus, r.loss_minus) for r in others
    ] and all(torch.equal(w, moved[n]) for n, w in weights.items())
    return {
        "outcome": "equal" if same and error <= 1e-5 else "unequal",
        "streamed": same,
        "error": error,
        "budget": budget / sum(w.nbytes for w in weights.values()),
    }


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def work(name: str, sender: Connection) -> None:
    """Send what :func:`check` finds, within some memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    sender.send(check(name))
