"""The log's file: every whole record is read, anything else is cut off or told."""

from __future__ import annotations

import random
import struct
import warnings
from pathlib import Path

import pytest
import torch

from tests.zograph.seedlog import runs
from zograph.errors import LogError, StoreError
from zograph.seedlog import read_log
from zograph.seedlog.format import parse_header, record_size

STEPS = 6


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("log") / "run.zolog"
    with runs.start(log=path) as step:
        runs.take(step, range(STEPS))
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, written: bytes) -> Path:
    found = tmp_path / "run.zolog"
    found.write_bytes(written)
    return found


def test_a_step_takes_48_bytes(path: Path, written: bytes) -> None:
    assert record_size(1) == 48
    found = read_log(path)
    assert len(found) == STEPS
    assert found.end == len(written) == found.start + 48 * STEPS
    parsed = parse_header(written)
    assert parsed is not None
    assert parsed[0].pack() == written[: parsed[1]]


def test_what_a_record_says(path: Path) -> None:
    found, step = read_log(path), runs.start()
    for i in range(STEPS):
        step(**runs.batch(i))
        row, last = found.table[i], step.last
        assert last is not None
        assert (row["step"], row["lr"]) == (last.step, last.lr)
        (each,) = row["each"]
        assert each["seed"] == last.seed
        assert tuple(each["losses"]) == (last.loss_plus, last.loss_minus)
        assert each["coef"] == torch.tensor(-last.lr * last.projected_grad).float()
        assert each["scale"] == torch.tensor(1 - 0.05 * 0.1).float()


@pytest.mark.parametrize("cut", [1, 47])
def test_a_torn_tail_is_cut_with_a_warning(path: Path, written: bytes, cut: int) -> None:
    path.write_bytes(written[:-cut])
    with pytest.warns(UserWarning, match=rf"last {48 - cut} bytes.*ends with {STEPS - 1} steps"):
        found = read_log(path)
    assert len(found) == STEPS - 1
    assert found.torn == 48 - cut
    assert path.read_bytes() == written[:-cut]


def test_zeros_behind_the_end_are_a_torn_tail(path: Path, written: bytes) -> None:
    path.write_bytes(written + bytes(4096))
    with pytest.warns(UserWarning, match=r"last 4096 bytes"):
        assert len(read_log(path)) == STEPS


def test_every_flip_is_cut_off_or_told(path: Path, written: bytes) -> None:
    start, rng = read_log(path).start, random.Random(0)
    for _ in range(300):
        at = rng.randrange(len(written))
        flipped = bytes([written[at] ^ (1 << rng.randrange(8))])
        path.write_bytes(written[:at] + flipped + written[at + 1 :])
        record = (at - start) // 48
        if record == STEPS - 1:
            with pytest.warns(UserWarning, match="no whole record"):
                assert len(read_log(path)) == STEPS - 1
            continue
        where = rf"damaged at byte {start + 48 * record}, in the record of step {record}"
        with pytest.raises(LogError, match=where if record >= 0 else "damaged|newer"):
            read_log(path)


def test_every_truncation_is_cut_off_or_told(path: Path, written: bytes) -> None:
    start = read_log(path).start
    for size in range(len(written)):
        path.write_bytes(written[:size])
        if size < start:
            with pytest.raises(LogError):
                read_log(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert len(read_log(path)) == (size - start) // 48


@pytest.mark.parametrize("kind", ["exchanged", "left out", "doubled", "of another log"])
def test_records_are_a_chain(path: Path, written: bytes, kind: str, tmp_path: Path) -> None:
    start = read_log(path).start
    rows = [written[start + 48 * i :][:48] for i in range(STEPS)]
    if kind == "exchanged":
        rows[1], rows[2] = rows[2], rows[1]
    elif kind == "left out":
        del rows[1]
    elif kind == "doubled":
        rows.insert(1, rows[1])
    else:
        with runs.start(log=tmp_path / "other", seed=1) as step:
            runs.take(step, range(STEPS))
        rows[1] = (tmp_path / "other").read_bytes()[-48 * (STEPS - 1) :][:48]
    path.write_bytes(written[:start] + b"".join(rows))
    with pytest.raises(LogError, match="damaged at byte"):
        read_log(path)


def test_other_files(path: Path, written: bytes) -> None:
    path.write_bytes(b"PK" + written)
    with pytest.raises(LogError, match="no seed log"):
        read_log(path)
    path.write_bytes(written[:8] + struct.pack("<I", 2) + written[12:])
    with pytest.raises(LogError, match="newer version"):
        read_log(path)
    with pytest.raises(StoreError, match="cannot be read"):
        read_log(path.with_name("none"))
