"""`zograph.replay`: the weights of a run after any of its steps, from its base and its log."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zograph import codec
from zograph.applying import Owed, decode_terms, fold_terms
from zograph.errors import LogError, ModelError, OptionError, StoreError, first_line
from zograph.export import origins, save_streamed
from zograph.formats import with_format
from zograph.history import History, Terms
from zograph.ir import ParamInfo
from zograph.loading import from_pretrained, locate
from zograph.output import OutputFolder
from zograph.parameters import parameter_table
from zograph.pieces import cut_tables
from zograph.seedlog import LogFile, LogHeader, read_log
from zograph.seedlog.identity import check_base, option_of, start_of
from zograph.stores.base import padded, page_aligned
from zograph.stores.extents import fingerprint
from zograph.stores.source import TensorSource, as_tensor, source_of

ATONCE = 1 << 32
"""Elements times terms of one call of the kernel, about a second: Ctrl-C is heard in between."""
TOKENIZER = ("*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*")
"""Files of a model's folder that go with its weights."""


def replay(
    model: nn.Module | str | Path,
    log: str | Path,
    *,
    out: str | Path,
    until: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model that a run had reached after some of its steps, without running it.

    Every weight is read once, all its updates are applied in one pass, and it is written: memory
    is what the largest weight takes. The values are those that the run had after that step, bit
    for bit.

    Parameters
    ----------
    model
        Holds the values that the run started from, and is not changed. Or its folder or hub id;
        then all of its parameters were trained.
    log
        Of the run, which may still be going on. It is not changed.
    out
        Folder for the model, in the model's own format. It appears whole or not at all.
    until
        The number of steps; 0 is the base. None: all.
    overwrite
        Replace what `out` holds.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    LogError
        If the log is damaged, of another model, base or noise, or of a run that trained others
        of the parameters.
    OptionError
        If `until` is not in the log, or `out` is not empty or cannot be written.
    ModelError
        If the folder's model is of no type that can be loaded.
    StoreError
        If log or base cannot be read.
    """
    logged = read_log(log, warn=False)
    if logged.torn:
        warnings.warn(torn(logged), stacklevel=2)
    check_until(logged, until)
    base = model if isinstance(model, nn.Module) else load_base(model, logged.header)
    return rebuild(base, logged, until, Path(out).expanduser(), overwrite=overwrite)


def rebuild(
    base: nn.Module,
    logged: LogFile,
    until: int | None,
    out: Path,
    *,
    overwrite: bool,
    tokenizer: Any = None,
) -> Path:
    """Do what :func:`replay` does, of what it has loaded.

    Parameters
    ----------
    tokenizer
        Goes into `out` too; without one, the files of the base's folder are copied.
    """
    steps = check_until(logged, until)
    protect(out, {logged.path.resolve(), *origins(base)})
    with OutputFolder(out, overwrite=overwrite) as result:
        table = parameter_table(base)
        now = dataclasses.replace(logged.header, **start_of(base, table))
        check_base(logged.path, logged.header, now)
        values = Replayed(base, table, logged, steps)
        try:
            save_streamed(base, values.read, result.staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(result.staging)
            for folder in origins(base):
                copy_tokenizer(folder, result.staging)
        except StoreError:
            raise
        except OSError as e:
            raise OptionError(f"out {out}: cannot be written: {e.strerror or e}") from e
        result.commit()
    return out


def torn(logged: LogFile) -> str:
    """Say that a log's last record is left out."""
    return (
        f"{logged.path}: its last {logged.torn} bytes are no whole record and are left out; it "
        f"ends with {len(logged)} steps."
    )


def copy_tokenizer(folder: Path, into: Path) -> None:
    """Copy what belongs to a model's weights and is not there yet."""
    for pattern in TOKENIZER:
        for path in folder.glob(pattern):
            if path.is_file() and not (into / path.name).exists():
                shutil.copyfile(path, into / path.name)


def check_until(logged: LogFile, until: int | None) -> int:
    """Return how many steps to apply.

    Raises
    ------
    OptionError
        If the log has fewer.
    """
    if until is None:
        return len(logged)
    if type(until) is not int or not 0 <= until <= len(logged):
        raise OptionError(
            f"until is {until}, and {logged.path} has {len(logged)} steps: give 0 (the base) to "
            f"{len(logged)}, or nothing for all of them."
        )
    return until


def protect(out: Path, kept: set[Path]) -> None:
    """Refuse to write over the log or the base.

    Raises
    ------
    OptionError
        If one of them is in the folder that would be replaced.
    """
    for path in kept:
        if path.is_relative_to(out.resolve()):
            raise OptionError(f"out {out} holds {path}, which is read: choose another folder")


def load_base(path_or_id: str | Path, header: LogHeader) -> nn.Module:
    """Load lazily the model of a folder or hub id that a log is of.

    The class is the config's own or an auto class, the dtype the folder's or float32: whichever
    gives the parameters that the log knows.

    Raises
    ------
    LogError
        If none does.
    ModelError, StoreError
        If the model cannot be loaded at all.
    """
    import transformers

    refusal: Exception | None = None
    folder = locate(path_or_id, {})
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as e:
        raise StoreError(f"{path_or_id}: {first_line(e)}") from e
    names = [*(config.architectures or ()), "AutoModelForCausalLM"]
    names += ["AutoModelForSequenceClassification", "AutoModel"]
    for auto in (getattr(transformers, name, None) for name in names):
        for dtype in (None, torch.float32) if auto is not None else ():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # another head may be missing
                    model = from_pretrained(folder, auto_class=auto, dtype=dtype)
            except (ModelError, StoreError) as error:
                refusal = refusal or error
                continue
            if fingerprint(parameter_table(model)).hex() == header.model:
                return model
            refusal = LogError(
                f"the log is of another model than {path_or_id}: names, shapes or dtypes of the "
                f"parameters differ. Name the model that the run started from; if it was built or "
                f"changed in Python, give it to zograph.replay."
            )
    assert refusal is not None
    raise refusal


class Replayed:
    """Values of parameters with the updates of some steps in them."""

    def __init__(
        self, model: nn.Module, table: dict[str, ParamInfo], logged: LogFile, steps: int
    ) -> None:
        self._source = source_of(model) or TensorSource(dict(model.named_parameters()).__getitem__)
        self._table = table
        options = logged.header.options
        self._distribution = str(options["distribution"])
        self._rounding = str(options.get("rounding", "nearest"))
        dtype = option_of("transfer_dtype", options.get("transfer_dtype"))
        self._stored = with_format(cut_tables(table), dtype)
        self._history = History(int(options["fold_every"]))
        self._history.restore(*logged.terms(steps))

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter's value, in memory of its own."""
        param = self._table[name]
        buffer = page_aligned(padded(param.bytes))
        self._source.read(param, buffer)
        weight = as_tensor(param, buffer)
        owed = self._history.since(0, param.key) if param.trainable else None
        parts = [p for p in self._stored.values() if p.parameter == name]
        if parts[0].format is not None:
            for part in parts:
                self._decode(part, part.view(weight), owed)
        elif owed is not None:
            for terms, ends in portions(param, *owed):
                fold_terms(weight, param, terms, ends, self._distribution)
        return weight

    def _decode(self, part: ParamInfo, weight: torch.Tensor, owed: Owed | None) -> None:
        """Turn first values into those that a run has which stores them in a format."""
        assert part.format is not None
        stored = part.format.empty(part.shape, weight.device)
        codec.encode(weight, part.format, stored)
        decode_terms(
            stored,
            part,
            owed,
            weight,
            at_fold_point=self._history.is_fold_point(self._history.newest, part.key),
            rounding=self._rounding,
            distribution=self._distribution,
        )


def portions(
    param: ParamInfo, terms: Terms, ends: torch.Tensor | None
) -> Iterator[tuple[Terms, torch.Tensor | None]]:
    """Cut terms into calls of about `ATONCE`; those of a narrow weight at fold points only."""
    count, start = len(terms.seeds), 0
    most = max(1, ATONCE * param.dtype.itemsize // max(1, param.bytes))
    narrow = param.dtype.itemsize < 4 and ends is not None
    points: Any = ends.nonzero()[:, 0] + 1 if narrow and ends is not None else None
    while start < count:
        stop = min(start + most, count)
        if points is not None and stop < count:
            found = int(torch.searchsorted(points, stop))
            stop = int(points[found]) if found < len(points) else count
        part = slice(start, stop)
        cut = Terms(terms.seeds[part], terms.coefs[part], terms.scales[part])
        yield cut, None if ends is None else ends[part]
        start = stop
