"""The bytes of a log: fixed, checked, and the same on the way back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zograph.seedlog.format import (
    MAGIC,
    SKIPPED,
    START,
    VERSION,
    LogHeader,
    checksum,
    pack_record,
    parse_header,
    record_dtype,
    record_size,
)

HEADER = LogHeader(
    model="0f" * 32,
    base="ab" * 16,
    trained="cd" * 16,
    options={"eps": 1e-3, "directions": 1, "compute_dtype": None, "fold_every": 4},
    engine={"device": "cpu", "backend": "eager", "threads": 2, "torch": "2.11.0"},
    noise=1,
    lr=1e-6,
    decided={"fold_every": 4},
    zograph="0.1.0",
)
FLOATS = st.floats(width=32, allow_nan=False)
SEEDS = st.integers(-(2**63), 2**63 - 1)


def test_a_step_takes_48_bytes() -> None:
    assert record_size(1) == 48
    assert [record_size(n) for n in (2, 3)] == [72, 96]
    assert all(record_dtype(n).itemsize == record_size(n) for n in range(1, 9))


def test_the_bytes_of_a_record() -> None:
    data, lineage = pack_record(3, 0.5, [(-7, 1.0, -0.25, 2.0, 1.5)], 0)
    assert data.hex() == (
        "03000000" "0100" "0000" "000000000000e03f"
        "f9ffffffffffffff" "0000803f" "000080be" "00000040" "0000c03f"
        "b450a839089bc8bd"
    )  # fmt: skip
    assert lineage == int.from_bytes(data[-8:], "little")


@given(
    step=st.integers(0, 2**32 - 1),
    lr=st.floats(allow_nan=False),
    directions=st.lists(st.tuples(SEEDS, FLOATS, FLOATS, FLOATS, FLOATS), min_size=1, max_size=4),
    lineage=st.integers(0, 2**64 - 1),
    skipped=st.booleans(),
)
def test_a_record_is_read_as_it_was_packed(
    step: int,
    lr: float,
    directions: list[tuple[int, float, float, float, float]],
    lineage: int,
    skipped: bool,
) -> None:
    data, check = pack_record(step, lr, directions, lineage, skipped=skipped)
    assert len(data) == record_size(len(directions))
    (row,) = np.frombuffer(data, record_dtype(len(directions)))
    assert (row["step"], row["lr"], row["directions"]) == (step, lr, len(directions))
    assert (row["flags"] == SKIPPED) == skipped
    assert row["check"] == check
    found = [(d["seed"], d["scale"], d["coef"], *d["losses"]) for d in row["each"]]
    assert found == directions


def test_a_records_checksum_hangs_on_all_before_it() -> None:
    one = [(1, 1.0, 0.5, 2.0, 3.0)]
    first, a = pack_record(0, 0.1, one, 5)
    again, b = pack_record(0, 0.1, one, 6)
    assert first[:-8] == again[:-8]
    assert a != b
    assert pack_record(1, 0.1, one, a) != pack_record(1, 0.1, one, b)


def test_a_header_comes_back() -> None:
    data = HEADER.pack()
    assert data.startswith(MAGIC + VERSION.to_bytes(4, "little"))
    assert parse_header(data) == (HEADER, len(data))
    assert parse_header(data + b"records") == (HEADER, len(data))
    assert HEADER.directions == 1
    assert replace(HEADER, base="ac" * 16).pack() != data


def test_fields_that_a_later_version_adds_are_passed_over() -> None:
    text = HEADER.pack()[16:-8]
    longer = text[:-1] + b', "zzz": 1}'
    body = START.pack(MAGIC, VERSION, len(longer)) + longer
    found = parse_header(body + checksum(body).to_bytes(8, "little"))
    assert found is not None
    assert found[0] == HEADER


@pytest.mark.parametrize("bit", [0, 7])
def test_every_flip_in_a_header_is_found(bit: int) -> None:
    data = HEADER.pack()
    for at in range(len(MAGIC) + 4, len(data)):  # the reader looks at magic and version itself
        flipped = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        assert parse_header(flipped) is None


def test_a_header_that_is_cut_is_none() -> None:
    data = HEADER.pack()
    assert all(parse_header(data[:size]) is None for size in range(len(data)))
