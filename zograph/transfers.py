"""The ops that move weights: `zograph::gather`, `fetch`, `wait`, `fold`, `writeback`, `release`.

Where weights are stored in a format, `decode` and `encode` are others.

In a graph they are functional: what an op changes it returns, so every effect is an edge, and a
graph can be run as it stands to see what it means. The runtime does not call them: it turns each
into a task on a stream, and the returned tensors into slots of one arena.

``gather(stored, index)``
    rows of a stored table, or of one in pieces, as an embedding looks them up.
``fetch(stored, after)``
    starts copies of stored weights into slots; `after` are tokens of the releases whose slots
    are filled anew.
``wait(fetched)``
    the fetched weights, once they have arrived.
``fold(weights, seeds, coefs, scales, keys, slots, decay, distribution)``
    the weights with their pending terms applied (docs/noise.md).
``writeback(weights, every)``
    the stored values from now on. With ``every > 1`` they are written at the weights' fold points
    only, every so many steps, and stay base and pending terms in between: whoever fetches them
    folds them again. The runtime knows which terms a stored value has.
``decode(stored, shape, dtype, format, rounding, seeds, coefs, scales, keys, slot, decay,
distribution)``
    a weight from what is stored of it (:mod:`zograph.codec`), with its pending terms applied, if it
    is given any, and rounded to the format behind them. With ``rounding=""`` it is rounded at its
    fold points only, which the runtime knows.
``encode(weight, format)``
    what is stored of a weight from now on: of one that was rounded to the format nothing is lost.
``release(weights, uses)``
    a token: nothing reads the slots of `weights` any more, once `uses` have been computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from zograph import codec
from zograph.formats import FORMATS
from zograph.ir import meta
from zograph.ops import fold_

__all__ = [
    "DECODE",
    "ENCODE",
    "FETCH",
    "FOLD",
    "GATHER",
    "RELEASE",
    "TRANSFERS",
    "WAIT",
    "WRITEBACK",
    "is_transfer",
    "weight_names",
]

_SCHEMAS = {
    "gather": "(Tensor[] stored, Tensor index) -> Tensor",
    "fetch": "(Tensor[] stored, Tensor[] after) -> Tensor[]",
    "wait": "(Tensor[] fetched) -> Tensor[]",
    "fold": "(Tensor[] weights, Tensor seeds, Tensor coefs, Tensor scales, Tensor keys, "
    "int[] slots, bool[] decay, str distribution) -> Tensor[]",
    "writeback": "(Tensor[] weights, int every=1) -> Tensor[]",
    "decode": '(Tensor stored, int[] shape, ScalarType dtype, str format, str rounding="", '
    "Tensor? seeds=None, Tensor? coefs=None, Tensor? scales=None, Tensor? keys=None, int slot=0, "
    'bool decay=True, str distribution="normal") -> Tensor',
    "encode": "(Tensor weight, str format) -> Tensor",
    "release": "(Tensor[] weights, Tensor[] uses) -> Tensor",
}


def _rows(stored: Sequence[Tensor], index: Tensor) -> Tensor:
    return torch.nn.functional.embedding(index, torch.cat(list(stored)))


def _copies(tensors: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [t.clone(memory_format=torch.contiguous_format) for t in tensors]


def _fold(
    weights: Sequence[Tensor],
    seeds: Tensor,
    coefs: Tensor,
    scales: Tensor,
    keys: Tensor,
    slots: Sequence[int],
    decay: Sequence[bool],
    distribution: str,
) -> list[Tensor]:
    out = _copies(weights)
    for w, slot, decays in zip(out, slots, decay, strict=True):
        key, first = keys[slot]
        fold_(w, seeds, coefs, scales, key, distribution=distribution, decay=decays, first=first)
    return out


def _decode(
    stored: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    format: str,
    rounding: str = "",
    seeds: Tensor | None = None,
    coefs: Tensor | None = None,
    scales: Tensor | None = None,
    keys: Tensor | None = None,
    slot: int = 0,
    decay: bool = True,
    distribution: str = "normal",
) -> Tensor:
    out, form = _decoded(stored, shape, dtype), FORMATS[format]
    if seeds is None or coefs is None or keys is None:
        codec.decode(stored.contiguous(), form, out)
        return out
    ends = torch.zeros(seeds.numel(), dtype=torch.bool)
    ends[-1:] = bool(rounding)
    codec.decode(
        stored.contiguous(), form, out, (seeds, coefs, scales if decay else None),
        int(keys[slot, 0]), first=int(keys[slot, 1]),
        ends=ends, rounding=rounding, distribution=distribution,
    )  # fmt: skip
    return out


def _decoded(stored: Tensor, shape: Sequence[int], dtype: torch.dtype, *_: Any) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=stored.device)


def _encode(weight: Tensor, format: str) -> Tensor:
    stored = FORMATS[format].empty(tuple(weight.shape), weight.device)
    codec.encode(weight.contiguous(), FORMATS[format], stored)
    return stored


def _encoded(weight: Tensor, format: str) -> Tensor:
    return FORMATS[format].empty(tuple(weight.shape), weight.device)


def _token(weights: Sequence[Tensor], uses: Sequence[Tensor]) -> Tensor:
    return weights[0].new_empty(0, dtype=torch.uint8)


def _empty(tensors: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "gather": (_rows, _rows),
    "fetch": (_copies, _empty),
    "wait": (_copies, _empty),
    "fold": (_fold, _empty),
    "writeback": (_copies, _empty),
    "decode": (_decode, _decoded),
    "encode": (_encode, _encoded),
    "release": (_token, _token),
}


def _register() -> None:
    library = torch.library.Library("zograph", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        real, fake = _IMPLEMENTATIONS[name]
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        library.impl(name, real, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"zograph::{name}", fake, lib=library)
    _libraries.append(library)


_libraries: list[torch.library.Library] = []  # a Library unregisters its ops when it dies
_register()

GATHER = torch.ops.zograph.gather.default
FETCH = torch.ops.zograph.fetch.default
WAIT = torch.ops.zograph.wait.default
FOLD = torch.ops.zograph.fold.default
WRITEBACK = torch.ops.zograph.writeback.default
DECODE = torch.ops.zograph.decode.default
ENCODE = torch.ops.zograph.encode.default
RELEASE = torch.ops.zograph.release.default

TRANSFERS = (FETCH, WAIT, FOLD, WRITEBACK, DECODE, ENCODE, RELEASE)

for _op in (FOLD, WRITEBACK, DECODE, ENCODE, RELEASE):  # what they do outlives their results
    has_side_effect(_op)


def is_transfer(node: fx.Node) -> bool:
    """Whether the node moves or updates stored weights."""
    return node.op == "call_function" and node.target in TRANSFERS


def weight_names(node: fx.Node) -> tuple[str, ...]:
    """Return the names of the weights that a transfer or a lookup of rows is about."""
    moved: Any = node.args[0]
    moved = [moved] if isinstance(moved, fx.Node) else moved
    return tuple(str(meta(n).name) for n in moved)
