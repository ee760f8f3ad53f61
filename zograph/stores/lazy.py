"""Tensors that are recipes: what to read of a checkpoint, and what to do with it.

Loaders rename, split, stack, transpose and cast a checkpoint's tensors on their way into a
model. Given lazy tensors in their place, a loader's own code writes down, op by op, how each
parameter comes about, and no data is touched. `fill` then carries out one recipe: pieces that
are only moved are read straight to their place, at most `checkpoint.CHUNK` bytes on the way;
anything else is computed from whole tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch.utils import _pytree as pytree

from zograph.errors import StoreError
from zograph.stores.checkpoint import CHUNK
from zograph.stores.header import Entry

aten = torch.ops.aten
SAME_ORDER = {aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default}
SAME_ORDER |= {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.reshape.default}
SMALLEST = 4096
"""A stored tensor that would be read in ranges of fewer bytes is read as a whole."""
COPIES = {aten.clone.default, aten._to_copy.default, aten.contiguous.default}
"""Ops whose output has its input's shape and values, perhaps in another dtype."""


class Readable(Protocol):
    """Stored tensors by name: a checkpoint, or a model that is being saved."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is stored."""
        ...

    def read(self, name: str, out: torch.Tensor, first: int = 0) -> int:
        """Fill `out` with consecutive elements from element `first` on; return bytes read."""
        ...


@dataclass(eq=False)
class Recipe:
    """How one lazy tensor comes about."""

    meta: torch.Tensor
    """On the meta device; views share their base's storage."""
    checkpoint: Readable
    leaf: str | None = None
    """The stored tensor that this is, or is a view of."""
    op: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    index: int | None = None
    """Which of the op's outputs this is; None if it has one."""


