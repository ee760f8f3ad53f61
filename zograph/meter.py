"""What a piece of a graph costs: bytes alive at once, arithmetic, memory traffic, noise.

The cost is read off a run on fake tensors of the batch's own sizes: composite operators
decompose on the way, so that what they allocate inside is counted too. No data is touched.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from zograph.pool import size_of

Sizes = Mapping[sympy.Symbol, int]
"""A number for each symbol of a graph: the sizes of one batch."""


@dataclass(frozen=True)
class Cost:
    """What one run takes beyond its arguments."""

    peak_bytes: int = 0
    """Most bytes that are alive at once in tensors made inside, results included."""
    scratch_bytes: int = 0
    """Most bytes alive at once in perturbed copies of weights; part of `peak_bytes`."""
    scratch_at_peak: int = 0
    """What of `peak_bytes` are perturbed copies."""
    rest_bytes: int = 0
    """Most bytes alive at once in everything but perturbed copies."""
    result_bytes: int = 0
    """Bytes of the tensors that are returned."""
    work: tuple[tuple[str, int, int], ...] = ()
    """Per operator: dtype, floating-point operations, bytes read and written."""
    noise: int = 0
    """Elements perturbed: one for a pair of copies, 0.7 for a single one, rounded."""
    copies: frozenset[int] = frozenset()
    """The sizes of whole perturbed copies, in bytes."""


@dataclass
class _Owned:
    nbytes: int
    scratch: bool
    count: int = 0


@dataclass
class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes and work of everything that runs inside it, fake or real.

    A storage counts from the operator that makes it until the last tensor on it is gone.

    Parameters
    ----------
    given
        Tensors that exist already: views of them are not counted.
    """

    given: tuple[torch.Tensor, ...] = ()
    live: int = 0
    peak: int = 0
    scratch: int = 0
    scratch_peak: int = 0
    scratch_at_peak: int = 0
    rest_peak: int = 0
    noise: float = 0.0
    copies: set[int] = field(default_factory=set)
    work: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._given = {t.untyped_storage()._cdata for t in self.given}
        self._owned: dict[int, _Owned] = {}

    def most(self, copies: int) -> int:
        """Return the most bytes at once; with `copies`, as if these were kept all the time."""
        return copies + self.rest_peak if copies else self.peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, then count what it made and did."""
        out = func(*args, **(kwargs or {}))
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        fresh = [t for t in made if self._hold(t, func.namespace == "zograph")]
        if fresh:
            self._count_work(func, args, kwargs or {}, out, fresh)
        return out

    def _hold(self, tensor: torch.Tensor, scratch: bool) -> bool:
        """Count a tensor's storage; return whether it is new."""
        key = tensor.untyped_storage()._cdata
        if key in self._given:
            return False
        owned, new = self._owned.get(key), False
        if owned is None:
            new = True
            nbytes = storage_bytes(tensor)
            owned = self._owned[key] = _Owned(size_of(nbytes) if scratch else nbytes, scratch)
            self.live += owned.nbytes
            self.scratch += owned.nbytes if scratch else 0
            if self.live > self.peak:
                self.peak, self.scratch_at_peak = self.live, self.scratch
            self.scratch_peak = max(self.scratch_peak, self.scratch)
            self.rest_peak = max(self.rest_peak, self.live - self.scratch)
        owned.count += 1
        weakref.finalize(tensor, self._drop, key).atexit = False
        return new

    def _drop(self, key: int) -> None:
        owned = self._owned[key]
        owned.count -= 1
        if not owned.count:
            self.live -= owned.nbytes
            self.scratch -= owned.nbytes if owned.scratch else 0
            del self._owned[key]

    def _count_work(
        self, func: Any, args: Any, kwargs: Any, out: Any, fresh: list[torch.Tensor]
    ) -> None:
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func.namespace == "zograph":
            pair = isinstance(out, tuple)
            self.noise += (1.0 if pair else 0.7) * int(fresh[0].numel())
            if "rows" not in func._opname:
                self.copies.add(storage_bytes(fresh[0]))
            return
        counter = flop_registry.get(func._overloadpacket)
        flops = int(counter(*args, **kwargs, out_val=out)) if counter is not None else 0
        nbytes = sum(int(t.numel()) * t.element_size() for t in (*read, *fresh))
        self.work.append((str(fresh[0].dtype).removeprefix("torch."), flops, nbytes))


def storage_bytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor's storage; data-dependent sizes count by their hint."""
    nbytes = tensor.untyped_storage().nbytes()
    return nbytes if isinstance(nbytes, int) else int(nbytes.node.hint or 0)


def measure(body: fx.GraphModule, sizes: Sizes) -> Cost:
    """Measure one run of a stage body at the given sizes, without running it.

    Parameters
    ----------
    body
        A graph whose placeholders carry fake values.
    sizes
        A number for each symbol in them.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    nodes = [n for n in body.graph.nodes if n.op == "placeholder"]
    with mode:
        args = [concrete(n.meta["val"], sizes) for n in nodes]
    meter = Meter(tuple(a for a in args if isinstance(a, torch.Tensor)))
    with torch.no_grad(), mode, meter:
        out = body(*args)
    leaves = {
        t.untyped_storage()._cdata: storage_bytes(t)
        for t in pytree.tree_leaves(out)
        if isinstance(t, torch.Tensor)
    }
    result = sum(n for key, n in leaves.items() if key not in meter._given)
    work, copies = tuple(meter.work), frozenset(meter.copies)
    peaks = (meter.peak, meter.scratch_peak, meter.scratch_at_peak, meter.rest_peak)
    return Cost(*peaks, result, work, round(meter.noise), copies)


def concrete(val: Any, sizes: Sizes) -> Any:
    """Return a fake value with its symbols replaced by numbers.

    Call it under the fake-tensor mode that the result shall live in.
    """
    if isinstance(val, torch.Tensor):
        shape = [number(s, sizes) for s in val.shape]
        strides = [number(s, sizes) for s in val.stride()]
        return torch.empty_strided(shape, strides, dtype=val.dtype, device=val.device)
    if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return number(val, sizes)
    return val


def number(value: Any, sizes: Sizes) -> Any:
    """Return a symbolic number at the given sizes; an unknown one by its hint."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    expr = sympy.sympify(value.node.expr.xreplace(dict(sizes)))
    if expr.free_symbols:
        return value.node.hint or 0
    kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
    return kind(expr)


def value_bytes(val: Any, sizes: Sizes) -> int:
    """Return the bytes of a value's tensors at the given sizes."""
    total = 0
    for leaf in pytree.tree_leaves(val):
        if isinstance(leaf, torch.Tensor):
            count = 1
            for s in leaf.shape:
                count *= number(s, sizes)
            total += count * leaf.dtype.itemsize
    return total
