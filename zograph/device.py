"""What a machine can do, as numbers: the cost model of plans and schedules."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from zograph import kernels, measure
from zograph.errors import OptionError, StoreError
from zograph.kernels.build import cache_dir
from zograph.measure_disk import takes_file
from zograph.options import one_of, pick_device
from zograph.presets import preset_fields

KINDS = ("cpu", "cuda")
_FORMAT = 1
"""Part of a cache file's name: raised when a field's meaning or its measurement changes."""
_unsaved: dict[Path, DeviceSpec] = {}
"""What was measured while the cache folder could not be written."""


@dataclass(frozen=True)
class DeviceSpec:
    """Rates and sizes of a device, its host link and its disk; all positive and finite.

    Raises
    ------
    OptionError
        For a value that cannot be.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory: int
    """Bytes of the device; on a CPU the RAM that the process may use."""
    host_memory: int
    """Bytes of RAM that the process may use."""
    gemm: Mapping[str, float] = field(hash=False)
    """Achieved FLOP/s by dtype name: float32, bfloat16, float16."""
    bandwidth: float
    """Bytes/s of device memory in memory-bound operators, reads and writes counted."""
    noise: float
    """Elements/s of one materialize pair: both perturbed copies, no pending term, float32
    (a preset: float16)."""
    fold: float
    """Elements/s of one fold term, in the same dtype."""
    to_device: float
    """Bytes/s of the host link alone; on a CPU of a RAM-to-RAM copy by one worker thread."""
    to_host: float
    link_both: float
    """Bytes/s in total when both directions run at once."""
    read: float
    """Bytes/s of the disk, reading alone."""
    write: float
    disk_both: float
    """Bytes/s in total, as many read as written, when both run at once."""

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        object.__setattr__(self, "gemm", dict(self.gemm))
        rates = {f"gemm[{name!r}]": rate for name, rate in self.gemm.items()}
        for f in dataclasses.fields(self)[2:]:
            if f.name != "gemm":
                rates[f.name] = getattr(self, f.name)
        for name, value in rates.items():
            kinds = (int,) if name in ("memory", "host_memory") else (int, float)
            if type(value) not in kinds or not math.isfinite(value) or value <= 0:
                what = "whole number of bytes" if kinds == (int,) else "finite number"
                raise OptionError(f"DeviceSpec {name} is {value!r}; it must be a positive {what}.")

    def seconds(self, work: Iterable[tuple[str, int, int]], noise: int = 0, fold: int = 0) -> float:
        """Predict the compute time of operators that run one after the other.

        Parameters
        ----------
        work
            Per operator: dtype name, floating-point operations, bytes read and written. It takes
            the longer of arithmetic and traffic; a dtype without a rate counts as traffic only.
        noise
            Elements of which both perturbed copies are made.
        fold
            Elements times terms folded.
        """
        total = noise / self.noise + fold / self.fold
        for dtype, flops, nbytes in work:
            total += max(flops / self.gemm.get(dtype, math.inf), nbytes / self.bandwidth)
        return total

    def with_link(self, bytes_per_second: float) -> DeviceSpec:
        """Return this device behind another host link, full duplex at that rate each way."""
        rate = float(bytes_per_second)
        return dataclasses.replace(self, to_device=rate, to_host=rate, link_both=2 * rate)

    def with_memory(self, memory: int, host_memory: int | None = None) -> DeviceSpec:
        """Return this device with other memory sizes, in bytes; host memory stays by default."""
        host = self.host_memory if host_memory is None else host_memory
        return dataclasses.replace(self, memory=memory, host_memory=host)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that ``json`` can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> DeviceSpec:
        """Return the spec that :meth:`to_json` gave.

        Raises
        ------
        OptionError
            If fields are missing, unknown or of a wrong type.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            found = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise OptionError(f"a DeviceSpec has the fields {sorted(names)}, got {found}.")
        if not isinstance(data["name"], str) or not isinstance(data["gemm"], Mapping):
            raise OptionError("a DeviceSpec's name is a string and its gemm a mapping.")
        return cls(**data)

    @classmethod
    def preset(cls, name: str, link: Literal["slow", "fast"] = "slow") -> DeviceSpec:
        """Return a device known from public datasheets: see :mod:`zograph.presets`.

        Parameters
        ----------
        name
            ``rtx4090-24gb``, ``a100-40gb``, ``a100-80gb`` or ``h200``.
        link
            ``slow``: the host link that the card has; ``fast``: the next PCIe generation.

        Raises
        ------
        OptionError
            If the name or the link is unknown; the message lists the known ones.
        """
        return cls(**preset_fields(name, link))

    @classmethod
    def measure(
        cls,
        device: str | torch.device | None = None,
        folder: str | Path | None = None,
        *,
        refresh: bool = False,
    ) -> DeviceSpec:
        """Measure this machine, once: the rates are kept in zograph's cache folder.

        Takes some ten seconds and, for that time, 0.5 GB of RAM and a file of 256 MB in `folder`.
        Memory sizes are asked anew each time. Keep the machine idle: a neighbour's load goes into
        the numbers.

        Parameters
        ----------
        device
            ``cpu`` or ``cuda``; CUDA if there is one by default.
        folder
            Where stored weights will live: the disk that is measured. By default the working
            directory, or the system's folder for temporary files if that cannot take the file.
        refresh
            Measure even if kept numbers are there.

        Raises
        ------
        OptionError
            If the device is not there.
        StoreError
            If the folder is missing, read-only or full.
        """
        chosen, where = pick_device(device), work_folder(folder)
        path = cache_path(chosen, where)
        spec = None if refresh else kept(path)
        if spec is None:
            spec = cls(**_describe(chosen), **measure.rates(chosen, where))
            _save(path, spec)
        return dataclasses.replace(spec, **_describe(chosen))


def work_folder(folder: str | Path | None) -> Path:
    """Return the folder whose disk :meth:`DeviceSpec.measure` measures."""
    if folder is not None:
        if not Path(folder).is_dir():
            raise StoreError(f"{folder} is not a folder; create it or name another.")
        return Path(folder)
    for place in (Path.cwd(), Path(tempfile.gettempdir())):
        if takes_file(place, measure.SIZES.disk):
            return place
    return Path.cwd()


def cache_path(device: torch.device, folder: Path) -> Path:
    """Return the file that keeps what was measured for this machine, torch and file system."""
    disk = f"{os.stat(folder).st_dev} {os.statvfs(folder).f_fsid}"
    parts = [_FORMAT, _describe(device)["name"], measure.cpu_name(), torch.get_num_threads()]
    parts += [torch.__version__, kernels.available(), disk]
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).hexdigest()
    return cache_dir() / f"device-{device.type}-{digest}.json"


def _describe(device: torch.device) -> dict[str, Any]:
    """Return what is asked of the system rather than measured."""
    ram = measure.ram()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {
            "name": str(card.name),
            "kind": "cuda",
            "memory": int(card.total_memory),
            "host_memory": ram,
        }
    name = f"{measure.cpu_name()}, {torch.get_num_threads()} threads"
    return {"name": name, "kind": "cpu", "memory": ram, "host_memory": ram}


def kept(path: Path) -> DeviceSpec | None:
    """Return the spec that a cache file keeps; None if there is none or it is damaged."""
    try:
        return DeviceSpec.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return _unsaved.get(path)


def _save(path: Path, spec: DeviceSpec) -> None:
    """Keep a spec, whole or not at all; where that fails, for this process only."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(spec.to_json(), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        _unsaved[path] = spec
        with contextlib.suppress(OSError):
            partial.unlink()