class LazyTensor(torch.Tensor):
    """A CPU tensor without data. Ops on it give lazy tensors; only `torch.equal` reads."""

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe: Recipe) -> LazyTensor:
        """Wrap a recipe."""
        meta = recipe.meta
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
        )
        made.recipe = recipe
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({self.dtype}{list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = pytree.tree_leaves((args, kwargs))
        first = next(x for x in leaves if isinstance(x, LazyTensor)).recipe
        if func is aten.detach.default or func is aten.alias.default:
            return cls(first)
        if func is aten.equal.default:
            return equal(args[0], args[1])
        if func._schema.is_mutable or func is aten._local_scalar_dense.default:
            raise StoreError(
                f"loading this model applies {func} to weights that stay on the disk. Load it with "
                f"transformers, save_pretrained it into another folder, and load that one."
            )
        if kwargs.get("device") not in (None, torch.device("cpu")):
            raise StoreError(f"a model on the disk cannot be loaded onto {kwargs['device']}.")
        on_meta = dict(kwargs, device=torch.device("meta")) if kwargs.get("device") else kwargs
        fargs, fkwargs = pytree.tree_map(_to_meta, (args, on_meta))
        out = func(*fargs, **fkwargs)
        if isinstance(out, torch.Tensor):
            return cls(_derive(first, out, func, args, kwargs, None))
        outs = (cls(_derive(first, t, func, args, kwargs, i)) for i, t in enumerate(out))
        return type(out)(outs)


def leaf(checkpoint: Readable, name: str) -> LazyTensor:
    """Return the lazy tensor of one stored tensor."""
    entry = checkpoint.entries[name]
    meta = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    return LazyTensor(Recipe(meta, checkpoint, name))


def _to_meta(x: Any) -> Any:
    if isinstance(x, LazyTensor):
        return x.recipe.meta
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def _derive(
    first: Recipe, meta: torch.Tensor, op: Any, args: Any, kwargs: Any, index: int | None
) -> Recipe:
    shares = meta.untyped_storage()._cdata == first.meta.untyped_storage()._cdata
    view = first.leaf is not None and shares and meta.dtype == first.meta.dtype
    return Recipe(meta, first.checkpoint, first.leaf if view else None, op, args, kwargs, index)


def fill(lazy: torch.Tensor, out: torch.Tensor) -> int:
    """Carry out a recipe into `out`, of its shape and dtype; return the bytes read.

    A tensor that is not lazy is copied, at no bytes.

    Raises
    ------
    StoreError
        If the checkpoint cannot be read.
    """
    if not isinstance(lazy, LazyTensor):
        out.copy_(lazy)
        return 0
    recipe = lazy.recipe
    if recipe.leaf is not None:
        return _read_view(recipe, out)
    parts = _parts(recipe, out)
    if parts is None:
        counts: list[int] = []
        args, kwargs = pytree.tree_map(lambda x: _whole(x, counts), (recipe.args, recipe.kwargs))
        assert recipe.op is not None
        result = recipe.op(*args, **kwargs)
        out.copy_(result if recipe.index is None else result[recipe.index])
        return sum(counts)
    return sum(fill(part, place) for part, place in parts)


def fill_rows(lazy: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> int:
    """Carry out a recipe for some rows; return the bytes read.

    Of a view of a stored tensor, or a cast of one, the rows are read and nothing else.

    Parameters
    ----------
    rows
        Integers [n], in host memory.
    out
        [n, ...], of the recipe's dtype.

    Raises
    ------
    StoreError
        If the checkpoint cannot be read.
    """
    if not isinstance(lazy, LazyTensor):
        torch.index_select(lazy, 0, rows, out=out)
        return 0
    recipe = lazy.recipe
    if recipe.leaf is None and recipe.op in COPIES:
        inner = torch.empty(out.shape, dtype=recipe.args[0].dtype)
        count = fill_rows(recipe.args[0], rows, inner)
        out.copy_(inner)
        return count
    if recipe.leaf is None:
        whole = torch.empty(lazy.shape, dtype=lazy.dtype)
        count = fill(lazy, whole)
        torch.index_select(whole, 0, rows, out=out)
        return count
    wanted, where = torch.unique(rows, return_inverse=True)
    found = torch.empty((wanted.numel(), *out.shape[1:]), dtype=out.dtype)
    count = at = 0
    for first, last in runs(wanted.tolist()):
        length = last - first + 1
        count += fill(lazy[first : last + 1], found[at : at + length])
        at += length
    torch.index_select(found, 0, where, out=out)
    return count


def runs(rows: list[int]) -> list[tuple[int, int]]:
    """Return the first and last number of each run in ascending ones.

    Examples
    --------
    >>> runs([3, 4, 5, 9])
    [(3, 5), (9, 9)]
    """
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and found[-1][1] == row - 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    return found


def _whole(x: Any, counts: list[int]) -> Any:
    """Carry out an argument's recipe into fresh memory."""
    if not isinstance(x, LazyTensor):
        return x
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    counts.append(fill(x, out))
    return out


def _parts(recipe: Recipe, out: torch.Tensor) -> list[tuple[LazyTensor, torch.Tensor]] | None:
    """Split `out` into places for the op's arguments, if the op only moves or casts them."""
    op, args = recipe.op, recipe.args
    if op is aten.cat.default:
        dim = args[1] if len(args) > 1 else 0
        tensors = cast("list[LazyTensor]", args[0])
        places = list(torch.split(out, [t.shape[dim] for t in tensors], dim))
    elif op is aten.stack.default:
        tensors = cast("list[LazyTensor]", args[0])
        places = list(out.unbind(args[1] if len(args) > 1 else 0))
    elif op in COPIES:
        tensors, places = [args[0]], [out]
    elif op in SAME_ORDER and out.is_contiguous():
        tensors, places = [args[0]], [out.view(args[0].shape)]
    else:
        return None
    exact = all(isinstance(t, LazyTensor) and _one_cast(t, out.dtype) for t in tensors)
    return list(zip(tensors, places, strict=True)) if exact else None


def _one_cast(lazy: LazyTensor, dtype: torch.dtype) -> bool:
    """Whether reading straight into `dtype` rounds as the recipe does: once."""
    return lazy.dtype == dtype or lazy.recipe.leaf is not None


def _read_view(recipe: Recipe, out: torch.Tensor) -> int:
    """Read a strided view of a stored tensor into `out`."""
    meta, checkpoint = recipe.meta, recipe.checkpoint
    assert recipe.leaf is not None
    strides = meta.stride()
    order = sorted(range(meta.dim()), key=lambda d: (-strides[d], -meta.shape[d]))
    meta, out = meta.permute(order), out.permute(order)
    lead = 0  # dimensions to walk until the rest is one range of the file
    while not meta[(0,) * lead].is_contiguous():
        lead += 1
    if lead and meta[(0,) * lead].nbytes < SMALLEST:
        entry = checkpoint.entries[recipe.leaf]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        count = checkpoint.read(recipe.leaf, whole)
        out.copy_(whole.as_strided(meta.shape, meta.stride(), meta.storage_offset()))
        return count
    count = 0
    for index in itertools.product(*(range(n) for n in meta.shape[:lead])):
        count += checkpoint.read(recipe.leaf, out[index], int(meta[index].storage_offset()))
    return count


def equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Compare two tensors of which one or both are lazy, in pieces along the first dimension."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    rows = one.shape[0] if one.dim() else 1
    step = max(1, CHUNK // max(1, one.nbytes // max(1, rows)))
    for start in range(0, rows, step):
        pair = [(t[start : start + step] if t.dim() else t) for t in (one, two)]
        places = [torch.empty(t.shape, dtype=t.dtype) for t in pair]
        for t, place in zip(pair, places, strict=True):
            fill(t, place)
        if not torch.equal(*places):
            return False
    return True
