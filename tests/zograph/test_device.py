"""DeviceSpec: arithmetic, presets, measurements and their cache."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zograph import device, kernels, measure, measure_disk
from zograph.device import DeviceSpec
from zograph.errors import OptionError, StoreError
from zograph.presets import CARDS, LINKS

HAND = DeviceSpec(
    name="hand",
    kind="cpu",
    memory=1000,
    host_memory=2000,
    gemm={"float32": 8.0, "bfloat16": 32.0},
    bandwidth=4.0,
    noise=2.0,
    fold=16.0,
    to_device=3.0,
    to_host=5.0,
    link_both=7.0,
    read=9.0,
    write=11.0,
    disk_both=13.0,
)
TINY = measure.Sizes(
    tokens=4, width=16, elements=5000, copy=1 << 16, disk=1 << 20, repeats=2, limit=0.01
)
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small measurements and a cache of their own; returns the cache."""
    kernels.available()  # compiled into the user's own cache
    monkeypatch.setattr(measure, "SIZES", TINY)
    monkeypatch.setenv("ZOGRAPH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted(small: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Canned measurements; the list grows by the folder of each."""
    calls: list[Path] = []
    fields = {k: v for k, v in HAND.to_json().items() if k in measure.Rates.__annotations__}

    def rates(_: torch.device, folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return fields | {"noise": float(len(calls))}

    monkeypatch.setattr(measure, "rates", rates)
    return calls


# ---- arithmetic ------------------------------------------------------------------------------


def test_seconds_by_hand() -> None:
    assert HAND.seconds([]) == 0
    assert HAND.seconds([("float32", 80, 4)]) == 10  # arithmetic
    assert HAND.seconds([("bfloat16", 80, 40)]) == 10  # traffic
    assert HAND.seconds([("int64", 10**9, 8)]) == 2  # no rate: traffic
    assert HAND.seconds([("float32", 80, 4), ("float32", 0, 4)]) == 11
    assert HAND.seconds([], noise=6) == 3
    assert HAND.seconds([], fold=8) == 0.5
    assert HAND.seconds(iter([("float32", 8, 0)]), noise=2, fold=16) == 3


def test_with_link_and_memory() -> None:
    linked = HAND.with_link(25)
    assert (linked.to_device, linked.to_host, linked.link_both) == (25.0, 25.0, 50.0)
    assert replace(linked, to_device=3.0, to_host=5.0, link_both=7.0) == HAND
    assert HAND.with_memory(5) == replace(HAND, memory=5)
    assert HAND.with_memory(5, 6) == replace(HAND, memory=5, host_memory=6)


def test_json_round_trip() -> None:
    for spec in (HAND, DeviceSpec.preset("h200", "fast")):
        again = DeviceSpec.from_json(json.loads(json.dumps(spec.to_json())))
        assert again == spec
        assert hash(again) == hash(spec)


def test_gemm_is_a_copy() -> None:
    given = {"float32": 1.0}
    spec = replace(HAND, gemm=given)
    given["float32"] = 2.0
    assert spec.gemm == {"float32": 1.0}


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "5", None, True])
@pytest.mark.parametrize("name", ["memory", "bandwidth", "disk_both", "gemm"])
def test_values_that_cannot_be(name: str, value: Any) -> None:
    data = HAND.to_json() | {name: {"float32": value} if name == "gemm" else value}
    with pytest.raises(OptionError, match=rf"DeviceSpec {name}.* is .*must be a positive"):
        DeviceSpec.from_json(data)


def test_json_that_is_no_spec() -> None:
    whole = HAND.to_json()
    less = {k: v for k, v in whole.items() if k != "read"}
    for data in (None, [], 5, {}, less, whole | {"more": 1}):
        with pytest.raises(OptionError, match=r"a DeviceSpec has the fields .*'read'"):
            DeviceSpec.from_json(data)
    with pytest.raises(OptionError, match="gemm a mapping"):
        DeviceSpec.from_json(whole | {"gemm": 5})
    with pytest.raises(OptionError, match="kind='tpu' is unknown; use one of cpu, cuda"):
        DeviceSpec.from_json(whole | {"kind": "tpu"})
    with pytest.raises(OptionError, match="whole number of bytes"):
        DeviceSpec.from_json(whole | {"memory": 1.5})


# ---- presets ---------------------------------------------------------------------------------


