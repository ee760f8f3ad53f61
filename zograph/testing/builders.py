"""Small graphs for tests of passes: by hand, or from a plain function."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from zograph import ir
from zograph.capture import capture
from zograph.errors import CaptureError
from zograph.fixed_points.entering import cell_node
from zograph.ir import KEY, GraphInfo, Kind, NodeMeta, ParamInfo
from zograph.noise import parameter_key
from zograph.signature import signatures

Size = int | str
"""A size, or the name of a symbolic one: equal names are equal sizes."""

HINTS = (5, 7, 11, 13, 17, 19, 23, 29)
"""What symbolic sizes stand for in :func:`random_inputs`, in order of their first use."""


class GraphBuilder:
    """Builds a graph node by node, each with its value and metadata.

    Examples
    --------
    >>> import torch
    >>> b = GraphBuilder()
    >>> x, w = b.input("x", (2, 3)), b.param("fc.weight", (4, 3))
    >>> y = b.call(torch.ops.aten.linear.default, x, w, stage=1)
    >>> gm = b.build(b.call(torch.ops.aten.sum.default, y, stage=1))
    """

    def __init__(self, *, has_loss: bool = True) -> None:
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._info = GraphInfo(has_loss=has_loss)
        self._sizes: dict[str, torch.SymInt] = {}

    def param(
        self,
        name: str,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        trainable: bool = True,
    ) -> fx.Node:
        """Add a parameter; weight decay applies to it as in a model."""
        decay = len(shape) > 1 and not name.endswith("bias")
        record = ParamInfo(name, tuple(shape), dtype, trainable, decay, parameter_key(name))
        self._info.params[name] = record
        return self._placeholder(name, shape, dtype, Kind.PARAMETER)

    def input(
        self, name: str, shape: Sequence[Size], dtype: torch.dtype = torch.float32
    ) -> fx.Node:
        """Add an input of the batch; a size may be a name: ``("batch", 3)``."""
        return self._placeholder(name, shape, dtype, Kind.INPUT)

    def buffer(
        self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> fx.Node:
        """Add a buffer."""
        return self._placeholder(name, shape, dtype, Kind.BUFFER)

    def call(self, target: Callable[..., Any], *args: Any, **fields: Any) -> fx.Node:
        """Add a call; `fields` are those of :class:`zograph.ir.NodeMeta`, or ``kwargs={...}``."""
        kwargs = fields.pop("kwargs", {})
        with self._mode:
            return ir.call(self._graph, target, args, kwargs, source="builder", **fields)

    def inner(self) -> GraphBuilder:
        """Return a builder for a cell of this graph: its inputs are called ``z0``, ``c0``, ..."""
        builder = GraphBuilder(has_loss=False)
        builder._mode, builder._sizes = self._mode, self._sizes
        return builder

    def cell(self, cell: fx.GraphModule) -> fx.Node:
        """Add a node that stands for a graph made with :meth:`inner`."""
        name = f"cell_{len(list(self._root.children()))}"
        return cell_node(self._root, self._graph, name, cell, source="builder")

    def build(self, *outputs: fx.Node, facts: Sequence[str] = ()) -> fx.GraphModule:
        """Finish the graph; the first output is the loss."""
        out = self._graph.output(tuple(outputs))
        out.meta[KEY] = NodeMeta(Kind.OUTPUT, source="builder")
        gm = fx.GraphModule(self._root, self._graph)
        gm.meta[KEY] = self._info
        self._info.facts = frozenset(facts)
        return gm

    def _placeholder(
        self, name: str, shape: Sequence[Size], dtype: torch.dtype, kind: Kind
    ) -> fx.Node:
        node = self._graph.placeholder(re.sub(r"\W+", "_", name).strip("_"))
        sizes: list[Any] = [self._symbolic(s) if isinstance(s, str) else s for s in shape]
        with self._mode:
            node.meta["val"] = torch.empty(sizes, dtype=dtype)
        node.meta[KEY] = NodeMeta(kind, name, source="builder")
        return node

    def _symbolic(self, name: str) -> torch.SymInt:
        if name not in self._sizes:
            env, source = self._mode.shape_env, ConstantSource(name)
            assert env is not None
            hint = HINTS[len(self._sizes)]
            symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            size = env.create_symintnode(symbol, hint=hint, source=source)
            assert isinstance(size, torch.SymInt)
            self._sizes[name] = size
        return self._sizes[name]


def capture_function(
    model: nn.Module, loss_fn: Callable[..., Any] | None = None, **batch: Any
) -> fx.GraphModule:
    """Return the graph that :func:`zograph.compile` would hand to its first pass.

    Raises
    ------
    CaptureError
        If the model cannot be captured at any level.
    """
    failure: CaptureError | None = None
    for signature in signatures(batch):
        try:
            return capture(model, batch, signature, loss_fn=loss_fn).gm
        except CaptureError as error:
            failure = error
    assert failure is not None
    raise failure


def random_inputs(gm: fx.GraphModule, seed: int = 0) -> list[Any]:
    """Return real tensors for all placeholders of a graph, in order.

    Parameters
    ----------
    gm
        Any graph with metadata; symbolic sizes take their hints.
    seed
        Of the random values: floats are normal, integers 0 or 1.
    """
    generator = torch.Generator().manual_seed(seed)
    special = {"seed": seed, "eps": 1e-2}

    def real(node: fx.Node) -> Any:
        val, record = node.meta["val"], ir.meta(node)
        if not isinstance(val, torch.Tensor):
            return hint(val)
        shape = [hint(s) for s in val.shape]
        if record.kind == Kind.NOISE and record.name in special:
            return torch.tensor(special[record.name], dtype=val.dtype)
        if val.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(val.dtype)
        return torch.randint(0, 2, shape, generator=generator).to(val.dtype)

    return [real(n) for n in ir.placeholders(gm)]


def hint(size: Any) -> Any:
    """Return the number that a symbolic size stands for, without fixing the size to it."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def leaves(result: Any) -> list[torch.Tensor]:
    """Return the tensors in a graph's result."""
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
