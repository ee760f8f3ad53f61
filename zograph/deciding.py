"""Decisions by values of the batch: made while a model is traced, guards of its graph afterwards.

A forward may branch on its masks, read sizes of images from a tensor, or a stride from a buffer.
What follows from the batch and the buffers is computed beside the trace, from their values, so that
such a line gets its answer. The tensor that was asked becomes a result of the graph, which
:class:`Decisions` computes anew for every later batch: the graph serves those that give the same
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from zograph.counting import REWRITTEN, SIZED, SIZED_AFTER_FIRST, sized
from zograph.ir import Kind, clone, meta, output, placeholders

ASKING = {
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__contains__,
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.equal,
    torch.equal,
    Tensor.allclose,
    torch.allclose,
    Tensor.is_nonzero,
    torch.is_nonzero,
}
"""Functions whose result is a Python value that depends on the values of tensors."""

RANDOM = ("rand", "normal", "bernoulli", "multinomial", "dropout", "exponential", "uniform")


class Deciding(TorchFunctionMode):
    """Follows a trace with the values of what depends on the batch and the buffers alone.

    Parameters
    ----------
    traced, batch
        The trace's fake batch and buffers and the true ones; of the same sizes.

    Attributes
    ----------
    asked
        Tensors of the trace that something was decided by, as they were then.
    answers
        Their values.
    """

    def __init__(self, traced: Any, batch: Any) -> None:
        super().__init__()
        self.asked: list[Tensor] = []
        self.answers: list[Tensor] = []
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors of the trace with their values, by id; they are kept, so an id stays its own."""
        leaves = zip(pytree.tree_leaves(traced), pytree.tree_leaves(batch), strict=True)
        with outside():
            for fake, true in leaves:
                if isinstance(true, Tensor) and not true.is_meta:
                    self._learn(fake, true.detach().to("cpu", fake.dtype, copy=True))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rewrite = REWRITTEN.get(func)
        if rewrite is not None:
            with self:
                result = rewrite(self.knows, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in SIZED or func in SIZED_AFTER_FIRST:
            kept = int(func in SIZED_AFTER_FIRST)
            with self:
                args = (*args[:kept], *sized(self.knows, args[kept:]))
                kwargs = sized(self.knows, kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            with self:
                args = (args[0], self._listed(args[1]), *args[2:])
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not all(map(self.knows, tensors)) or is_random(func):
            result = func(*args, **kwargs)
            self._forget(func, args, kwargs)
            return result
        if func in ASKING:
            for tensor in tensors:
                self._ask(tensor, self._known[id(tensor)][1])
            return self._true(func, args, kwargs)
        result = func(*args, **kwargs)
        if writes(func) or any(isinstance(x, Tensor) for x in pytree.tree_leaves(result)):
            pytree.tree_map(self._learn, result, self._true(func, args, kwargs))
        return result

    def _true(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function on the values of tensors, outside of the trace."""

        def value(leaf: Any) -> Any:
            return self._known[id(leaf)][1] if isinstance(leaf, Tensor) else on_cpu(leaf)

        args, kwargs = pytree.tree_map(value, (args, kwargs))
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = "cpu"
        with outside():
            return func(*args, **kwargs)

    def knows(self, tensor: Any) -> bool:
        """Whether the values of a tensor follow from the batch and the buffers."""
        return isinstance(tensor, Tensor) and id(tensor) in self._known

    def _learn(self, fake: Any, value: Any) -> None:
        if isinstance(fake, Tensor):
            self._known[id(fake)] = (fake, value)

    def _ask(self, tensor: Tensor, value: Tensor) -> None:
        self.asked.append(tensor.clone())
        with outside():
            self.answers.append(value.clone())

    def _forget(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Forget what shares memory with a tensor that something unknown was written into."""
        written = [kwargs.get("out"), *(args[:1] if writes(func) else ())]
        for memory in [self._memory(t) for t in written if self.knows(t)]:
            kept = {k: pair for k, pair in self._known.items() if self._memory(pair[0]) != memory}
            self._known = kept

    def _memory(self, tensor: Any) -> int:
        return self._known[id(tensor)][1].untyped_storage().data_ptr()

    def _listed(self, index: Any) -> Any:
        """Replace known masks in an index by the places where they are true, which are counted.

        Known bounds of slices are asked.
        """

        def places(part: Any) -> tuple[Any, ...]:
            if isinstance(part, slice):
                return (slice(*sized(self.knows, (part.start, part.stop, part.step))),)
            if isinstance(part, (list, tuple)) and any(isinstance(x, Tensor) for x in part):
                return (torch.tensor(part),)
            mask = self.knows(part) and part.dtype == torch.bool and part.ndim
            return part.nonzero(as_tuple=True) if mask else (part,)

        parts = index if isinstance(index, tuple) else (index,)
        return tuple(x for part in parts for x in places(part))


@contextmanager
def outside() -> Iterator[None]:
    """Compute with true tensors in the midst of a trace."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def on_cpu(leaf: Any) -> Any:
    """Replace a device."""
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def writes(func: Any) -> bool:
    """Whether a function may write into its first argument."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or name.startswith("__i")


def is_random(func: Any) -> bool:
    """Whether a function draws numbers."""
    name = getattr(func, "__name__", "")
    return name.startswith(RANDOM) and name != "normalize"


@dataclass(frozen=True)
class Decisions:
    """The answers that a graph was traced with, and a graph that finds those of a batch."""

    gm: fx.GraphModule
    """From batch and buffers to the tensors that were asked, on the CPU."""
    answers: tuple[Tensor, ...]
    held: Mapping[str, Tensor]
    """Constants and buffers by name."""

    def hold(self, leaves: Mapping[str, Any]) -> bool:
        """Whether a batch gives the same answers; `leaves` are its leaves by path."""
        known = {**self.held, **leaves}
        given = [known[str(meta(n).name)].cpu() for n in placeholders(self.gm)]
        try:
            with torch.no_grad():
                found = self.gm(*given)
        except (RuntimeError, IndexError):  # what follows from another answer may not be computable
            return False
        return all(torch.equal(f, a) for f, a in zip(found, self.answers, strict=True))


def split_decisions(
    gm: fx.GraphModule, answers: Sequence[Tensor], held: Mapping[str, Tensor]
) -> Decisions | None:
    """Take the last results off a graph, one for each answer, into a graph of their own."""
    if not answers:
        return None
    out = output(gm)
    results = tuple(out.args[0])  # type: ignore[arg-type]
    asking = clone(gm)
    output(asking).args = (tuple(output(asking).args[0])[-len(answers) :],)  # type: ignore[arg-type]
    out.args = (results[: -len(answers)],)
    for node in reversed(asking.graph.nodes):  # assertions too: another batch may not keep them
        if node.op != "output" and not node.users:
            asking.graph.erase_node(node)
        else:
            node.args, node.kwargs = pytree.tree_map(on_cpu, (node.args, node.kwargs))
    kinds = {meta(n).kind for n in placeholders(asking)}
    assert kinds <= {Kind.INPUT, Kind.BUFFER, Kind.CONSTANT}, "weights were asked"
    asking.recompile()
    return Decisions(asking, tuple(answers), held)
