"""Functions whose results have sizes that depend on values, written with sizes that are asked for.

For :class:`zograph.deciding.Deciding`, which answers ``int(...)`` about what follows from the
batch. Each takes first whether the values of a tensor are known, and returns NotImplemented where
it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Knows = Callable[[Any], bool]


def iterated(knows: Knows, tensor: Tensor) -> Any:
    """Iterate over rows that are followed."""
    return iter(tensor.unbind(0))


def places(knows: Knows, tensor: Tensor, *, as_tuple: bool = False) -> Any:
    """Find what is not zero, in a result of a size that is asked for."""
    if not knows(tensor) or not tensor.ndim:
        return NotImplemented
    found = torch.nonzero_static(tensor, size=int(tensor.count_nonzero()))
    return found.unbind(1) if as_tuple else found


def where(knows: Knows, condition: Tensor, *values: Any, **named: Any) -> Any:
    """Treat the form with one argument, which is `places`."""
    return NotImplemented if values or named else places(knows, condition, as_tuple=True)


def selected(knows: Knows, tensor: Tensor, mask: Tensor) -> Any:
    """Select by a mask whose count is asked for."""
    if not knows(mask):
        return NotImplemented
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)  # type: ignore[no-untyped-call]
    return tensor.expand(shape)[mask.expand(shape)]


def repeated(knows: Knows, tensor: Tensor, repeats: Any = None, *args: Any, **named: Any) -> Any:
    """Repeat elements, in a result of a size that is asked for."""
    counts = tensor if repeats is None else repeats
    if not knows(counts) or len(args) > 1 or named.get("output_size") is not None:
        return NotImplemented
    size = int(counts.sum())
    if repeats is None:
        return torch.repeat_interleave(tensor, output_size=size)
    dim = args[0] if args else named.get("dim")
    return torch.repeat_interleave(tensor, repeats, dim, output_size=size)


def distinct(knows: Knows, tensor: Tensor, **named: Any) -> Any:
    """Leave out neighbours that are equal."""
    if not knows(tensor) or not tensor.numel() or asks_for_more(named):
        return NotImplemented
    flat = tensor.flatten()
    first = torch.ones(1, dtype=torch.bool, device=flat.device)
    return flat[torch.cat([first, flat[1:] != flat[:-1]])]


def unique(knows: Knows, tensor: Tensor, **named: Any) -> Any:
    """Sort and leave out what is there twice."""
    if not knows(tensor) or asks_for_more(named):
        return NotImplemented
    return distinct(knows, tensor.flatten().sort().values)


def asks_for_more(named: Mapping[str, Any]) -> bool:
    """Whether unique elements are wanted with positions or counts, or along a dimension."""
    return any(named.get(k) for k in ("return_inverse", "return_counts")) or (
        named.get("dim") is not None
    )


def gathered(knows: Knows, data: Any, **named: Any) -> Any:
    """Make a tensor of a list with tensors of one element, whose values need no asking then."""
    if not isinstance(data, (list, tuple)) or not any(isinstance(x, Tensor) for x in data):
        return NotImplemented
    if any(isinstance(x, (list, tuple)) for x in data):
        return NotImplemented
    device = next(x.device for x in data if isinstance(x, Tensor))
    found = torch.stack([torch.as_tensor(x, device=device).reshape(()) for x in data])
    return found.to(named.get("device"), named.get("dtype"))


def shaped(make: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return what fills a tensor like another, of which only the form counts."""

    def like(knows: Knows, tensor: Tensor, *values: Any, **named: Any) -> Any:
        if knows(tensor) or named.keys() - {"dtype", "device"}:
            return NotImplemented
        if not torch.empty_like(tensor).is_contiguous():
            return NotImplemented
        return make(
            tensor.shape, *values, **{"dtype": tensor.dtype, "device": tensor.device} | named
        )

    return like


def sized(knows: Knows, args: Any) -> Any:
    """Replace known tensors that stand where integers belong: a call would ask them unseen."""

    def number(leaf: Any) -> Any:
        whole = knows(leaf) and not leaf.ndim and not leaf.is_floating_point()
        return int(leaf) if whole else leaf

    return pytree.tree_map(number, args)


SIZED = {torch.arange, torch.zeros, torch.ones, torch.empty, torch.linspace, torch.eye}
"""Functions of integers alone."""
SIZED_AFTER_FIRST = {
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.expand,
    Tensor.repeat,
    Tensor.unflatten,
    Tensor.narrow,
    torch.narrow,
    torch.split,
    Tensor.split,
    nn.functional.interpolate,
    nn.functional.pad,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
}
"""Functions of a tensor and integers."""

REWRITTEN: dict[Any, Callable[..., Any]] = {
    Tensor.__iter__: iterated,
    Tensor.nonzero: places,
    torch.nonzero: places,
    torch.argwhere: places,
    Tensor.argwhere: places,
    torch.where: where,
    torch.masked_select: selected,
    Tensor.masked_select: selected,
    torch.repeat_interleave: repeated,
    Tensor.repeat_interleave: repeated,
    torch.tensor: gathered,
    torch.zeros_like: shaped(torch.zeros),
    torch.ones_like: shaped(torch.ones),
    torch.full_like: shaped(torch.full),
    torch.unique_consecutive: distinct,
    Tensor.unique_consecutive: distinct,
    torch.unique: unique,
    Tensor.unique: unique,
}
"""Functions by what they do where results have sizes that depend on values."""
