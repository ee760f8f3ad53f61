"""`zograph bench gpu`: blocks of a large OPT streamed from host memory through a GPU.

The step is held against the longer of what the same blocks take where they all stay on the GPU,
and what the host link takes for their bytes. The resident time is that of two depths that fit,
continued in a straight line.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
import zlib
from typing import Any

import torch
from torch import nn

import zograph
from zograph.cli import shapes
from zograph.cli.batches import make_batch
from zograph.cli.gpu import add_options, timed
from zograph.cli.inputs import InputError
from zograph.cli.output import check_file
from zograph.device import DeviceSpec
from zograph.step import ZOStep

SHALLOW = (1, 3)
"""Layers of the models that stay on the GPU."""


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "gpu",
        help="blocks of a large OPT streamed from host memory through a GPU",
        description="Train an OPT of some width, cut to a number of layers that host memory "
        "holds, with random weights streamed through a GPU within a memory budget; and shallow "
        "ones that stay on the GPU, for the time that their compute takes.",
    )
    parser.set_defaults(run=run)
    add_options(parser)
    budget = "bytes, such as 9GB, or minimum"
    parser.add_argument("--memory", default="9GB", metavar="BUDGET", help=budget)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    if not torch.cuda.is_available():
        raise InputError("bench gpu needs a CUDA device; bench offload runs on any machine")
    spec = DeviceSpec.measure("cuda")
    found = {depth: measured(args, depth, None) for depth in SHALLOW}
    first = measured(args, SHALLOW[0], args.memory)
    streamed = measured(args, args.layers, args.memory)
    low, high = (found[depth]["median"] for depth in SHALLOW)
    slope = (high - low) / (SHALLOW[1] - SHALLOW[0])
    moved = streamed["plan"]["bytes_moved"]
    up, down = moved["to_device"], moved["to_host"]
    result = {
        "device": spec.to_json(),
        "torch": torch.__version__,
        "options": {k: v for k, v in vars(args).items() if k not in ("run", "json")},
        "resident": found,
        "streamed": streamed,
        "compute_seconds": low + slope * (args.layers - SHALLOW[0]),
        "link_seconds": max(up / spec.to_device, down / spec.to_host, (up + down) / spec.link_both),
        "same_losses": first["losses"] == found[SHALLOW[0]]["losses"],
    }
    report(args, result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def measured(args: argparse.Namespace, layers: int, memory: str | None) -> dict[str, Any]:
    """Build a model of some depth and run steps of it."""
    start = time.perf_counter()
    config = shapes.known(args.shape)
    config.num_hidden_layers = layers
    model = random_model(config, getattr(torch, args.dtype))
    torch.manual_seed(0)
    batch = {n: t.cuda() for n, t in make_batch(config, args.batch, args.seq).items()}
    with zograph.compile(
        model, lr=1e-7, device="cuda", memory=memory, backend=args.backend
    ) as step:
        step.prepare(**batch)
        ready = time.perf_counter() - start
        found = take(step, batch, args.repeats)
        plan = step.plan.to_json() if step.streamed else None
    del model, step
    gc.collect()
    torch.cuda.empty_cache()
    return found | {"layers": layers, "plan": plan, "ready_seconds": ready}


def take(step: ZOStep, batch: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Warm up, time steps one by one, and count the host's waits in one more step."""
    found = timed(lambda: step(**batch), batch["input_ids"].numel(), repeats)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step(**batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return found | {"waits": [str(w.message).splitlines()[0] for w in waits]}


def random_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model in host memory with random weights, drawn on the GPU since that is fast."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None and id(p) not in made:
                made[id(p)] = nn.Parameter(drawn(f"{prefix}.{key}", p.shape, dtype))
            module._parameters[key] = None if p is None else made[id(p)]
    evaluated: nn.Module = model.eval()
    return evaluated


def drawn(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Return random values for one weight: as initialised, and no bias or scale left constant."""
    generator = torch.Generator("cuda").manual_seed(zlib.crc32(name.encode()))
    value = torch.empty(shape, dtype=dtype, device="cuda").normal_(0.0, 0.02, generator=generator)
    return (value.add_(1) if len(shape) == 1 and name.endswith("weight") else value).cpu()


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the figures."""
    streamed, plan = result["streamed"], result["streamed"]["plan"]
    bound = max(result["compute_seconds"], result["link_seconds"])
    print(
        f"{args.shape} of {args.layers} layers, {args.dtype}, {args.batch}x{args.seq}, "
        f"{args.backend}, torch {result['torch']}, {result['device']['name']}"
    )
    rows = [
        ("step", f"{streamed['median']:.3f} s, {streamed['tokens_per_second']:.0f} tokens/s"),
        ("predicted step", f"{plan['step_seconds']:.3f} s"),
        ("all resident", f"{result['compute_seconds']:.3f} s"),
        ("host link", f"{result['link_seconds']:.3f} s"),
        ("step / the longer", f"{streamed['median'] / bound:.2f}"),
        ("GPU memory", f"{streamed['peak_bytes'] / 1e9:.2f} GB ({args.memory})"),
        ("planned", f"{plan['device_bytes'] / 1e9:.2f} GB"),
        ("reserved by torch", f"{streamed['reserved_bytes'] / 1e9:.2f} GB"),
        ("host waits in a step", str(len(streamed["waits"]))),
        ("losses as resident", str(result["same_losses"])),
    ]
    for name, value in rows:
        print(f"  {name:<22}{value}")
