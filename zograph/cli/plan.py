"""`zograph plan`: what a step would take, on paper."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zograph.cli.doctor import scaled
from zograph.cli.inputs import FORMATS, InputError, integer
from zograph.cli.output import check_file
from zograph.cli.shapes import ZO2, known, names

if TYPE_CHECKING:
    from zograph.device import DeviceSpec
    from zograph.paper import Paper
    from zograph.plans import Plan

DTYPES = ("float16", "bfloat16", "float32")
FAMILY = "opt"
GB = 1e9
ITEMS = {
    "resident weights": "resident",
    "slots": "slots",
    "perturbed copies": "copies",
    "activations": "activations",
    "batch, buffers and keys": "rest",
}
"""Items of a plan, and how the table calls them."""
STREAMS = {"read": "read", "to_device": "in", "to_host": "out", "write": "written"}
"""Transfer streams, and how the table calls what they move."""
HERE = "this"


class Row(NamedTuple):
    """One plan of a table: what was asked for, and the plan or why there is none."""

    memory: str
    device: DeviceSpec
    plan: Plan | None
    error: str = ""
    minimum: int = 0


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="predict memory, transfers and time of a step, on paper",
        description="Predict what a step takes: no weight is made, read or moved. Several "
        "budgets, devices and links give a table. docs/plans.md says how.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{', '.join(names())}, a folder with config.json or a hub id; {FAMILY}: the family "
        "as a table beside ZO2's published GPU memory",
    )
    parser.add_argument("--batch", type=integer(1), default=1, metavar="N", help="rows")
    parser.add_argument("--seq", type=integer(2), default=2048, metavar="N", help="tokens a row")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument(
        "--memory", nargs="+", default=["minimum"], metavar="M",
        help="9GB, 8GiB, 0.5 (of the device), minimum, or all: everything stays on the device",
    )  # fmt: skip
    parser.add_argument(
        "--device", nargs="+", default=[HERE], metavar="D",
        help=f"rtx4090-24gb, a100-40gb, a100-80gb, h200, or {HERE}: this machine, measured",
    )  # fmt: skip
    parser.add_argument(
        "--link", nargs="+", default=[], metavar="L",
        help="host link: slow or fast (of a named device), or GB/s each way",
    )  # fmt: skip
    parser.add_argument("--storage", choices=("host", "disk"), default="host")
    parser.add_argument("--transfer-dtype", choices=FORMATS, help="format of stored weights")
    parser.add_argument("--directions", type=integer(1), default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    from zograph.options import parse_memory

    if args.json:
        check_file(args.json, "--json")
    devices = list(specs(args.device, args.link))
    for memory in args.memory:
        parse_memory(budget(memory), devices[0].memory)
    if args.model == FAMILY:
        result = family(args, devices[0])
    else:
        step = paper(config(args.model, args.dtype, args.seq), args)
        rows = table(step, args, devices)
        what = describe(args, args.model, step)
        print_plans(args, what, rows)
        result = what | {"plans": report(args, rows)}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def specs(devices: list[str], links: list[str]) -> Iterator[DeviceSpec]:
    """Yield a spec for every device behind every link.

    Raises
    ------
    InputError
        If a link is no rate, or one of a named device is asked of this machine.
    """
    from zograph.device import DeviceSpec
    from zograph.presets import LINKS

    for name in devices:
        for link in links or ["slow" if name != HERE else ""]:
            if link in LINKS and name == HERE:
                raise InputError(f"--link {link}: this machine's link is measured, or give GB/s")
            spec = DeviceSpec.measure() if name == HERE else None
            spec = spec or DeviceSpec.preset(name, "fast" if link == "fast" else "slow")
            yield spec if link in ("", *LINKS) else behind(spec, link)


def behind(spec: DeviceSpec, link: str) -> DeviceSpec:
    """Return a device behind a link of some GB/s."""
    import dataclasses

    try:
        rate = float(link)
        changed = spec.with_link(rate * 1e9)
    except ValueError as error:
        raise InputError(f"--link {link}: must be slow, fast or a rate in GB/s") from error
    name = spec.name.partition(", slow link")[0]
    return dataclasses.replace(changed, name=f"{name}, {rate:g} GB/s")


def budget(text: str) -> float | str | None:
    """Return a budget as :func:`zograph.plan` takes it."""
    if text == "all":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def config(name: str, dtype: str, seq: int) -> Any:
    """Return the config of a model.

    Raises
    ------
    InputError
        If it cannot be loaded, or holds fewer positions than a row has tokens.
    """
    import torch

    found = known(name)
    if found is None:
        from transformers import AutoConfig

        from zograph.cli.models import first_line, locate

        found = first_line(name, lambda: AutoConfig.from_pretrained(locate(name)))
    limit = getattr(found, "max_position_embeddings", None)
    if isinstance(limit, int) and seq > limit:
        raise InputError(f"--seq {seq}: {name} has {limit} positions")
    found.dtype = getattr(torch, dtype)
    return found


def paper(model: Any, args: argparse.Namespace) -> Paper:
    """Capture a model for a batch of tokens with labels.

    Raises
    ------
    InputError
        If transformers has no language model of this type.
    """
    import torch
    import transformers

    from zograph.paper import Paper

    autos: Any = transformers
    kinds = ("ForSeq2SeqLM",) if getattr(model, "is_encoder_decoder", False) else ()
    for kind in (*kinds, "ForCausalLM", "ForMaskedLM"):
        auto = getattr(autos, f"AutoModel{kind}")
        if type(model) in auto._model_mapping:
            break
    else:
        raise InputError(f"{args.model}: no language model ({type(model).__name__})")
    messages: Any = transformers.logging
    messages.set_verbosity_error()
    ids = torch.empty(args.batch, args.seq, dtype=torch.int64, device="meta")
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    return Paper(
        model,
        batch=batch,
        auto_class=auto,
        directions=args.directions,
        transfer_dtype=args.transfer_dtype,
    )


def table(step: Paper, args: argparse.Namespace, devices: list[DeviceSpec]) -> list[Row]:
    """Plan for every budget and device.

    Raises
    ------
    PlanError
        If no budget is large enough.
    """
    rows = [row(step, memory, spec, args.storage) for memory in args.memory for spec in devices]
    if all(r.plan is None for r in rows):
        raise InputError(rows[0].error)
    return rows


def row(step: Paper, memory: str, spec: DeviceSpec, storage: Any) -> Row:
    """Plan for one budget and device."""
    from zograph.errors import PlanError

    try:
        return Row(memory, spec, step.plan(budget(memory), spec, storage))
    except PlanError as error:
        return Row(memory, spec, None, str(error), error.minimum)


def describe(args: argparse.Namespace, name: str, step: Paper) -> dict[str, Any]:
    """Return what is planned, as values for ``json``."""
    params = step.params.values()
    return {
        "model": name,
        "parameters": sum(p.bytes // p.dtype.itemsize for p in params),
        "weights_bytes": sum(p.bytes for p in params),
        "dtype": args.dtype,
        "batch": args.batch,
        "seq": args.seq,
        "directions": args.directions,
        "storage": args.storage,
        "transfer_dtype": args.transfer_dtype,
    }


def report(args: argparse.Namespace, rows: list[Row]) -> list[dict[str, Any]]:
    """Return the plans as values for ``json``."""
    found = []
    for r in rows:
        entry: dict[str, Any] = {"memory": r.memory, "device": r.device.to_json()}
        if r.plan is None:
            found.append(entry | {"error": r.error, "minimum": r.minimum})
        else:
            rate = args.batch * args.seq / r.plan.step_seconds
            found.append(entry | {"plan": r.plan.to_json(), "tokens_per_second": rate})
    return found


def print_plans(args: argparse.Namespace, what: dict[str, Any], rows: list[Row]) -> None:
    """Print the tables of one model."""
    print(
        f"{what['model']}: {scaled(what['parameters'], '').strip()} parameters, "
        f"{scaled(what['weights_bytes'], 'B')} in {args.dtype}; {args.batch} x {args.seq} tokens, "
        f"{args.directions} direction{'s' * (args.directions > 1)}, weights on the {args.storage}"
    )
    scale, unit = unit_for(max(r.plan.device_bytes if r.plan else 0 for r in rows))
    first = ["memory", f"device {unit}", *ITEMS.values(), f"host {unit}", f"disk {unit}", "stages"]
    print_table(first, list(dict.fromkeys(memory_cells(r, scale) for r in rows)))
    ways = [s for s in STREAMS if any(r.plan and s in r.plan.bytes_moved for r in rows)]
    head = ["memory", "device", *(f"{STREAMS[s]} {unit}" for s in ways)]
    head += ["compute s", "transfer s", "step s", "of longer", "tokens/s", "overlap", "limited by"]
    print_table([*head, "balance"], [time_cells(r, args, ways, scale) for r in rows], left=2)
    print(
        f"\ndevice {unit}: without CUDA context, library workspaces and fragmentation\n"
        "of longer: step / the longer of compute and transfer\n"
        "balance: how many times the batch / the directions would make compute as long as transfer"
    )
    short = {r.device.name: r for r in rows if r.plan and r.plan.host_bytes > r.device.host_memory}
    for name, r in short.items():
        print(f"{name}: its host memory of {r.device.host_memory / GB:.0f} GB is too small.")


def unit_for(nbytes: int) -> tuple[float, str]:
    """Return the unit that a table's bytes are given in.

    Examples
    --------
    >>> unit_for(9_000_000_000), unit_for(50_000_000)
    ((1000000000.0, 'GB'), (1000000.0, 'MB'))
    """
    units = ((GB, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((n, unit) for n, unit in units if nbytes >= 0.1 * n), units[-1])


def memory_cells(r: Row, scale: float) -> tuple[str, ...]:
    """Return the row of the memory table."""
    if r.plan is None:
        return (r.memory, f"needs {r.minimum / scale:.3f}")
    p = r.plan
    items = dict(p.items)
    items["slots"] += items.get("decoded weights", 0)
    values = [p.device_bytes, *(items[name] for name in ITEMS), p.host_bytes, p.disk_bytes]
    return (r.memory, *(f"{v / scale:.3f}" for v in values), str(p.stages))


def time_cells(r: Row, args: argparse.Namespace, ways: list[str], scale: float) -> tuple[str, ...]:
    """Return the row of the time table."""
    p = r.plan
    if p is None:
        return (r.memory, r.device.name, "too small")
    return (
        r.memory,
        r.device.name,
        *(f"{p.bytes_moved.get(s, 0) / scale:.1f}" for s in ways),
        f"{p.busy.get('compute', 0.0):.3f}",
        f"{p.transfer_seconds:.3f}",
        f"{p.step_seconds:.3f}",
        f"{p.step_seconds / p.bound_seconds:.3f}",
        f"{args.batch * args.seq / p.step_seconds:.0f}",
        f"{p.overlap:.2f}",
        p.limiting.replace("_", " "),
        f"{p.batch_balance:.2f} / {p.balance:.2f}" if p.transfer_seconds else "-",
    )


def print_table(head: list[str], rows: list[tuple[str, ...]], left: int = 1) -> None:
    """Print right-aligned columns, the first `left` of them left-aligned."""
    full = [tuple(head), *rows]
    widths = [max(len(r[i]) for r in full if i < len(r)) for i in range(len(head))]
    print()
    for r in full:
        cells = (
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=False))
        )
        print("  ".join(cells).rstrip())


def family(args: argparse.Namespace, spec: DeviceSpec) -> dict[str, Any]:
    """Print the OPT family beside ZO2, model by model; return everything for ``json``."""
    print(
        f"OPT in {args.dtype}, {args.batch} x {args.seq} tokens, on {spec.name}, "
        f"weights on the {args.storage}\n\n"
        "          weights  minimum      ZO2  | within ZO2's memory\n"
        "               GB       GB       GB  | step s  of longer  tokens/s  limited by"
    )
    result = []
    for name in [n for n in names() if n.startswith(f"{FAMILY}-")]:
        step = paper(config(name, args.dtype, args.seq), args)
        theirs = ZO2.get(name)
        budgets = ["minimum", *([f"{theirs}GB"] if theirs else [])]
        rows = [row(step, memory, spec, args.storage) for memory in budgets]
        what = describe(args, name, step)
        print(family_line(args, what, rows, theirs), flush=True)
        result.append(what | {"zo2_bytes": theirs and round(theirs * GB)}
                      | {"plans": report(args, rows)})  # fmt: skip
    print(
        "\nminimum: without CUDA context, library workspaces and fragmentation\n"
        "ZO2: GPU memory at fp16, batch 1, sequence 2048 (arXiv 2503.12668), where published"
    )
    return {"family": result}


def family_line(
    args: argparse.Namespace, what: dict[str, Any], rows: list[Row], theirs: float | None
) -> str:
    """Return the line of one model."""
    least, within = rows[0].plan, rows[-1].plan
    assert least is not None, "the smallest budget is enough"
    line = f"{what['model']:9}{what['weights_bytes'] / GB:8.2f}{least.device_bytes / GB:9.3f}"
    if theirs is None or within is None:
        return f"{line}{'-':>9}  |"
    rate = args.batch * args.seq / within.step_seconds
    return (
        f"{line}{theirs:9.2f}  |{within.step_seconds:7.3f}"
        f"{within.step_seconds / within.bound_seconds:11.3f}{rate:10.0f}"
        f"  {within.limiting.replace('_', ' ')}"
    )
