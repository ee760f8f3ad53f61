"""What a log says of the run that writes it, and whether another run may go on with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import xxhash
from torch import nn

from zograph.errors import LogError
from zograph.ir import ParamInfo
from zograph.noise import NOISE_VERSION
from zograph.options import Options
from zograph.seedlog.format import LogHeader
from zograph.stores.base import padded, page_aligned
from zograph.stores.extents import fingerprint
from zograph.stores.files import bytes_of
from zograph.stores.source import TensorSource, source_of
from zograph.trajectory.options import Anderson

NUMERIC = (
    "eps",
    "weight_decay",
    "seed",
    "method",
    "directions",
    "distribution",
    "compute_dtype",
    "fold_every",
    "transfer_dtype",
    "rounding",
    "anderson",
)
"""The options that change what a step computes."""
YOUNGER = {"transfer_dtype": None, "rounding": "nearest", "anderson": None}
"""Options that older logs do not name, and what they were then."""


def header_of(
    model: nn.Module, table: Mapping[str, ParamInfo], options: Options, lr: float
) -> LogHeader:
    """Describe a run that starts from the model's values as they are now.

    Raises
    ------
    StoreError
        If a weight cannot be read.
    """
    from zograph import __version__

    return LogHeader(
        **start_of(model, table),
        options={name: plain(getattr(options, name)) for name in NUMERIC},
        engine={
            "device": options.device.type,
            "backend": options.backend,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__.partition("+")[0],
        },
        lr=lr,
        zograph=__version__,
    )


def start_of(model: nn.Module, table: Mapping[str, ParamInfo]) -> dict[str, Any]:
    """Return the fields of a header that say where a run starts.

    Raises
    ------
    StoreError
        If a weight cannot be read.
    """
    trained = "\n".join(n for n, p in table.items() if p.trainable)
    return {
        "model": fingerprint(table).hex(),
        "base": base_digest(model, table),
        "trained": hashlib.blake2b(trained.encode(), digest_size=16).hexdigest(),
        "noise": NOISE_VERSION,
    }


def base_digest(model: nn.Module, table: Mapping[str, ParamInfo]) -> str:
    """Return a hash of the values of all parameters and persistent buffers.

    Reads a model on a disk once, one parameter at a time; XXH3, 128 bits.
    """
    source = source_of(model) or TensorSource(dict(model.named_parameters()).__getitem__)
    found = xxhash.xxh3_128()
    for name, param in table.items():
        buffer = page_aligned(padded(param.bytes))
        source.read(param, buffer)
        found.update(name.encode())
        found.update(bytes_of(buffer)[: param.bytes])
    persistent = model.state_dict(keep_vars=True).keys()
    for name, value in model.named_buffers():
        if name in persistent:
            found.update(name.encode())
            found.update(bytes_of(value.cpu().contiguous()))
    return str(found.hexdigest())


def plain(value: Any) -> Any:
    """Return an option as JSON has it."""
    if isinstance(value, Anderson):
        return asdict(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def option_of(name: str, value: Any) -> Any:
    """Return an option from what JSON has of it."""
    if name == "anderson":
        return None if value is None else Anderson(**value)
    return getattr(torch, value) if name.endswith("_dtype") and value is not None else value


def check(path: object, logged: LogHeader, now: LogHeader, *, narrow: bool) -> list[str]:
    """See that a run may go on with a log.

    Parameters
    ----------
    narrow
        Whether weights narrower than float32, or stored so, are trained: their bits depend on the
        fold period.

    Returns
    -------
    list of str
        What differs and may change the last bits of later losses.

    Raises
    ------
    LogError
        If model, base, options, engine or noise are not those of the log.
    """
    check_base(path, logged, now)
    for name, value in (YOUNGER | logged.options).items():
        if now.options[name] != value and (narrow or name != "fold_every"):
            raise LogError(
                f"{path} was written with {name}={value!r}, and the run would go on with "
                f"{now.options[name]!r}. Leave {name} out, or give the same."
            )
    for name in ("device", "backend"):
        if now.engine[name] != logged.engine[name]:
            raise LogError(
                f"{path} was written with {name}={logged.engine[name]!r}, and {name}="
                f"{now.engine[name]!r} computes other last bits: the run would not be the same. "
                f"Give the same {name}; or resume as it was, save the weights (save_pretrained), "
                f"and start a new run from there."
            )
    return [
        f"{name} {logged.engine[name]} then, {now.engine[name]} now"
        for name in ("threads", "torch")
        if now.engine[name] != logged.engine[name]
    ]


def check_base(path: object, logged: LogHeader, now: LogHeader) -> None:
    """See that the values that a log starts from are at hand.

    Raises
    ------
    LogError
        If the model, its values, what is trained or the noise differ.
    """
    if now.noise != logged.noise:
        raise LogError(
            f"{path} was written with version {logged.noise} of the noise, and this zograph has "
            f"version {now.noise}. Use the version that wrote it ({logged.zograph})."
        )
    if now.model != logged.model:
        raise LogError(
            f"{path} is of another model: names, shapes or dtypes of the parameters differ. Load "
            f"the model that the run started from, with the same dtype."
        )
    if now.trained != logged.trained:
        raise LogError(
            f"{path} is of a run that trained other parameters. Set requires_grad as it was "
            f"then (zograph replay: --train)."
        )
    if now.base != logged.base:
        raise LogError(
            f"{path} starts from other values of the same model. Load the weights that the run "
            f"started from, not those that it had reached."
        )
