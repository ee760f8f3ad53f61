"""Does a pass keep what a graph computes? Run both, and show that the check can fail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from zograph import printer
from zograph.ir import meta, placeholders
from zograph.passes.base import Pass, PassContext
from zograph.testing.builders import leaves, random_inputs

Inputs = Sequence[Any]


def run_graph(gm: fx.GraphModule, inputs: Inputs) -> list[torch.Tensor]:
    """Run a graph on one value per placeholder; return its output tensors."""
    with torch.no_grad():
        return leaves(gm(*inputs))


def by_name(gm: fx.GraphModule, inputs: Inputs) -> dict[str, Any]:
    """Map the metadata names of placeholders to their values."""
    nodes = placeholders(gm)
    assert len(nodes) == len(inputs), f"{len(inputs)} inputs for {len(nodes)} placeholders"
    return {str(meta(n).name): x for n, x in zip(nodes, inputs, strict=True)}


def assert_equivalent(
    before: fx.GraphModule,
    after: fx.GraphModule,
    inputs: Inputs | None = None,
    *,
    bitwise: bool = True,
    rtol: float = 1e-5,
    control: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Assert that two graphs compute the same, and that the comparison could tell.

    Parameters
    ----------
    before, after
        Graphs whose placeholders go by the same names (`after` may have fewer or more of
        them; those that are only in `after` get random values).
    inputs
        Values for the placeholders of `before`; random by default.
    bitwise
        Demand equal bits; else agreement within `rtol` of the largest element.
    control
        Changes the inputs by name so that the outputs must differ. By default every
        floating parameter and input is scaled by 1.001, one at a time until one matters.

    Raises
    ------
    AssertionError
        If the outputs differ, or if no control changes them: then the check cannot fail.
    """
    values = by_name(before, random_inputs(before) if inputs is None else inputs)
    extra = by_name(after, random_inputs(after, seed=1))
    expected = run_graph(before, list(values.values()))

    def result(named: dict[str, Any]) -> list[torch.Tensor]:
        return run_graph(after, [named.get(n, extra[n]) for n in extra])

    def same(found: list[torch.Tensor]) -> bool:
        if len(found) != len(expected):
            return False
        return all(_close(a, b, bitwise, rtol) for a, b in zip(expected, found, strict=True))

    if not same(result(values)):
        raise AssertionError(
            f"the graphs differ:\n{printer.text(before)}\nagainst\n{printer.text(after)}"
        )
    controls = [control(dict(values))] if control else list(_scaled(values))
    if all(same(result(named)) for named in controls):
        raise AssertionError("the check cannot fail: no control input changes the outputs")


def _close(a: torch.Tensor, b: torch.Tensor, bitwise: bool, rtol: float) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if bitwise:
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= rtol * a.abs().max())


def _scaled(values: dict[str, Any]) -> list[dict[str, Any]]:
    floating = [
        n for n, x in values.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    return [values | {n: values[n] * 1.001 + 0.001} for n in floating]


def assert_idempotent(pass_: Pass, gm: fx.GraphModule, ctx: PassContext | None = None) -> None:
    """Assert that running a pass a second time changes nothing. `gm` is left as it was."""
    ctx = ctx or PassContext()
    once = pass_.apply(copy.deepcopy(gm), ctx).gm
    text = printer.text(once)
    again = pass_.apply(once, ctx)
    assert printer.text(again.gm) == text, f"{pass_.name} changes its own result"


def assert_rejects(
    pass_: Pass,
    gm: fx.GraphModule,
    error: type[Exception],
    match: str,
    ctx: PassContext | None = None,
) -> None:
    """Assert that a pass refuses a graph with this error and message."""
    with pytest.raises(error, match=match):
        pass_.apply(gm, ctx or PassContext())


def assert_node_delta(
    before: fx.GraphModule, after: fx.GraphModule, *, added: int, removed: int
) -> None:
    """Assert how many calls, by operator, a pass added and removed."""
    old, new = printer.summary(before), printer.summary(after)
    found = ((new - old).total(), (old - new).total())
    assert found == (added, removed), f"+{found[0]} -{found[1]} calls: {new - old}, {old - new}"
