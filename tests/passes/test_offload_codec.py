"""offload, where weights are stored in a format: decode and encode are nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from tests.passes.graphs import ready_for, two_blocks
from tests.passes.test_offload import (
    NOTHING,
    RESIDENT,
    SOMETHING,
    bound,
    calls,
    context,
    freeze,
    outlined,
    weights,
)
from zograph import codec, printer
from zograph.formats import FORMATS, with_format
from zograph.ir import info, meta, placeholders
from zograph.passes import Gather, Offload, PassContext, Schedule
from zograph.schedule import check
from zograph.testing import Golden, assert_idempotent, run_graph
from zograph.transfers import DECODE, ENCODE, FETCH, FOLD, RELEASE, WRITEBACK
from zograph.verifier import Verifier

TABLES = ("wte", "layers.0.w", "layers.1.w")


def stored_in(dtype: torch.dtype = torch.bfloat16, gm: fx.GraphModule | None = None) -> Any:
    """Return an outlined graph whose tables and matrices are stored in a format."""
    gm = outlined() if gm is None else gm
    info(gm).params = with_format(info(gm).params, dtype)
    return gm


def offloaded(gm: fx.GraphModule, *resident: str, **fields: Any) -> fx.GraphModule:
    """Offload under a layout, or (`layout=None`) with all weights on the device."""
    Offload().apply(gm, replace(context(gm, *resident), **fields))
    info(gm).facts |= Offload.contract.provides
    return gm


def with_stored(gm: fx.GraphModule, values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Give the graph stored weights for dense ones."""
    form = FORMATS[str(dtype).removeprefix("torch.")]
    out = dict(values)
    for name in TABLES:
        out[name] = torch.ops.zograph.encode(values[name], form.name)
    return out


def dense_inputs(**terms: list[float]) -> dict[str, Any]:
    """Return inputs of the offloaded graph, weights as they are given to compile."""
    return bound(offloaded(outlined()), **terms)


@pytest.mark.parametrize(("name", "resident"), [("", ()), ("_resident", RESIDENT)])
def test_golden(golden: Golden, name: str, resident: tuple[str, ...]) -> None:
    gm = offloaded(stored_in(), *resident)
    golden.check(gm, f"offload_codec{name}_after")
    Verifier().check(gm, after="offload")


def test_golden_of_int8_every_third_step(golden: Golden) -> None:
    gm = offloaded(stored_in(torch.int8), fold_every=3, rounding="stochastic")
    golden.check(gm, "offload_codec_every_third")
    Verifier().check(gm, after="offload")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("resident", [(), RESIDENT, TABLES])
def test_without_pending_terms_stages_see_decoded_weights(
    dtype: torch.dtype, resident: tuple[str, ...]
) -> None:
    before, gm = outlined(), stored_in(dtype)
    gm = offloaded(gm, *resident)
    values = with_stored(gm, dense_inputs(**NOTHING), dtype)
    found = run_graph(gm, [values[str(meta(n).name)] for n in placeholders(gm)])
    form = FORMATS[str(dtype).removeprefix("torch.")]
    dense = dense_inputs(**NOTHING)
    given = dict(dense)
    for name in TABLES:
        dense[name] = torch.empty_like(dense[name])
        codec.decode(values[name], form, dense[name])
    expected = run_graph(before, [dense[str(meta(n).name)] for n in placeholders(before)])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    other = run_graph(before, [given[str(meta(n).name)] for n in placeholders(before)])
    assert not torch.equal(other[0], found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_where_weights_stand_changes_nothing(dtype: torch.dtype, rounding: str) -> None:
    results = []
    for resident in ((), RESIDENT, TABLES, None):
        gm = stored_in(dtype)
        fields: dict[str, Any] = {"layout": None} if resident is None else {}
        gm = offloaded(gm, *(resident or ()), rounding=rounding, **fields)
        values = with_stored(gm, dense_inputs(**SOMETHING), dtype)
        results.append(run_graph(gm, [values[str(meta(n).name)] for n in placeholders(gm)]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_tied_table_is_decoded_twice_and_folded_once() -> None:
    for resident in ((), TABLES):
        gm = offloaded(stored_in(), *resident)
        tied = [n for n in calls(gm, DECODE) if meta(n).name == "wte"]
        assert [len(n.args) > 4 for n in tied] == [True, False]
        folded = [name for n in calls(gm, FOLD) for name in weights(n.args[0])]
        assert sorted(folded) == ["layers.0.bias", "layers.1.bias"]
        assert sorted(str(meta(n).name) for n in calls(gm, ENCODE)) == sorted(TABLES)
        written = [name for n in calls(gm, WRITEBACK) for name in weights(n.args[0])]
        assert sorted(written) == sorted(set(info(gm).params) - set(resident))


def test_frozen_weights_are_decoded_and_nothing_more() -> None:
    gm = two_blocks()
    freeze(gm, "layers.0.w")
    freeze(gm, "layers.1.w")
    gm = offloaded(stored_in(gm=ready_for("offload", gm)))
    bare = [str(meta(n).name) for n in calls(gm, DECODE) if len(n.args) == 4]
    assert bare == ["layers.0.w", "layers.1.w", "wte"]  # and the second visit of the table
    assert [meta(n).name for n in calls(gm, ENCODE)] == ["wte"]
    Verifier().check(gm, after="offload")


def test_a_frozen_table_with_a_format_is_fetched_whole() -> None:
    gm = two_blocks()
    for name in TABLES:
        freeze(gm, name)
    gm = stored_in(gm=ready_for("gather", gm))
    result = Gather().apply(gm, PassContext(by_rows=True))
    assert not result.modified


def test_decoded_memory_is_in_the_schedule() -> None:
    gm = stored_in()
    ctx = context(gm, slots=3 * 4096, decoded=4096)
    gm = offloaded(gm)
    Schedule().apply(gm, ctx)
    info(gm).facts |= Schedule.contract.provides
    found = info(gm).schedule
    assert found is not None
    check(found)
    Verifier().check(gm, after="schedule")
    assert found.peak["decoded"] == found.capacity["decoded"] == 4096
    names = [n for n in found.units if found.units[n].arena == "decoded"]
    assert len(names) == len(calls(gm, FETCH)) == len(calls(gm, RELEASE))
    for name in names:  # alive from the decoding to the body, or the encoding
        tasks = [t.name.split()[0] for t in found.tasks.values() if name in (t.fills, *t.reads)]
        assert set(tasks) <= {"decode", "body", "encode"}
        assert {"decode", "body"} <= set(tasks)


def test_idempotent() -> None:
    gm = stored_in()
    assert_idempotent(Offload(), gm, context(gm, *RESIDENT))


def test_a_format_that_nobody_asked_for_changes_no_graph() -> None:
    other = outlined()
    info(other).params = with_format(info(other).params, None)
    assert printer.text(offloaded(outlined())) == printer.text(offloaded(other))
