"""The typed metadata that passes read and write, and the few ways to make a node.

A zograph graph is an ordinary :class:`torch.fx.GraphModule`. Each node carries

``node.meta["val"]``
    the fake value of the node: fake tensors and symbolic integers;
``node.meta["zograph"]``
    one :class:`NodeMeta`: what the node binds, its stage, branch and origin.

The graph module carries one :class:`GraphInfo` under ``gm.meta["zograph"]``. Passes read
these records and never the names of nodes.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from zograph.formats import Format

if TYPE_CHECKING:
    from zograph.layout import Layout
    from zograph.schedule import Schedule

KEY = "zograph"

Branch = Literal["+", "-"]


class Kind(StrEnum):
    """What a node stands for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    INPUT = "input"
    NOISE = "noise"
    """A runtime scalar or table of the zeroth-order step: seed, eps, keys, pending terms."""
    OP = "op"
    CELL = "cell"
    """A graph as a value: the cell of a fixed point."""
    STAGE = "stage"
    WEIGHT = "weight"
    """A weight as a stage sees it: fetched into a slot, or folded."""
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class NodeMeta:
    """What zograph knows of one node. Immutable: passes replace it with :func:`annotate`."""

    kind: Kind = Kind.OP
    name: str | None = None
    """Of a placeholder: the parameter's or buffer's name, the batch path, the noise input. Of what
    was measured of a fixed point: the fixed point's."""
    module: tuple[tuple[str, str], ...] = ()
    """Modules around the call, outermost first: (call path, qualified class name)."""
    stage: int | None = None
    branch: Branch | None = None
    hoisted: bool = False
    """The value depends on no trainable parameter: both branches share it."""
    mixing: str = ""
    """Of the seed: which steps share it, and how their iterates are mixed."""
    source: str = ""
    """Provenance: `pass<origin`, for example ``dual_perturbation<linear_3``."""


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """One tensor that `model.named_parameters()` lists, under its first name, or rows of one."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    decay: bool
    """Whether weight decay applies to it."""
    key: int
    """The noise key of the parameter's name: signed 64 bits."""
    of: str | None = None
    """Of a piece (:mod:`zograph.pieces`): the parameter that it holds rows of."""
    row: int = 0
    """Of a piece: the first of them."""
    format: Format | None = None
    """What it is stored and moved in; None: its own dtype."""

    @property
    def bytes(self) -> int:
        """Size of the base weight in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def parameter(self) -> str:
        """The name that the model has for it, or for what it is a piece of."""
        return self.name if self.of is None else self.of

    @property
    def first(self) -> int:
        """Index of its first element in the parameter: the noise goes on from there."""
        return self.row * math.prod(self.shape[1:])

    @property
    def by_rows(self) -> bool:
        """Whether rows of what is stored are rows of the weight, in every step."""
        return not self.trainable and self.format is None

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return its part of the parameter, in the parameter's memory."""
        if self.of is None:
            return parameter
        return parameter[self.row : self.row + self.shape[0]]

    @property
    def stored_bytes(self) -> int:
        """Size of the stored base in bytes: what transfers move."""
        if self.format is None:
            return self.bytes
        return self.format.nbytes(self.bytes // self.dtype.itemsize)


@dataclass(slots=True)
class GraphInfo:
    """What zograph knows of a whole graph."""

    params: dict[str, ParamInfo] = field(default_factory=dict)
    out_spec: pytree.TreeSpec | None = None
    """Structure of the model's own output; the flat leaves follow the loss in the output."""
    out_leaves: tuple[int | None, ...] = ()
    """For each leaf of the model's output, its index in the graph's output (None: constant)."""
    out_constants: tuple[Any, ...] = ()
    """The leaves that are no graph value, in order of the Nones above."""
    has_loss: bool = True
    """The first graph output is the loss (two of them after dual_perturbation)."""
    stages: dict[int, str] = field(default_factory=dict)
    """Stage number to the module path that it was cut at."""
    keys: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """For each stage, the parameters whose noise keys its table of keys holds, in order."""
    facts: frozenset[str] = frozenset()
    """What the passes run so far have provided (see :class:`zograph.passes.Contract`)."""
    layout: Layout | None = None
    """Where weights stand, once the graph is scheduled; None where all are resident."""
    schedule: Schedule | None = None
    """When tasks run, once the graph is scheduled; None where all weights are resident."""


def meta(node: fx.Node) -> NodeMeta:
    """Return the node's metadata (a default record where it has none yet)."""
    record = node.meta.get(KEY)
    return record if isinstance(record, NodeMeta) else NodeMeta()


def annotate(node: fx.Node, **changes: Any) -> None:
    """Replace fields of the node's metadata."""
    node.meta[KEY] = replace(meta(node), **changes)


def info(gm: fx.GraphModule) -> GraphInfo:
    """Return the graph's record, creating an empty one where there is none."""
    record = gm.meta.setdefault(KEY, GraphInfo())
    assert isinstance(record, GraphInfo)
    return record


def module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a module of a graph, whose Python code is written when it is first called.

    Passes rewrite a graph many times, and most are planned with and never called.
    """
    return _LazyGraphModule(root, graph)


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph that has no stage bodies yet; fake values are shared, records are not."""
    twin = module(gm, copy.deepcopy(gm.graph))
    record = info(gm)
    twin.meta[KEY] = replace(
        record, params=dict(record.params), stages=dict(record.stages), keys=dict(record.keys)
    )
    return twin


def value(arg: Any) -> Any:
    """Map nodes to their fake values, through nested arguments."""
    return fx.node.map_arg(arg, lambda n: n.meta["val"])


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """Return the fake-tensor mode that the graph's values live in."""
    for node in gm.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch._subclasses.FakeTensor):
                return leaf.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def evaluate(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run `target` on the fake values of its arguments; no data is touched."""
    fargs, fkwargs = value(tuple(args)), value(dict(kwargs))
    leaves = pytree.tree_leaves((fargs, fkwargs))
    modes = [x.fake_mode for x in leaves if isinstance(x, torch._subclasses.FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode, enable_python_dispatcher():
        return target(*fargs, **fkwargs)


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    source: str,
    like: fx.Node | None = None,
    **fields: Any,
) -> fx.Node:
    """Insert a call at the graph's insertion point, with value, metadata and provenance.

    Parameters
    ----------
    source
        Provenance of the new node.
    like
        Node whose metadata the new one starts from.
    **fields
        Fields of :class:`NodeMeta` to set.
    """
    node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = evaluate(target, args, kwargs or {})
    node.meta[KEY] = replace(meta(like) if like is not None else NodeMeta(), source=source)
    annotate(node, kind=Kind.OP, **fields)
    return node


def getitem(graph: fx.Graph, node: fx.Node, index: int, **fields: Any) -> fx.Node:
    """Insert ``node[index]`` with the metadata of `node`."""
    return call(
        graph, operator.getitem, (node, index), source=meta(node).source, like=node, **fields
    )


def placeholder(
    gm: fx.GraphModule, name: str, val: Any, *, kind: Kind, source: str, **fields: Any
) -> fx.Node:
    """Append a placeholder after the existing ones."""
    last = None
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            break
        last = node
    if last is None:
        point = gm.graph.inserting_before(next(iter(gm.graph.nodes)))
    else:
        point = gm.graph.inserting_after(last)
    with point:
        node = gm.graph.placeholder(name.replace(".", "_"))
    node.meta["val"] = val
    node.meta[KEY] = NodeMeta(kind=kind, name=name, source=source, **fields)
    return node


def placeholders(gm: fx.GraphModule, *kinds: Kind) -> list[fx.Node]:
    """Return the placeholders of the given kinds (all kinds if none is given), in order."""
    found = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [n for n in found if not kinds or meta(n).kind in kinds]


def output(gm: fx.GraphModule) -> fx.Node:
    """Return the graph's only output node."""
    return gm.graph.output_node()


def op_name(node: fx.Node) -> str:
    """Short stable name of what a node calls: ``aten.linear``, ``zograph.materialize``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        packet = f"{target.namespace}.{target._opname}"
        overload = target._overloadname
        return packet if overload == "default" else f"{packet}.{overload}"
    if isinstance(target, str):
        return target
    return str(getattr(target, "__name__", target))


def depends_on(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the roots and all nodes that use them, directly or not."""
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return seen


def is_shape(node: fx.Node) -> bool:
    """Whether the node's value is an integer, float or bool scalar and not a tensor."""
    scalars = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(node.meta.get("val"), scalars)


def symbols(val: Any) -> set[Any]:
    """Return the symbols in the sizes and strides of a value (nested values too)."""
    found: set[Any] = set()
    for leaf in pytree.tree_leaves(val):
        if isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat)):
            found |= set(free_symbols(leaf))
    return found