def test_presets_order_sensibly() -> None:
    slow = {name: DeviceSpec.preset(name) for name in CARDS}
    assert set(slow) == {"rtx4090-24gb", "a100-40gb", "a100-80gb", "h200"}
    for name, spec in slow.items():
        fast = DeviceSpec.preset(name, "fast")
        assert spec == DeviceSpec.preset(name, "slow")
        assert fast == replace(spec.with_link(2 * spec.to_device), name=fast.name)
        assert spec.kind == "cuda"
        assert spec.gemm["float16"] == spec.gemm["bfloat16"] > spec.gemm["float32"]
        assert spec.gemm["float16"] < CARDS[name].tensor
        assert spec.bandwidth < CARDS[name].bandwidth
        assert spec.noise < spec.bandwidth / 6  # the traffic alone
        assert spec.noise < spec.fold < spec.bandwidth / 4
        assert spec.bandwidth > 10 * spec.link_both
        assert spec.write < spec.disk_both < spec.read < spec.to_device
    sizes = [slow[n].memory for n in ("rtx4090-24gb", "a100-40gb", "a100-80gb", "h200")]
    assert sizes == sorted(sizes)
    assert slow["a100-40gb"].bandwidth < slow["a100-80gb"].bandwidth < slow["h200"].bandwidth
    assert slow["a100-80gb"].to_device == 25e9
    assert slow["h200"].to_device == 50e9


def test_presets_by_hand() -> None:
    spec = DeviceSpec.preset("a100-80gb")
    assert spec.gemm["float16"] == pytest.approx(202.8e12)
    assert spec.gemm["float32"] == pytest.approx(12.675e12)
    assert spec.bandwidth == pytest.approx(1733.15e9)
    assert 1 / spec.noise == pytest.approx(6 / 1733.15e9 + 100 / 9.75e12)
    # OPT-175B's two forwards of 2048 tokens.
    assert spec.seconds([("float16", 2 * 2 * 175 * 10**9 * 2048, 0)]) == pytest.approx(7.07, 0.01)


def test_unknown_presets() -> None:
    with pytest.raises(OptionError, match=r"preset='h900' is unknown; .*rtx4090-24gb, a100-40gb"):
        DeviceSpec.preset("h900")
    with pytest.raises(OptionError, match="link='warp' is unknown; use one of slow, fast"):
        DeviceSpec.preset("h200", "warp")  # type: ignore[arg-type]
    assert LINKS == ("slow", "fast")


# ---- the cache -------------------------------------------------------------------------------


def test_measured_once(counted: list[Path], small: Path, tmp_path: Path) -> None:
    first = DeviceSpec.measure("cpu", tmp_path)
    assert counted == [tmp_path]
    assert DeviceSpec.measure(CPU, str(tmp_path)) == first
    assert len(counted) == 1
    assert DeviceSpec.measure("cpu", tmp_path, refresh=True).noise == 2
    assert DeviceSpec.measure("cpu", tmp_path).noise == 2
    assert [p.name for p in small.iterdir()] == [device.cache_path(CPU, tmp_path).name]
    assert first.kind == "cpu"
    assert first.memory == first.host_memory == measure.ram()


def test_memory_is_asked_anew(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DeviceSpec.measure("cpu", tmp_path)
    monkeypatch.setattr(measure, "ram", lambda: 12345)
    assert DeviceSpec.measure("cpu", tmp_path).memory == 12345
    assert len(counted) == 1


def test_other_thread_counts_are_measured_apart(counted: list[Path], tmp_path: Path) -> None:
    DeviceSpec.measure("cpu", tmp_path)
    torch.set_num_threads(1)
    assert DeviceSpec.measure("cpu", tmp_path).name.endswith("1 threads")
    assert len(counted) == 2


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"name": 5}', b"null"], ids=repr
)
def test_damaged_cache(counted: list[Path], tmp_path: Path, damage: bytes) -> None:
    DeviceSpec.measure("cpu", tmp_path)
    path = device.cache_path(CPU, tmp_path)
    whole = path.read_bytes()
    for bad in (damage, whole[:-9], whole.replace(b"4.0", b"-4.0")):
        path.write_bytes(bad)
        before = len(counted)
        DeviceSpec.measure("cpu", tmp_path)
        assert len(counted) == before + 1
        assert device.kept(path) is not None


