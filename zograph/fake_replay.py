"""Fake replay: whether the value of a node follows from those of its arguments.

Costs are kept down twice. A node with the target, arguments and value objects of an earlier
check is skipped; a call whose arguments only look like those of an earlier one (same dtypes,
shapes and strides, as in the next of twelve equal layers) reuses that call's result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    ShapeEnv,
    free_unbacked_symbols,
    statically_known_true,
)
from torch.utils import _pytree as pytree

from zograph.looks import SYMBOLIC, Looks

SCALARS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)


class Replay:
    """Replays calls on fake values and remembers them."""

    def __init__(self) -> None:
        self._seen: dict[fx.Node, tuple[Any, ...]] = {}
        self._looks = Looks()
        self._results: dict[Any, Any] = {}
        self.replayed = 0
        """Calls that were really run, over the life of the record."""

    def known(self, node: fx.Node) -> bool:
        """Whether the node is as it was at its last :meth:`remember`."""
        now, then = self._state(node), self._seen.get(node)
        return then is not None and len(now) == len(then) and all(map(_is, now, then))

    def remember(self, node: fx.Node) -> None:
        """Keep the node as one that need not be replayed."""
        self._seen[node] = self._state(node)

    def result(self, node: fx.Node) -> Any:
        """Return what the node's target gives for the fake values of its arguments.

        Raises
        ------
        Exception
            Whatever the target raises.
        """
        assert callable(node.target)
        key = self._looks.of_call(node.target, node.args, node.kwargs) or node
        if key not in self._results:
            self.replayed += 1
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            self._results[key] = run_fake(node.target, args, kwargs)
        return self._results[key]

    @staticmethod
    def _state(node: fx.Node) -> tuple[Any, ...]:
        vals = (n.meta.get("val") for n in node.all_input_nodes)
        return (node.target, node.args, node.kwargs, node.meta.get("val"), *vals)


def run_fake(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function on fake values; record no guards and keep no fresh symbols."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        mode, env = mode_and_env((args, kwargs))
        if env is not None:
            stack.enter_context(env.suppress_guards())
            stack.enter_context(env.ignore_fresh_unbacked_symbols())
        stack.enter_context(mode or FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(enable_python_dispatcher())  # C++ composites may refuse symbolic sizes
        return target(*args, **kwargs)


def mode_and_env(val: Any) -> tuple[FakeTensorMode | None, ShapeEnv | None]:
    """Return the fake mode and the shape environment that a nested value lives in."""
    env: ShapeEnv | None = None
    for leaf in pytree.tree_leaves(val):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode, leaf.fake_mode.shape_env
        if isinstance(leaf, SYMBOLIC):
            env = leaf.node.shape_env
    return None, env


def difference(expected: Any, found: Any) -> str | None:
    """Return in what two fake values differ, None if they agree.

    Sizes agree if they are equal for every value of their symbols; sizes that are unknown
    until the program runs are not compared, nor are strides of dimensions of size 1.
    """
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(expected) != len(found):
            return "structure"
        return next((d for d in map(difference, expected, found) if d is not None), None)
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor):
            return "type"
        return next(_tensor_differences(expected, found), None)
    if isinstance(expected, SCALARS):
        if not isinstance(found, SCALARS):
            return "type"
        return None if same_size(expected, found) else "value"
    return None if type(expected) is type(found) else "type"


def _tensor_differences(expected: torch.Tensor, found: torch.Tensor) -> Iterator[str]:
    if expected.dtype != found.dtype:
        yield "dtype"
    if expected.device != found.device:
        yield "device"
    if expected.ndim != found.ndim or not all(map(same_size, expected.shape, found.shape)):
        yield "shape"
    elif expected.layout == found.layout == torch.strided:
        both = zip(expected.shape, expected.stride(), found.stride(), strict=True)
        if not all(same_size(a, b) for size, a, b in both if not _is_one(size)):
            yield "stride"


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for all symbols; unbacked ones are taken as equal."""
    symbolic_a, symbolic_b = isinstance(a, SYMBOLIC), isinstance(b, SYMBOLIC)
    if not symbolic_a and not symbolic_b:
        return bool(a == b)
    if symbolic_a and symbolic_b and a.node.expr == b.node.expr:
        return True
    if any(free_unbacked_symbols(x) for x in (a, b) if isinstance(x, SYMBOLIC)):
        return True
    return statically_known_true(a == b)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _is(a: Any, b: Any) -> bool:
    return a is b
