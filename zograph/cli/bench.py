"""`zograph bench`: the compiled step against two forwards and a plain MeZO step."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from zograph.cli import (
    anderson,
    bench_accuracy,
    bench_gpu,
    bench_noise,
    bench_offload,
    bench_replay,
    bench_trajectory,
    bench_transfers,
    bench_zo2,
    shapes,
)
from zograph.cli.batches import make_batch
from zograph.cli.inputs import InputError, integer
from zograph.cli.output import check_file


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    bench: argparse.ArgumentParser = subparsers.add_parser("bench", help="measure this machine")
    kinds = bench.add_subparsers(dest="kind", metavar="KIND", required=True)
    parser = kinds.add_parser(
        "step",
        help="a step against two forwards and a plain MeZO step",
        description="Time two eager forwards, a plain MeZO step and the zograph step without and "
        "with a log, alternating in one run, at random weights; then compile times in fresh "
        "processes.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model", default="opt-125m", help="a published size such as opt-125m, or a folder"
    )
    parser.add_argument("--batch", type=integer(1), default=4, metavar="B", help="rows")
    parser.add_argument("--seq", type=integer(2), default=64, metavar="S", help="tokens a row")
    parser.add_argument("--threads", type=integer(1), default=2, metavar="N")
    parser.add_argument("--repeats", type=integer(1), default=7, metavar="N", help="of each")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--no-compile-times", action="store_true", help="only time the steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    bench_offload.add_parser(kinds)
    bench_gpu.add_parser(kinds)
    bench_zo2.add_parser(kinds)
    bench_accuracy.add_parser(kinds)
    bench_replay.add_parser(kinds)
    bench_transfers.add_parser(kinds)
    bench_trajectory.add_parser(kinds)
    bench_noise.add_parser(kinds)
    anderson.add_parser(kinds)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    result = measure_steps(args)
    print_steps(result)
    if not args.no_compile_times:
        result["compile"] = measure_compile(args)
        print_compile(result["compile"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def config_of(name: str, option: str = "--model") -> Any:
    """Return the config of a published size, or of a folder."""
    from transformers import AutoConfig

    if (found := shapes.known(name)) is not None:
        return found
    if Path(name).is_dir():
        return AutoConfig.from_pretrained(name)
    raise InputError(f"{option} {name}: no folder; known sizes are {', '.join(shapes.names())}")


def build(name: str, layers: int | None = None) -> Any:
    """Build a model of a published size, or of a folder's config, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    if layers:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Time the contestants, alternating; report medians, ratios and peak memory."""
    import torch

    import zograph
    from zograph.cli.contest import Contest

    torch.set_num_threads(args.threads)
    model = build(args.model)
    batch = make_batch(model.config, args.batch, args.seq)
    options: dict[str, Any] = {"lr": 1e-7, "device": "cpu", "backend": args.backend}
    step = zograph.compile(model, **options)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        logged = zograph.compile(build(args.model), **options, log=Path(folder) / "run.zolog")
        result = Contest(model, batch, step, logged).run(args.repeats)
        logged.close()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "model": args.model,
        "batch": args.batch,
        "seq": args.seq,
        "threads": args.threads,
        "dtype": "float32",
        "backend": step.options.backend,
        "torch": torch.__version__,
        "weights_bytes": weights,
        **result,
    }


def measure_compile(args: argparse.Namespace) -> dict[str, Any]:
    """Time `prepare` in fresh processes: cold, with a warm cache, and at twice the depth."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        layers = config_of(args.model).num_hidden_layers
        cold = child(args, layers, one)
        return {
            "layers": layers,
            "cold": cold,
            "warm": child(args, layers, one),
            "double_depth": child(args, 2 * layers, two),
        }


def child(args: argparse.Namespace, layers: int, cache: str) -> dict[str, Any]:
    """Compile in a process of its own with its own Inductor cache."""
    kept = ("model", "batch", "seq", "threads", "backend")
    options = {name: getattr(args, name) for name in kept}
    code = f"from zograph.cli.bench import report_compile as r; r({options!r}, {layers})"
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"the compile benchmark failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report_compile(options: dict[str, Any], layers: int) -> None:
    """Print the compile times of one model as JSON; runs in a child process."""
    import time

    import torch

    import zograph
    from zograph import printer

    torch.set_num_threads(options["threads"])
    model = build(options["model"], layers)
    batch = make_batch(model.config, options["batch"], options["seq"])
    start = time.perf_counter()
    step = zograph.compile(model, device="cpu", backend=options["backend"])
    step.prepare(**batch)
    total = time.perf_counter() - start
    bodies = len(printer.bodies(step.graph))
    print(json.dumps({"seconds": total, "bodies": bodies, "passes": step.compile_seconds}))


def print_steps(result: dict[str, Any]) -> None:
    """Print the table of step times."""
    print(
        f"{result['model']} {result['batch']}x{result['seq']} tokens, {result['dtype']}, "
        f"{result['threads']} threads, backend {result['backend']}"
    )
    print(f"{'':24}{'median s':>10}{'of two forwards':>17}{'peak over weights':>19}")
    for name, row in result["contestants"].items():
        peak = row["peak_bytes"]
        shown = "?" if peak is None else f"{peak / 2**20:.0f} MiB"
        print(f"{name:24}{row['median']:10.3f}{row['ratio']:17.2f}{shown:>19}")
    plain, logged = (result["contestants"][f"zograph step{s}"] for s in ("", " with log"))
    print(f"a step with a log takes {logged['median'] / plain['median']:.3f} of one without")


def print_compile(result: dict[str, Any]) -> None:
    """Print the compile times and the ratios that matter."""
    cold, warm, deep = (result[k] for k in ("cold", "warm", "double_depth"))
    front = sum(s for name, s in cold["passes"].items() if name != "lower")
    print(
        f"compile {cold['seconds']:.1f} s cold (capture and passes {front:.1f} s, "
        f"{cold['bodies']} bodies), {warm['seconds']:.1f} s with a warm cache "
        f"({warm['seconds'] / cold['seconds']:.2f}x)"
    )
    print(
        f"{2 * result['layers']} layers against {result['layers']}: {deep['seconds']:.1f} s "
        f"({deep['seconds'] / cold['seconds']:.2f}x), {deep['bodies']} bodies"
    )