def test_cache_that_cannot_be_written(counted: list[Path], small: Path, tmp_path: Path) -> None:
    small.write_text("a file where the folder should be")
    assert DeviceSpec.measure("cpu", tmp_path) == DeviceSpec.measure("cpu", tmp_path)
    assert len(counted) == 1


def test_device_that_is_not_there(counted: list[Path], tmp_path: Path) -> None:
    for name in ("cuda:99", "tpu"):
        with pytest.raises(OptionError, match=f"device='{name}'"):
            DeviceSpec.measure(name, tmp_path)
    assert not counted


# ---- the measurements ------------------------------------------------------------------------


def test_a_tiny_measurement(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    spec = DeviceSpec.measure("cpu", folder)
    assert set(spec.gemm) == {"float32", "bfloat16", "float16"}
    values = [*spec.gemm.values(), *(v for v in spec.to_json().values() if isinstance(v, float))]
    assert len(values) == 12
    assert all(math.isfinite(v) and v > 0 for v in values)
    assert not list(folder.iterdir())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2


def test_slow_dtypes_stop_at_the_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIZES", TINY)
    calls: list[object] = []
    monkeypatch.setattr(measure, "seconds", lambda run, _: calls.append(run) or 1.0)
    flops = 2 * 4 * 9 * 4 * 4
    assert measure.gemm(CPU, torch.float32) == flops
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tiny_measurement_on_cuda(small: Path, tmp_path: Path) -> None:
    spec = DeviceSpec.measure("cuda", tmp_path)
    assert spec.kind == "cuda"
    assert spec.memory == torch.cuda.get_device_properties(0).total_memory
    assert spec.link_both > 0


def test_disk_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = fcntl.fcntl, []

    def refuse(fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O")
        return int(real(fd, command, value))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    assert min(measure_disk.disk(tmp_path, 1 << 20)) > 0
    assert len(synced) >= 14
    assert not list(tmp_path.iterdir())


def test_disk_that_refuses_direct_io_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "alignment")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert min(measure_disk.disk(tmp_path, 1 << 20)) > 0
    assert refused in ([], [0])  # [] where the file system has no direct I/O at all


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    out, back = measure_disk.pages(1 << 16), measure_disk.pages(1 << 16)
    out[:] = measure_disk.random_bytes(1 << 16)
    with measure_disk.DirectFile(tmp_path) as file:
        assert not list(tmp_path.iterdir())
        file.write(out, 1 << 16)
        file.read(back, 1 << 16)
        assert back == out
        with pytest.raises(OSError, match="short"):
            file.read(back, 1 << 20)


@pytest.mark.parametrize("stage", ["fill", "mixed"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "no space"), "disk is full: .* 2 MB must be free; make space"),
        (OSError(errno.EDQUOT, "quota"), "disk is full"),
        (OSError(errno.EIO, "input/output error"), "disk fails: input/output error; name"),
    ],
)
def test_disk_errors_while_writing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: OSError,
    message: str,
) -> None:
    real, count = os.pwrite, iter(range(10**6))

    def pwrite(*args: Any) -> int:
        if stage == "fill" or next(count) >= 8 + 16 + 1:
            raise error
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StoreError, match=message):
        measure_disk.disk(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    monkeypatch.setattr(os, "preadv", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_disk.disk(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())
    if before:
        assert set(os.listdir("/proc/self/fd")) == before


def test_folders_that_cannot_be_used(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="nowhere is not a folder; create it or name another"):
        DeviceSpec.measure("cpu", tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is not a folder"):
        measure_disk.disk(tmp_path / "nowhere", 1 << 20)

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "mkstemp", refuse)
        with pytest.raises(StoreError, match=r"cannot write there .Read-only file system.; name"):
            DeviceSpec.measure("cpu", tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 20))
    with pytest.raises(StoreError, match="disk is full: to measure it, 2 MB must be free"):
        DeviceSpec.measure("cpu", tmp_path)
    assert not small.exists() or not list(small.glob("device-*"))


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert device.work_folder(None) == here
    monkeypatch.setattr(os, "access", lambda path, _: path != here)
    assert device.work_folder(None) == temporary
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert device.work_folder(None) == here


def test_ram_is_within_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < measure.ram() <= machine
    texts = {"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/memory.max": "12345\n"}
    texts["/sys/fs/cgroup/a/b/memory.max"] = "max\n"

    def read_text(path: Path, **_: object) -> str:
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert measure.ram() == 12345
