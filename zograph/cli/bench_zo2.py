"""`zograph bench zo2`: ZO2 on its own nanoGPT, and zograph on the plain form of the same model.

ZO2 (github.com/liangyuwang/zo2, arXiv 2503.12668) is run from a clone, as it is, at the settings of
its own speed test: everything offloaded to pinned host memory, transfers overlapped. Each system
runs in a process of its own, on the same weights and tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import zograph
from zograph.cli import shapes
from zograph.cli.gpu import add_options, timed
from zograph.cli.inputs import InputError
from zograph.cli.output import check_file

EPS, LR, DECAY = 1e-3, 1e-7, 0.1
PART = 1 << 27
"""Elements that are drawn at a time."""
PIN_FAST = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
"""Shortens ZO2's first step, which pins everything; no influence on the others."""


def add_parser(kinds: Any) -> None:
    """Register the kind of benchmark."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "zo2",
        help="ZO2 from a clone of its repository beside zograph, on a GPU",
        description="Time steps of ZO2 on its own nanoGPT of an OPT's width, and of zograph on the "
        "plain form of the same model with the same weights and tokens.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("clone", type=Path, metavar="CLONE", help="of github.com/liangyuwang/zo2")
    add_options(parser)
    parser.add_argument(
        "--memory", nargs="+", default=["9GB", "minimum"], metavar="BUDGET", help="of zograph"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if args.json:
        check_file(args.json, "--json")
    if not (args.clone / "zo2" / "model" / "nanogpt").is_dir():
        raise InputError(f"{args.clone} is no clone of github.com/liangyuwang/zo2")
    if not torch.cuda.is_available():
        raise InputError("bench zo2 needs a CUDA device: ZO2 runs on nothing else")
    options = {k: v for k, v in vars(args).items() if k not in ("run", "json", "clone", "memory")}
    common = options | {"clone": str(args.clone.absolute())}
    result = {"ZO2": child(common | {"system": "zo2"})}
    for memory in args.memory:
        result[f"zograph {memory}"] = child(common | {"system": "zograph", "memory": memory})
    print(f"{'':<20}{'s a step':>10}{'tokens/s':>10}{'allocated GB':>14}{'reserved GB':>13}")
    for name, found in result.items():
        print(
            f"{name:<20}{found['median']:>10.3f}{found['tokens_per_second']:>10.0f}"
            f"{found['peak_bytes'] / 1e9:>14.2f}{found['reserved_bytes'] / 1e9:>13.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Run one system in a process of its own.

    Raises
    ------
    InputError
        If it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "zograph.cli.bench_zo2", json.dumps(request)],
        env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": PIN_FAST},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"the process of {request['system']} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def of_zo2(request: dict[str, Any], model_part: Any) -> Callable[[], Any]:
    """Build ZO2's offloaded model; return what takes a step."""
    settings = importlib.import_module("zo2.config.mezo_sgd").MeZOSGDConfig(
        lr=LR,
        weight_decay=DECAY,
        eps=EPS,
        offloading_device="cpu",
        working_device="cuda:0",
        overlap=True,
        precision_on_offloading_device=dtype_of(request),
    )
    settings.zo2 = True
    importlib.import_module("zo2.utils.utils").seed_everything(42)
    make = importlib.import_module("zo2.model.nanogpt.mezo_sgd").get_nanogpt_mezo_sgd
    with unfilled(dtype_of(request)):
        model = make(settings)(config_of(request, model_part), settings)
    fill(model, request)
    tokens, targets = (t.cuda() for t in batch_of(request))
    positions = torch.arange(request["seq"], device="cuda:0").unsqueeze(0)

    def step() -> Any:
        model.zo_train()
        loss = model(tokens, positions, targets)
        # ZO2 leaves an update of exactly zero out, which half-precision losses often give; a tiny
        # one lets every timed step do the work of one.
        model.opt.projected_grad = model.opt.projected_grad or 1e-20
        return loss

    return step


def of_zograph(request: dict[str, Any], model_part: Any) -> Callable[[], Any]:
    """Compile the plain model; return what takes a step."""
    with unfilled(dtype_of(request)):
        model = model_part.GPT(config_of(request, model_part))
    fill(model, request)
    tokens, targets = (t.cuda() for t in batch_of(request))

    def loss(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        return model(tokens, positions, targets)[1]

    step = zograph.compile(
        model,
        loss_fn=loss,
        lr=LR,
        eps=EPS,
        weight_decay=DECAY,
        device="cuda",
        memory=request["memory"],
        backend=request["backend"],
    )
    step.prepare(tokens=tokens, targets=targets)
    return lambda: step(tokens=tokens, targets=targets)


def dtype_of(request: dict[str, Any]) -> torch.dtype:
    """Return the dtype that is asked for."""
    found: torch.dtype = getattr(torch, request["dtype"])
    return found


def config_of(request: dict[str, Any], model_part: Any) -> Any:
    """Return nanoGPT's config for an OPT's width, heads and vocabulary."""
    opt = shapes.known(request["shape"])
    return model_part.GPTConfig(
        block_size=max(request["seq"], opt.max_position_embeddings),
        vocab_size=opt.vocab_size,
        n_layer=request["layers"],
        n_head=opt.num_attention_heads,
        n_embd=opt.hidden_size,
    )


def batch_of(request: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens, and the next ones as targets."""
    generator = torch.Generator().manual_seed(42)
    shape = (request["batch"], request["seq"] + 1)
    data = torch.randint(0, shapes.known(request["shape"]).vocab_size, shape, generator=generator)
    return data[:, :-1].contiguous(), data[:, 1:].contiguous()


@contextlib.contextmanager
def unfilled(dtype: torch.dtype) -> Iterator[None]:
    """Build modules of a dtype without the minutes that random weights take on a CPU."""

    def keep(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        same: Any = dict.fromkeys(("normal_", "uniform_", "zeros_", "kaiming_uniform_"), keep)
        with (
            contextlib.redirect_stdout(sys.stderr),
            mock.patch.multiple(nn.init, **same),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(model: nn.Module, request: dict[str, Any]) -> None:
    """Give matrices random values, drawn on the GPU; layer norms 1, biases 0, as nanoGPT does."""
    generator = torch.Generator("cuda").manual_seed(42)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            p.fill_(float(".ln_" in name and name.endswith("weight")))
            continue
        for part in torch.split(p.view(-1), PART):
            made = torch.empty(part.shape, dtype=p.dtype, device="cuda")
            part.copy_(made.normal_(0.0, 0.02, generator=generator))


def main() -> None:
    """Carry out the request in the first argument."""
    request = json.loads(sys.argv[1])
    # The package's own __init__ imports models that are tied to one release of transformers.
    package = types.ModuleType("zo2")
    package.__path__ = [str(Path(request["clone"]) / "zo2")]
    sys.modules["zo2"] = package
    model_part = importlib.import_module("zo2.model.nanogpt.model")
    system = of_zo2 if request["system"] == "zo2" else of_zograph
    tokens = request["batch"] * request["seq"]
    found = timed(system(request, model_part), tokens, request["repeats"])
    found |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(found), flush=True)
    os._exit(0)  # to unpin in order takes seconds


if __name__ == "__main__":
    main()
