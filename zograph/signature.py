"""Which graph serves a batch: a function of that batch alone.

A batch is flattened to leaves. Each tensor dimension is either a *symbol*, whose size may
differ from batch to batch, or a fixed number. These levels are tried in this order, and a
batch is served by the first whose capture succeeds and whose guards admit its sizes:

``sequence``  batch and sequence dimensions are symbols;
``short``     the same, captured at smaller sizes, for models with few positions;
``batch``     only the batch dimension is a symbol;
``static``    every size is fixed;
``values``    so is what the forward decides by values of the batch (:mod:`zograph.deciding`).

The capture itself runs on stand-ins of fixed sizes (:func:`hint`), so no trace of earlier
batches can reach a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from zograph.errors import BatchError

Level = Literal["sequence", "short", "batch", "static", "values"]
LEVELS: tuple[Level, ...] = ("sequence", "short", "batch", "static", "values")

FIXED: tuple[Level, ...] = ("static", "values")

# Batch, then sequences. Primes, so that no product of them meets a size of the model by
# chance; large, so that the compiler optimises for sizes worth optimising.
HINTS = (67, 139, 137, 131, 127, 113, 109)
SHORT_HINTS = (5, 37, 29, 23, 19, 17, 13)

Size = int | str


@dataclass(frozen=True)
class Leaf:
    """One leaf of a batch: a tensor's dtype and sizes, or a constant's value."""

    path: str
    dtype: torch.dtype | None
    sizes: tuple[Size, ...]
    constant: Any = None

    def stand_in(self, level: Level) -> Any:
        """Return an empty tensor of the hinted sizes, or the constant itself."""
        if self.dtype is None:
            return self.constant
        return torch.empty([hint(size, level) for size in self.sizes], dtype=self.dtype)


@dataclass(frozen=True)
class Signature:
    """The key under which captures are kept. Hashable; equal for batches of one graph."""

    level: Level
    spec: str
    leaves: tuple[Leaf, ...]

    def __str__(self) -> str:
        def show(leaf: Leaf) -> str:
            if leaf.dtype is None:
                return f"{leaf.path}={leaf.constant!r}"
            sizes = ", ".join(map(str, leaf.sizes))
            return f"{leaf.path}: {str(leaf.dtype).removeprefix('torch.')}[{sizes}]"

        return ", ".join(map(show, self.leaves))


def hint(size: Size, level: Level) -> int:
    """Return the stand-in for a size: itself if fixed, else the symbol's fixed hint."""
    if isinstance(size, int):
        return size
    hints = SHORT_HINTS if level == "short" else HINTS
    return hints[0 if size == "batch" else 1 + int(size.removeprefix("seq"))]


def flatten(batch: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Flatten a batch to (path, leaf) pairs and its tree.

    Raises
    ------
    BatchError
        If a leaf is neither a tensor nor a plain constant (number, string, None).
    """
    pairs, spec = pytree.tree_flatten_with_path(dict(batch))
    leaves = []
    for path, leaf in pairs:
        name = pytree.keystr(path)
        if not isinstance(leaf, (torch.Tensor, int, float, bool, str, type(None))):
            raise BatchError(
                f"batch{name} is a {type(leaf).__name__}. Pass tensors (nested dicts, lists and "
                f"tuples of tensors work), numbers, strings or None."
            )
        leaves.append((name, leaf))
    return leaves, spec


def signatures(batch: Mapping[str, Any], *, dynamic: bool = True) -> Iterator[Signature]:
    """Yield the batch's signatures from the most general to the fixed one."""
    leaves, spec = flatten(batch)
    tensors = [leaf for _, leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    rows = tensors[0].shape[0] if tensors else 0
    lengths = dict.fromkeys(
        t.shape[1]
        for t in tensors
        if t.ndim >= 2 and t.shape[1] > 1 and not t.is_floating_point() and not t.is_complex()
    )
    named = {length: f"seq{i}" for i, length in enumerate(lengths) if i + 1 < len(HINTS)}

    def size(level: Level, dim: int, n: int) -> Size:
        if level in FIXED or n <= 1:
            return n
        if dim == 0:
            return "batch" if n == rows else n
        return n if level == "batch" else named.get(n, n)

    seen: set[tuple[Leaf, ...]] = set()
    for level in LEVELS if dynamic else FIXED:
        found = tuple(
            Leaf(path, x.dtype, tuple(size(level, d, n) for d, n in enumerate(x.shape)))
            if isinstance(x, torch.Tensor)
            else Leaf(path, None, (), x)
            for path, x in leaves
        )
        symbolic = any(isinstance(s, str) for leaf in found for s in leaf.sizes)
        if found not in seen or (level == "short" and symbolic) or level == "values":
            seen.add(found)
            yield Signature(level, str(spec), found)


def sizes(signature: Signature, batch: Mapping[str, Any]) -> dict[str, int]:
    """Return the batch's size for each symbol of its signature."""
    leaves, _ = flatten(batch)
    found = {}
    for leaf, (_, x) in zip(signature.leaves, leaves, strict=True):
        found.update({s: x.shape[d] for d, s in enumerate(leaf.sizes) if isinstance(s, str)})
    return found
