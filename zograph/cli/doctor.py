"""`zograph doctor`: what is installed here, and what this machine can do."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zograph.cli.output import check_file

if TYPE_CHECKING:
    from zograph.device import DeviceSpec

FIELDS = (
    ("bandwidth", "memory bandwidth", "B/s"),
    ("noise", "perturbed pairs", "elements/s"),
    ("fold", "fold of a term", "elements/s"),
    ("to_device", "host to device", "B/s"),
    ("to_host", "device to host", "B/s"),
    ("link_both", "both ways, total", "B/s"),
    ("read", "disk read", "B/s"),
    ("write", "disk write", "B/s"),
    ("disk_both", "disk both, total", "B/s"),
)
"""Fields of a DeviceSpec beside gemm and the memory sizes, with their label and unit."""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="check the installation and measure what the machine can do",
        description="Print versions, compiler, memory limits and devices; then the rates that "
        "plans are made with, measured once (some ten seconds) and kept.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA if there is one")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where weights will be stored (default: here)"
    )
    parser.add_argument("--refresh", action="store_true", help="measure again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from zograph.device import DeviceSpec, cache_path, kept, work_folder
    from zograph.options import pick_device

    if args.json:
        check_file(args.json, "--json")
    device = pick_device(args.device)
    result = inspect()
    print_installation(result)
    folder = work_folder(args.folder)
    path = cache_path(device, folder)
    known = not args.refresh and kept(path) is not None
    if not known:
        print("\nmeasuring; the machine should be idle ...", flush=True)
    spec = DeviceSpec.measure(device, folder, refresh=args.refresh)
    print_spec(spec, folder)
    saved = path.exists()
    print(f"measured {'before' if known else 'now'}, ", end="")
    print(f"kept in {path}" if saved else f"not kept: {path.parent} cannot be written")
    result |= {
        "folder": str(folder.absolute()),
        "cache": str(path) if saved else None,
        "device": spec.to_json(),
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def inspect() -> dict[str, Any]:
    """Return what is installed and allowed; nothing is measured."""
    import platform
    import resource
    from importlib.metadata import version

    import torch

    import zograph
    from zograph import kernels, measure

    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    count = torch.cuda.device_count()
    return {
        "versions": {
            "zograph": zograph.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "kernels": {"available": kernels.available(), "reason": kernels.reason()},
        "ram": measure.ram(),
        "locked_memory": None if locked == resource.RLIM_INFINITY else locked,
        "cuda": [torch.cuda.get_device_name(i) for i in range(count)],
        "dot": shutil.which("dot"),
    }


def print_installation(result: dict[str, Any]) -> None:
    """Print what :func:`inspect` found."""
    from zograph.kernels.build import compilers

    native, locked = result["kernels"], result["locked_memory"]
    why = "\n                 ".join((native["reason"] or "").splitlines())
    rows = {
        **result["versions"],
        "threads": f"{result['threads']} of {result['cores']} cores",
        "compiler": ", ".join(" ".join(c) for c in compilers()) or "none",
        "kernels": "compiled" if native["available"] else f"torch only: {why}",
        "memory": f"{scaled(result['ram'], 'B')} may be used",
        "locked memory": "unlimited" if locked is None else f"at most {scaled(locked, 'B')}",
        "CUDA devices": ", ".join(result["cuda"]) or "none",
        "dot": result["dot"] or "none: pictures are written as .dot only; install graphviz",
    }
    for label, value in rows.items():
        print(f"{label:15}  {value}")


def print_spec(spec: DeviceSpec, folder: Path) -> None:
    """Print a DeviceSpec as a table."""
    print(f"\n{spec.name} ({spec.kind}), disk of {folder.absolute()}")
    rows = [("memory", scaled(spec.memory, "B")), ("host memory", scaled(spec.host_memory, "B"))]
    rows += [(f"matrices {name}", scaled(rate, "FLOP/s")) for name, rate in spec.gemm.items()]
    rows += [(label, scaled(getattr(spec, name), unit)) for name, label, unit in FIELDS]
    for label, text in rows:
        number, _, unit = text.partition(" ")
        print(f"  {label:18}{number:>8} {unit}")


def scaled(value: float, unit: str) -> str:
    """Return a value of one to three digits before the point, with a decimal prefix."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
    space = " " if unit == "elements/s" else ""
    return f"{value:.{digits}f} {prefixes[0]}{space}{unit}".replace("  ", " ")
