"""`zograph bench offload`: training what does not fit, against its budget, its bound and a peer.

Every configuration runs in a process of its own, in alternating rounds; ratios are of medians.
A step has two bounds: the longer of computing and moving, each alone; and the resident step beside
threads that move as many bytes and share nothing with it but the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from zograph.cli.inputs import InputError, integer
from zograph.cli.output import check_file

RESIDENT = "resident"
PEER_VARIANTS = ("update pass", "update on load", "update on load, blocks")
PEER_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Without it glibc keeps up to 1.5 GB of freed weights of the peer, which is no faster for that."""
LOSS_TOLERANCE = {"float32": 1e-5, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Relative, where Inductor compiles stages that are cut differently: docs/numerics.md grants it in
float32; in a narrower dtype one more value is rounded wherever a cut parts what would be fused."""


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "offload",
        help="a model streamed from disk against its budget, its bound and accelerate",
        description="Write a model with random weights to the disk, train it there within memory "
        "budgets and all in memory, each in a process of its own, and a plain MeZO loop over "
        "accelerate's disk offload beside it. opt-1.3b in both dtypes takes 8 GB of disk for the "
        "checkpoints, which are kept and used again, and 11 GB more while it runs.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--shape", default="opt-1.3b", help="as --model of bench step: a size of OPT or a folder")
    dtypes = ("bfloat16", "float32", "float16")
    add("--dtype", nargs="+", choices=dtypes, default=["bfloat16", "float32"], metavar="DTYPE")
    add("--memory", nargs="+", default=["1GB", "minimum"], metavar="BUDGET", help="of each run")
    add("--batch", type=integer(1), default=4, metavar="B", help="rows")
    add("--seq", type=integer(2), default=64, metavar="S", help="tokens a row")
    add("--threads", type=integer(1), default=2, metavar="N")
    add("--repeats", type=integer(1), default=3, metavar="N", help="timed steps a process")
    add("--rounds", type=integer(1), default=2, metavar="N", help="processes of each kind")
    add("--backend", choices=("inductor", "eager"), default="inductor")
    add("--folder", type=Path, default=Path("zograph-bench"), metavar="DIR", help="on the disk")
    add("--peer", action=argparse.BooleanOptionalAction, default=True, help="run accelerate too")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    if args.peer and importlib.util.find_spec("accelerate") is None:
        raise InputError("accelerate is not installed: pip install accelerate, or pass --no-peer")
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--folder {args.folder}: {error.strerror}") from error
    options = {k: v for k, v in vars(args).items() if k not in ("run", "json", "command")}
    result: dict[str, Any] = {"options": options | {"folder": str(args.folder)}, "dtypes": {}}
    for dtype in args.dtype:
        found = of_dtype(args, dtype)
        result["dtypes"][dtype] = found
        print_dtype(args, dtype, found)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def of_dtype(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Run everything for one dtype."""
    folder = args.folder.absolute()
    common = {
        **{k: getattr(args, k) for k in ("shape", "batch", "seq", "threads", "backend", "repeats")},
        "dtype": dtype,
        "folder": str(folder),
        "model": str(folder / f"{Path(args.shape).name}-{dtype}"),
        "tiny": str(folder / f"tiny-{dtype}"),
    }
    written = child(common, action="write")
    names = [RESIDENT, *args.memory]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    beside: dict[str, list[float]] = {name: [] for name in names}
    specs = []
    eager = args.backend == "eager"
    for _ in range(args.rounds):
        specs.append(measure(common))
        for name in names:
            done = step(common, name, metered=eager and name != RESIDENT)
            rounds[name].append(done)
            if name != RESIDENT and "infeasible" not in done:
                beside[name] += step(common, RESIDENT, beside=done["moved_bytes"])["seconds"]
    runs = {name: merged(found) for name, found in rounds.items()}
    for name in args.memory:
        if "infeasible" in runs[name]:
            continue
        runs[name]["beside_traffic"] = statistics.median(beside[name])
        if not eager:
            plain = common | {"backend": "eager", "repeats": 0}
            runs[name]["metered"] = step(plain, name, metered=True)["metered"]
    peers = run_peers(common) if args.peer else {}
    found = {
        "weights_bytes": written["weights_bytes"],
        "device": specs[-1],
        "disk_both": statistics.median(spec["disk_both"] for spec in specs),
        "runs": runs,
        "peers": peers,
    }
    return found | {"verdicts": verdicts(args, dtype, found)}


def measure(common: dict[str, Any]) -> dict[str, Any]:
    """Measure the machine as it is now; the children after it plan with these rates."""
    return child(common, action="measure")


def step(
    common: dict[str, Any], name: str, *, metered: bool = False, beside: Any = None
) -> dict[str, Any]:
    """Run steps of one configuration in a process, beside unrelated traffic of so many bytes."""
    memory = None if name == RESIDENT else name
    return child(common, action="step", memory=memory, metered=metered, beside=beside)


def run_peers(common: dict[str, Any]) -> dict[str, Any]:
    """Run each variant of the peer in a process."""
    found = {}
    for variant in PEER_VARIANTS:
        found[variant] = child(common, action="peer", variant=variant)
        found[variant]["median"] = statistics.median(found[variant]["seconds"])
    return found


def child(common: dict[str, Any], **request: Any) -> dict[str, Any]:
    """Run one request in a process of its own, with a work folder that goes when it ends.

    Raises
    ------
    InputError
        If it fails.
    """
    shown = [common["dtype"], *(str(v) for v in request.values() if isinstance(v, str))]
    print(f"running: {', '.join(shown)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=common["folder"]) as work:
        text = json.dumps({**common, **request, "work": work})
        done = subprocess.run(
            [sys.executable, "-m", "zograph.cli.bench_offload_child", text],
            env=os.environ | (PEER_ENVIRONMENT if request["action"] == "peer" else {}),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 2:
        raise InputError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        what = f"{request['action']} of {common['dtype']}, exit status {done.returncode}"
        raise InputError(f"a process of the benchmark failed ({what}):\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def merged(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last round's figures with all rounds' seconds, their median and highest peaks."""
    if "infeasible" in rounds[-1]:
        return rounds[-1]
    seconds = [s for found in rounds for s in found["seconds"]]
    peaks = ("peak_bytes", "compile_peak_bytes", "step_peak_bytes")
    return {
        **rounds[-1],
        **{name: max(found[name] for found in rounds) for name in peaks},
        "seconds": seconds,
        "median": statistics.median(seconds),
        "same_every_round": all(found["losses"] == rounds[0]["losses"] for found in rounds),
    }


def verdicts(args: argparse.Namespace, dtype: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare what was found with the aims."""
    rows: list[dict[str, Any]] = []
    runs, peers = found["runs"], found["peers"]
    base, peer = runs[RESIDENT], fastest(peers)

    def row(budget: str, aim: str, shown: str, met: bool) -> None:
        rows.append({"budget": budget, "aim": aim, "found": shown, "met": bool(met)})

    for name in args.memory:
        streamed = runs[name]
        if "infeasible" in streamed:
            row(name, "feasible", f"needs {streamed['minimum']:,} bytes", False)
            continue
        plan, metered = streamed["plan"], streamed["metered"]
        budget = budget_bytes(name, plan)
        ratio = streamed["peak_bytes"] / budget
        row(name, "process peak <= 1.10 of the budget", f"{ratio:.3f}", ratio <= 1.10)
        ratio = metered["total"] / plan["device_bytes"]
        row(name, "arena and activations within 5 % of the plan", f"{ratio:.3f}",
            0.95 <= ratio <= 1.05)  # fmt: skip
        streamed["bound"] = max(base["median"], sum(streamed["moved_bytes"].values())
                                / found["disk_both"])  # fmt: skip
        ratio = streamed["median"] / streamed["bound"]
        row(name, "step <= 1.10 of the bound", f"{ratio:.3f}", ratio <= 1.10)
        ratio = streamed["median"] / streamed["beside_traffic"]
        row(name, "step <= 1.10 of resident beside such traffic", f"{ratio:.3f}", ratio <= 1.10)
        exact = args.backend == "eager" or plan["cut"] == base["plan"]["cut"]
        worst = difference(base["losses"], streamed["losses"])
        limit = 0.0 if exact else LOSS_TOLERANCE[dtype]
        same = streamed["same_every_round"] and worst <= limit
        aim = "bit for bit" if exact else f"within {limit:.0e} (other cut, Inductor)"
        row(name, f"losses equal {aim}", f"{worst:.1e}", same)
        if peer:
            ratio = peer["median"] / streamed["median"]
            row(name, "at least 3 x as fast as accelerate", f"{ratio:.2f}", ratio >= 3)
            if name == "minimum":
                ratio = streamed["peak_bytes"] / peer["peak_bytes"]
                row(name, "peak <= accelerate's", f"{ratio:.2f}", ratio <= 1)
    return rows


def budget_bytes(name: str, plan: dict[str, Any]) -> int:
    """Return what a budget is in bytes; the smallest is what the plan takes."""
    from zograph.options import device_memory, parse_memory, pick_device

    budget = parse_memory(name, device_memory(pick_device("cpu")))
    return budget if isinstance(budget, int) else int(plan["device_bytes"])


def fastest(peers: dict[str, Any]) -> dict[str, Any]:
    """Return the peer's best setting; empty if it did not run."""
    return min(peers.values(), key=lambda p: float(p["median"]), default={})


def difference(a: list[list[float]], b: list[list[float]]) -> float:
    """Return the largest relative difference of two runs' losses; 0.0 says equal bits."""
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return max((abs(x - y) / abs(x) for x, y in pairs if x != y), default=0.0)


def print_dtype(args: argparse.Namespace, dtype: str, found: dict[str, Any]) -> None:
    """Print the tables of one dtype."""
    print(
        f"\n{args.shape} {dtype}, {found['weights_bytes'] / 1e9:.2f} GB of weights, "
        f"{args.batch}x{args.seq} tokens, {args.threads} threads, backend {args.backend}; disk "
        f"{found['disk_both'] / 1e9:.2f} GB/s reading and writing at once"
    )
    head = ("seconds", "bound", "beside", "read GB", "written GB", "overlap", "planned", "peak MB",
            "steps MB", "plan MB")  # fmt: skip
    print(f"{'':30}" + "".join(f"{h:>12}" for h in head))
    for name, run in found["runs"].items():
        if "infeasible" in run:
            print(f"{name:30}  {run['infeasible']}")
            continue
        moved, overlap, plan = run["moved_bytes"], run["overlap"], run["plan"]
        cells = (
            f"{run['median']:.3f}",
            *(f"{run[k]:.3f}" if k in run else "" for k in ("bound", "beside_traffic")),
            f"{moved['read'] / 1e9:.2f}",
            f"{moved['write'] / 1e9:.2f}",
            "" if overlap is None else f"{overlap:.3f}",
            "" if overlap is None else f"{plan['overlap']:.3f}",
            *(f"{n / 1e6:.0f}" for n in (run["peak_bytes"], run["step_peak_bytes"])),
            f"{plan['device_bytes'] / 1e6:.0f}",
        )
        print(f"{name:30}" + "".join(f"{c:>12}" for c in cells))
    for variant, peer in found["peers"].items():
        label = f"accelerate, {variant}"
        print(f"{label:32}{peer['median']:10.3f}{peer['peak_bytes'] / 1e6:84.0f}")
    print(f"\n{'budget':10}{'aim':52}{'found':>14}  verdict")
    for row in found["verdicts"]:
        shown = "met" if row["met"] else "missed"
        print(f"{row['budget']:10}{row['aim']:52}{row['found']:>14}  {shown}")
