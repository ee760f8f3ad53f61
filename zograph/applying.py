"""How terms are applied to one entry of the parameter table, stored as it is or in a format."""

from __future__ import annotations

import torch

from zograph import codec
from zograph.history import Terms
from zograph.ir import ParamInfo
from zograph.ops import fold_

Owed = tuple[Terms, torch.Tensor | None]
"""What :meth:`zograph.history.History.since` returns: terms, and those at a fold point."""


def fold_terms(
    weight: torch.Tensor,
    param: ParamInfo,
    terms: Terms,
    ends: torch.Tensor | None,
    distribution: str,
) -> None:
    """Apply terms to a weight in place; a narrow one is rounded at `ends` and behind the last."""
    fold_(
        weight,
        terms.seeds,
        terms.coefs,
        terms.scales,
        param.key,
        first=param.first,
        distribution=distribution,
        decay=param.decay,
        ends=ends if param.dtype.itemsize < 4 else None,
    )


def decode_terms(
    stored: torch.Tensor,
    param: ParamInfo,
    owed: Owed | None,
    out: torch.Tensor,
    *,
    at_fold_point: bool,
    rounding: str,
    distribution: str,
) -> torch.Tensor:
    """Decode a stored weight into `out` and apply terms; it is rounded to its format at `ends`.

    Parameters
    ----------
    at_fold_point
        Whether it is rounded behind the last term, too.

    Returns
    -------
    torch.Tensor
        As of :func:`zograph.codec.decode`.
    """
    terms, ends = codec.NOTHING, None
    if owed is not None:
        given, ends = owed[0].to(out.device), owed[1]
        terms = (given.seeds, given.coefs, given.scales if param.decay else None)
        ends = torch.zeros(len(given.seeds), dtype=torch.bool) if ends is None else ends.clone()
        ends[-1:] |= at_fold_point
    assert param.format is not None
    return codec.decode(
        stored, param.format, out, terms, param.key, first=param.first,
        ends=ends, rounding=rounding, distribution=distribution,
    )  # fmt: skip
