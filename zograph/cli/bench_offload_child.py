"""What `zograph bench offload` runs in processes of their own: one request, one line of JSON.

Memory is counted from a baseline: what the process holds after the same machinery has compiled
and stepped a tiny model, with everything freed that can be.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import zograph
from zograph.cli.batches import make_batch
from zograph.cli.bench import config_of
from zograph.cli.contest import status_bytes
from zograph.cli.inputs import InputError
from zograph.cli.traffic import Traffic
from zograph.cli.trial import Trial, baseline_bytes
from zograph.device import DeviceSpec
from zograph.errors import PlanError, ZographError
from zograph.export import save_streamed
from zograph.parameters import parameter_table
from zograph.step import ZOStep
from zograph.stores.checkpoint import Checkpoint

EPS, LR = 1e-3, 1e-4
"""Large enough for an update to change bfloat16 weights: a lost one would show in the losses."""

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

Request = Mapping[str, Any]


def write(request: Request) -> dict[str, Any]:
    """Write the checkpoints that are not there yet; say how large the weights are."""
    from transformers import AutoModelForCausalLM, OPTConfig

    shapes = {"model": config_of(request["shape"], "--shape"), "tiny": OPTConfig(**TINY)}
    models, missing = {}, 0
    for which, config in shapes.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype_of(request)
            )
        folder = Path(request[which])
        size = sum(p.nbytes for p in model.parameters())
        if not fits(folder, model):
            models[which], missing = model, missing + size
        if which == "model":
            weights = size
    check_space(Path(request["folder"]), missing, weights)
    for which, model in models.items():
        table = parameter_table(model)
        read = partial(drawn, table)
        save_streamed(model, read, Path(request[which]))
    return {"weights_bytes": weights, "written": sorted(models)}


def fits(folder: Path, model: Any) -> bool:
    """Return whether a folder holds a checkpoint of this model; False if there is none.

    Raises
    ------
    InputError
        If it holds another one.
    """
    if not (folder / "config.json").exists():
        return False
    stored = {k: (e.dtype, tuple(e.shape)) for k, e in Checkpoint(folder).entries.items()}
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p) for n, p in named.items() if n in stored}
    if any(
        n not in named or found != (named[n].dtype, tuple(named[n].shape))
        for n, found in stored.items()
    ) or any(id(p) not in first for p in named.values()):
        raise InputError(f"{folder} holds another model; delete it or name another --folder")
    return True


def drawn(table: Mapping[str, Any], name: str) -> torch.Tensor:
    """Return random values for one weight: as initialised, and no bias or scale left constant."""
    param = table[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    value = torch.empty(param.shape, dtype=param.dtype).normal_(0.0, 0.02, generator=generator)
    return value.add_(1) if len(param.shape) == 1 and name.endswith("weight") else value


def check_space(folder: Path, missing: int, weights: int) -> None:
    """Refuse a disk without room for the checkpoint and a work file of two copies.

    Raises
    ------
    InputError
        With the figures.
    """
    free, needed = shutil.disk_usage(folder).free, missing + 2 * weights + (1 << 29)
    if free < needed:
        raise InputError(
            f"--folder {folder}: {needed / 1e9:.1f} GB must be free ({missing / 1e9:.1f} GB for "
            f"the checkpoint, {2 * weights / 1e9:.1f} GB for the work file) and {free / 1e9:.1f} "
            f"GB are. Make space, name a folder on another disk or a smaller --shape."
        )


def measure(request: Request) -> dict[str, Any]:
    """Measure the machine anew, for the steps that follow."""
    return DeviceSpec.measure("cpu", request["folder"], refresh=True).to_json()


def step(request: Request) -> dict[str, Any]:
    """Run steps of one configuration."""
    work = Path(request["work"])
    with suppress(PlanError):  # then the model does not fit either
        compiled(request, request["tiny"], request["memory"], work / "tiny", batch=(2, 16))
    baseline = baseline_bytes()
    try:
        zo, batch = compiled(request, request["model"], request["memory"], work / "model")
    except PlanError as error:
        return {"infeasible": str(error), "minimum": error.minimum}
    with ExitStack() as stack:
        moved = request.get("beside")
        traffic = (
            stack.enter_context(Traffic(work, moved["read"], moved["write"])) if moved else None
        )
        trial = Trial(zo, batch, baseline, traffic.turn if traffic else nullcontext)
        return trial.run(request["repeats"], metered=request["metered"])


def compiled(
    request: Request, model: str, memory: Any, work: Path, batch: tuple[int, int] | None = None
) -> tuple[ZOStep, dict[str, Any]]:
    """Load and compile a checkpoint; run two steps of it if it comes with a batch of its own."""
    loaded = zograph.from_pretrained(model)
    zo = zograph.compile(
        loaded,
        lr=LR,
        eps=EPS,
        device="cpu",
        memory=memory,
        storage=work,
        backend=request["backend"],
    )
    torch.manual_seed(0)
    tokens = make_batch(loaded.config, *(batch or (request["batch"], request["seq"])))
    zo.prepare(**tokens)
    if batch:
        zo(**tokens)
        zo(**tokens)
        zo.synchronize()
    return zo, tokens


def peer(request: Request) -> dict[str, Any]:
    """Run one variant of the peer."""
    from transformers import AutoConfig

    from zograph.cli import peer_offload

    work, found = Path(request["work"]), {}
    for which, rows, length in (("tiny", 2, 16), ("model", request["batch"], request["seq"])):
        peer_offload.offload(Path(request[which]), work / which)
        config = AutoConfig.from_pretrained(request[which])
        torch.manual_seed(0)
        batch = make_batch(config, rows, length)
        baseline = baseline_bytes()
        found = peer_offload.run(config, work / which, batch, request, eps=EPS, lr=LR)
        found["peak_bytes"] = status_bytes("VmHWM") - baseline
    return found


def dtype_of(request: Request) -> torch.dtype:
    """Return the dtype that is asked for."""
    found: torch.dtype = getattr(torch, request["dtype"])
    return found


ACTIONS = {"write": write, "measure": measure, "step": step, "peer": peer}


def main() -> int:
    """Carry out the request in the first argument."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    try:
        result = ACTIONS[request["action"]](request)
    except ZographError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
