"""A cell as a graph: what `fixed_point` does while zograph captures a model.

The cell is a Python function that closes over parameters, inputs and intermediate values. One run
on the fake values of the capture tells which tensors it closes over; a trace with those as inputs
gives its graph. In the model's own trace stands one call of `zograph::fixed_point`, which takes the
start, the tensors closed over, and the number of the graph in the list of the capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.utils import reenter_make_fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zograph.errors import CaptureError
from zograph.fixed_points.functional import make_functional
from zograph.fixed_points.options import SolveOptions
from zograph.fixed_points.progress import FixedPointInfo
from zograph.fixed_points.state import Cell, State, wide


@dataclass(frozen=True)
class TracedCell:
    """The graph of a cell, (state, closed over) to (state), and how it is solved."""

    graph: fx.GraphModule
    options: SolveOptions


_cells: ContextVar[list[TracedCell] | None] = ContextVar("cells", default=None)


@contextlib.contextmanager
def tracing_cells() -> Iterator[list[TracedCell]]:
    """Let `fixed_point` put nodes into the trace under way, and their cells into a list."""
    cells: list[TracedCell] = []
    token = _cells.set(cells)
    try:
        yield cells
    finally:
        _cells.reset(token)


def is_tracing() -> bool:
    """Whether a model is being captured."""
    return _cells.get() is not None


def trace(cell: Cell, start: State, options: SolveOptions) -> tuple[State, FixedPointInfo]:
    """Put one call into the trace under way; return its fake results."""
    cells = _cells.get()
    assert cells is not None
    with disable_proxy_modes_tracing():
        closed = closed_over(cell, start)
        graph = trace_cell(cell, start, closed)
    used = drop_unused(graph, len(start))
    cells.append(TracedCell(graph, options))
    call = torch.ops.zograph.fixed_point
    found = call(list(start), [closed[i] for i in used], len(cells) - 1)
    return tuple(found[: len(start)]), FixedPointInfo(*found[len(start) :])


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the tensors that operators read and that none of them has made."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.closed: dict[int, Tensor] = {}
        self.known = {id(x): x for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and id(leaf) not in self.known:
                self.closed.setdefault(id(leaf), leaf)
        out = func(*args, **(kwargs or {}))
        self.known |= {id(x): x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)}
        return out


def closed_over(cell: Cell, start: State) -> list[Tensor]:
    """Return the tensors that a cell reads beside its state, in the order of their first use."""
    reads = _Reads(start)
    with reads:
        out = cell(start)
    # A value that is returned as it is has been read by no operator.
    for leaf in out:
        if id(leaf) not in reads.known:
            reads.closed.setdefault(id(leaf), leaf)
    return list(reads.closed.values())


def trace_cell(cell: Cell, start: State, closed: Sequence[Tensor]) -> fx.GraphModule:
    """Return the cell's graph, without writes; composite operators are kept.

    Raises
    ------
    CaptureError
        If the cell writes to what is not its own, or holds a fixed point.
    """
    count = len(start)

    def flat(*tensors: Tensor) -> State:
        return cell(tensors[:count])

    graph = reenter_make_fx(flat)(*start, *closed)  # type: ignore[no-untyped-call]
    assert isinstance(graph, fx.GraphModule)
    if any(n.target is torch.ops.zograph.fixed_point.default for n in graph.graph.nodes):
        raise CaptureError(
            "the cell of a fixed point solves a fixed point itself, which cannot be captured. Put "
            "both into one state: zograph.fixed_point takes a tuple of tensors."
        )
    make_functional(graph.graph)
    graph.graph.eliminate_dead_code()
    return graph


def drop_unused(graph: fx.GraphModule, count: int) -> list[int]:
    """Erase inputs behind the first `count` that have no use; return the places of the others."""
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"][count:]
    used = [i for i, n in enumerate(inputs) if n.users]
    for node in inputs:
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return used


def fake_results(state: Sequence[Tensor]) -> list[Tensor]:
    """Return empty tensors like a solve's results: contiguous states, then the info."""
    batch, device = state[0].shape[0], state[0].device
    dtypes = (torch.int64, wide(state[0].dtype), torch.bool)
    info = [torch.empty(batch, dtype=dtype, device=device) for dtype in dtypes]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in state] + info


def _fake(state: list[Tensor], closed: list[Tensor], cell: int) -> list[Tensor]:
    return fake_results(state)


_library = torch.library.Library("zograph", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "fixed_point(Tensor[] state, Tensor[] closed, int cell) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("zograph::fixed_point", _fake, lib=_library)
