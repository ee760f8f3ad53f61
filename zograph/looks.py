"""What a call can see of fake values: calls that look alike give values that look alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

SYMBOLIC = (torch.SymBool, torch.SymInt, torch.SymFloat)


class Looks:
    """Describes calls up to the identity of the fake values in their arguments."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Any]] = {}  # the value is kept, so its id stays its own

    def of_call(self, target: Any, args: Any, kwargs: Any) -> Hashable | None:
        """Return what tells a call from others; None if an argument cannot be compared."""
        key = (target, self._freeze(args), self._freeze(kwargs))
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _freeze(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return self._look(arg.meta["val"])
        if isinstance(arg, (list, tuple)):
            return (type(arg).__name__, *map(self._freeze, arg))
        if isinstance(arg, dict):
            return tuple((k, self._freeze(arg[k])) for k in sorted(arg))
        if isinstance(arg, slice):
            return ("slice", *map(self._freeze, (arg.start, arg.stop, arg.step)))
        return (type(arg).__name__, arg)

    def _look(self, val: Any) -> Any:
        found = self._known.get(id(val))
        if found is None:
            found = self._known[id(val)] = (val, look(val))
        return found[1]


def look(val: Any) -> Any:
    """Return dtype, shape, strides and the like of a fake value, nested values too."""
    if isinstance(val, torch.Tensor):
        strided = val.layout == torch.strided
        place = (*val.stride(), val.storage_offset()) if strided else ()
        mode = id(val.fake_mode) if isinstance(val, FakeTensor) else 0
        sizes = (tuple(map(look, val.shape)), tuple(map(look, place)))
        return (mode, val.dtype, val.device, val.layout, *sizes)
    if isinstance(val, SYMBOLIC):
        return ("sym", id(val.node.shape_env), val.node.expr)
    if isinstance(val, (list, tuple)):
        return (type(val).__name__, *map(look, val))
    return (type(val).__name__, val)


class Results:
    """Values of calls by their look.

    A value whose sizes are known only when the program runs has symbols of its own, and is not
    kept.
    """

    def __init__(self) -> None:
        self._looks = Looks()
        self._known: dict[Hashable, Any] = {}

    def of(self, target: Any, args: Any, kwargs: Any, make: Callable[[], Any]) -> Any:
        """Return the value of a call, made where none that looks like it has been."""
        key = self._looks.of_call(target, args, kwargs)
        if key is None:
            return make()
        if key not in self._known:
            value = make()
            leaves = pytree.tree_leaves(value)
            sized = [x for x in leaves if isinstance(x, (torch.Tensor, *SYMBOLIC))]
            if any(free_unbacked_symbols(x) for x in sized):
                return value
            self._known[key] = value
        return self._known[key]


_RESULTS: ContextVar[Results | None] = ContextVar("results", default=None)


@contextmanager
def shared_results() -> Iterator[None]:
    """Inside, calls that look alike share one fake value; at the end all are dropped."""
    token = _RESULTS.set(Results())
    try:
        yield
    finally:
        _RESULTS.reset(token)


def value_of(target: Any, args: Any, kwargs: Any, make: Callable[[], Any]) -> Any:
    """Return the value of a call: what `make` makes, or made for one that looks like it."""
    results = _RESULTS.get()
    return make() if results is None else results.of(target, args, kwargs, make)
