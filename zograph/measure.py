"""What this machine does a second, from short runs on random data.

Every rate is the median of several runs after one that is not counted; a run that takes long is
repeated less. Everything runs with torch's current number of threads and leaves torch's random
state alone. The link of a CPU is a copy in RAM, as worker threads make it. For the disk see
:mod:`zograph.measure_disk`.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from zograph.measure_disk import disk
from zograph.ops import fold_
from zograph.pool import pool


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    tokens: int = 256
    """Rows of the matrix products on a CPU; eight times as many on CUDA."""
    width: int = 2048
    """Of a transformer block: width x width, width x 4 width and 4 width x width."""
    elements: int = 1 << 24
    """Perturbed and folded."""
    copy: int = 128 << 20
    """Bytes of a tensor that is copied, more than fits into caches; half of it on two threads."""
    disk: int = 256 << 20
    """Bytes of the file on the disk."""
    repeats: int = 5
    """More if they are short: until a twentieth of `limit` has passed."""
    limit: float = 1.0
    """Seconds after which a measurement is not repeated any more."""


SIZES = Sizes()


class Rates(TypedDict):
    """The measured fields of :class:`zograph.device.DeviceSpec`."""

    gemm: dict[str, float]
    bandwidth: float
    noise: float
    fold: float
    to_device: float
    to_host: float
    link_both: float
    read: float
    write: float
    disk_both: float


def rates(device: torch.device, folder: Path) -> Rates:
    """Measure everything, the disk first, since it alone can refuse.

    Raises
    ------
    StoreError
        If the folder cannot take the file.
    """
    read, write, disk_both = disk(folder, SIZES.disk)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    with torch.no_grad(), torch.cuda.device(device if device.type == "cuda" else -1):
        noise, fold = perturbation(device)
        to_device, to_host, link_both = link(device)
        return {
            "gemm": {str(d).removeprefix("torch."): gemm(device, d) for d in dtypes},
            "bandwidth": bandwidth(device),
            "noise": noise,
            "fold": fold,
            "to_device": to_device,
            "to_host": to_host,
            "link_both": link_both,
            "read": read,
            "write": write,
            "disk_both": disk_both,
        }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a run, after one that is not counted."""
    run()
    times: list[float] = []
    while sum(times) < (SIZES.limit if len(times) < SIZES.repeats else SIZES.limit / 20):
        if device.type == "cuda":
            start, end = _event(), _event()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def gemm(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of a transformer block's linear layers.

    A quarter of the width comes first: if that is slow, as float16 is on many CPUs, it stands.
    """
    rows = SIZES.tokens * (8 if device.type == "cuda" else 1)
    rate = 0.0
    for width in (SIZES.width // 4, SIZES.width):
        shapes = ((width, width), (4 * width, width), (width, 4 * width))  # out, in
        flops = 2 * rows * sum(out * inner for out, inner in shapes)
        if rate and flops / rate > SIZES.limit:
            break
        layers = [
            (_random((rows, inner), device, dtype), _random((out, inner), device, dtype))
            for out, inner in shapes
        ]
        rate = flops / seconds(partial(_apply, layers), device)
    return rate


def _apply(layers: list[tuple[Tensor, Tensor]]) -> None:
    for x, weight in layers:
        torch.nn.functional.linear(x, weight)


def bandwidth(device: torch.device) -> float:
    """Return bytes/s, read and written, of copying a tensor within the device's memory."""
    source = _random((SIZES.copy // 4,), device)
    target = source.clone()
    return 2 * 4 * source.numel() / seconds(lambda: target.copy_(source), device)


def perturbation(device: torch.device) -> tuple[float, float]:
    """Return elements/s of both perturbed copies and of folding one term, in float32."""
    base = _random((SIZES.elements,), device)
    one = torch.tensor([17], device=device)
    eps = torch.tensor(1e-3, device=device)
    term = (one, torch.tensor([1e-6], device=device), torch.ones(1, device=device))
    none = tuple(t[:0] for t in term)
    keys = torch.tensor([[17, 0]], device=device)
    rest = (keys, 0, one.view(()), eps, torch.float32, "normal", True)
    pair = seconds(lambda: torch.ops.zograph.materialize(base, *none, *rest), device)
    fold = seconds(lambda: fold_(base, *term, 17), device)
    pool.clear()
    return base.numel() / pair, base.numel() / fold


def link(device: torch.device) -> tuple[float, float, float]:
    """Return bytes/s from host to device and back alone, and the total of both at once."""
    if device.type == "cuda":
        return _cuda_link(device)
    cpu = torch.device("cpu")
    sources = [_random((SIZES.copy // 8,), cpu).numpy() for _ in range(2)]
    targets = [source.copy() for source in sources]
    with ThreadPoolExecutor(2) as workers:

        def copy(count: int) -> None:
            pairs = zip(targets[:count], sources, strict=False)
            _finish([workers.submit(np.copyto, t, s) for t, s in pairs])

        nbytes = sources[0].nbytes
        alone = nbytes / seconds(lambda: copy(1), cpu)
        return alone, alone, 2 * nbytes / seconds(lambda: copy(2), cpu)


def _cuda_link(device: torch.device) -> tuple[float, float, float]:
    """Copy between pinned host memory and the device on two streams."""
    there = [_random((SIZES.copy // 4,), device) for _ in range(2)]
    here = [t.cpu().pin_memory() for t in there]
    up, down = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]
    lanes = ((up, there[0], here[0]), (down, here[1], there[1]))

    def copy(*which: int) -> None:
        current = torch.cuda.current_stream()
        for stream, _, _ in (lanes[k] for k in which):
            stream.wait_stream(current)
        for stream, target, source in (lanes[k] for k in which):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        for stream, _, _ in (lanes[k] for k in which):
            current.wait_stream(stream)

    nbytes = 4 * here[0].numel()
    times = [seconds(partial(copy, *which), device) for which in ((0,), (1,), (0, 1))]
    return nbytes / times[0], nbytes / times[1], 2 * nbytes / times[2]


def _random(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _finish(futures: list[Future[Any]]) -> None:
    for future in futures:
        future.result()


def cpu_name() -> str:
    """Return the processor's name as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def ram() -> int:
    """Return the bytes of RAM that this process may use.

    The machine's, or less where the process's control group or one above it has a limit.
    """
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    files = [Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]  # version 1
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("::/")[2]
    except OSError:
        group = ""
    inner = Path("/sys/fs/cgroup", group.strip())
    files += [p / "memory.max" for p in (inner, *inner.parents)]
    for file in files:
        try:
            sizes.append(int(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return min(sizes)
