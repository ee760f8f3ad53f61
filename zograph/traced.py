"""The function that is exported: a batch in, the loss and all outputs out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from zograph.deciding import Deciding
from zograph.errors import CaptureError, ZographError

LossFn = Callable[..., Any]


@dataclass(frozen=True)
class Evaluation:
    """What :meth:`ZOStep.evaluate` returns where the loss comes from a `loss_fn`."""

    loss: torch.Tensor | None
    output: Any
    """What the model returned (a list where `loss_fn` called it more than once)."""


pytree.register_dataclass(Evaluation)


@dataclass
class Returned:
    """What the model returned while it was traced (export resets attributes of modules)."""

    leaves: list[Any]
    spec: pytree.TreeSpec | None = None
    answers: tuple[torch.Tensor, ...] = ()
    """What was decided by, if the trace knew the batch's values."""


class ForwardFailed(Exception):
    """Takes the error of a forward past torch.export.

    For some errors that would print the graph so far, which may be thousands of lines.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Fixing(TorchFunctionMode):
    """Ends a trace at the first call behind the line that fixes a symbolic size of the batch.

    Such a graph serves no other size, so it is not worth tracing to the end: a loop over a
    sequence is as many calls as the stand-in is long.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        super().__init__()
        self.sizes: list[tuple[str, Any]] = [
            (f"dimension {dim} of batch{pytree.keystr(path)}", size)
            for path, leaf in pytree.tree_flatten_with_path(batch)[0]
            if isinstance(leaf, torch.Tensor)
            for dim, size in enumerate(leaf.shape)
            if type(size) is not int  # else a torch.SymInt, which annotations call an int
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for where, size in self.sizes:
            if size.node.expr.is_number:
                raise CaptureError(fixed(where))
        return func(*args, **(kwargs or {}))


def fixed(where: str) -> str:
    """Return the message about a size that cannot stay symbolic."""
    return f"export fixed {where}"


class Traced(nn.Module):
    """The function that is exported: batch in, (loss, flat outputs) out."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        want_loss: bool,
        values: tuple[Mapping[str, Any], Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """At the level ``values``, `values` are the true batch and the true buffers by name."""
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.values = values
        self.want_loss = want_loss
        self.returned = Returned([])

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        try:
            with self._mode(batch) as mode:
                loss, out = self._run(batch)
        except ZographError:
            raise
        except Exception as error:  # the user's forward may raise anything; it is chained
            raise ForwardFailed(error) from error
        if self.want_loss:
            loss = self._checked(loss)
        self.returned.leaves, self.returned.spec = pytree.tree_flatten(out)
        tensors = [leaf for leaf in self.returned.leaves if isinstance(leaf, torch.Tensor)]
        asked: list[torch.Tensor] = []
        if isinstance(mode, Deciding):
            asked, self.returned.answers = mode.asked, tuple(mode.answers)
        return (loss, *tensors, *asked) if self.want_loss else (*tensors, *asked)

    def _mode(self, batch: dict[str, Any]) -> Fixing | Deciding:
        if self.values is None:
            return Fixing(batch)
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        return Deciding((batch, buffers), self.values)

    def _run(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        if self.loss_fn is None:
            extra = {}
            if "use_cache" in inspect.signature(self.model.forward).parameters:
                extra = {} if "use_cache" in batch else {"use_cache": False}
            out = self.model(**batch, **extra)
            return _find_loss(out), out
        returned: list[Any] = []
        handle = self.model.register_forward_hook(lambda _m, _a, o: returned.append(o))
        try:
            loss = self.loss_fn(self.model, **batch)
        finally:
            handle.remove()
        return loss, Evaluation(loss, returned[0] if len(returned) == 1 else returned)

    def _checked(self, loss: Any) -> torch.Tensor:
        name = type(self.model).__name__
        if not isinstance(loss, torch.Tensor):
            what = "loss_fn returned" if self.loss_fn else f"{name} returned"
            raise CaptureError(
                f"{what} no loss (found {type(loss).__name__}). Put labels= into the batch if the "
                f"model computes its own loss, or pass loss_fn=lambda model, **batch: ... to "
                f"zograph.compile."
            )
        if loss.ndim or not loss.is_floating_point():
            raise CaptureError(
                f"the loss of {name} has shape {list(loss.shape)} and dtype {loss.dtype}; a "
                f"0-dimensional floating-point tensor is needed, for example loss.mean()."
            )
        return loss


def _find_loss(out: Any) -> Any:
    """Return the loss in what a model returned, by the conventions of transformers."""
    if isinstance(out, Mapping):
        return out.get("loss")
    if hasattr(out, "loss"):
        return out.loss
    if isinstance(out, (tuple, list)):
        return out[0] if out and isinstance(out[0], torch.Tensor) and not out[0].ndim else None
    return out if isinstance(out, torch.Tensor) and not out.ndim else None
