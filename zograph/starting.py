"""Where a run starts: at a model's values, or behind the last step of a seed log."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zograph.clipping import Clipped
from zograph.fixed_points import Choice
from zograph.formats import with_format
from zograph.ir import ParamInfo
from zograph.options import Options
from zograph.parameters import parameter_table
from zograph.pieces import cut_tables
from zograph.records import Outcome
from zograph.seedlog import Journal, LogFile, LogHeader, read_log
from zograph.seedlog.identity import check, header_of
from zograph.seedlog.placing import check_absent, place
from zograph.stores.base import Store
from zograph.stores.disk import Belongs, DiskStore
from zograph.stores.folder import open_work_folder, work_folder
from zograph.stores.host import HostStore
from zograph.stores.source import TensorSource, source_of
from zograph.weights import Weights, owner_of


class RunLog:
    """The log of a run; it is begun as soon as everything that its header says is decided.

    Parameters
    ----------
    path, header, fsync_every
        Of the log to begin.
    weights
        Whose updates it tells.
    """

    def __init__(self, path: Path, header: LogHeader, fsync_every: int, weights: Weights) -> None:
        self.path, self.header, self.fsync_every = path, header, fsync_every
        self.weights = weights
        self.journal: Journal | None = None
        """The file, once it is begun."""

    def use(self, journal: Journal) -> None:
        """Write into this file; stored values name it from now on."""
        self.journal, self.weights.lineage = journal, journal.lineage

    def decide(self, **decided: Any) -> None:
        """Note what `auto` has come to mean, ahead of the first step; in the file, if it is begun.

        Raises
        ------
        StoreError
            If it cannot be written, or another run has taken the file meanwhile.
        """
        known = self.header.decided | decided
        self.header = dataclasses.replace(self.header, decided=known)
        if self.journal is not None:
            place(self.path, self.header.pack(), over=True)
            self.journal.close()
            self.use(Journal(read_log(self.path), self.fsync_every))

    def begin(self) -> Journal:
        """Make the file, with what the weights' fold period has come to be.

        Raises
        ------
        StoreError
            If it cannot be made.
        """
        header, period = self.header, self.weights.history.every
        if header.options["fold_every"] == "auto":
            options = header.options | {"fold_every": period}
            decided = header.decided | {"fold_every": period}
            header = dataclasses.replace(header, options=options, decided=decided)
        journal = Journal.create(self.path, header, self.fsync_every)
        self.use(journal)
        return journal

    def add(self, outcome: Outcome) -> None:
        """Append a step, as :meth:`Journal.add` does; the first one decides what was open."""
        journal = self.begin() if self.journal is None else self.journal
        journal.add(outcome)

    def flush(self) -> None:
        """Make what is there survive a loss of power."""
        if self.journal is not None:
            self.journal.flush()

    def copy_to(self, path: Path) -> None:
        """Write the log so far to another place.

        Raises
        ------
        StoreError
            As :meth:`Journal.copy_to` does.
        RuntimeError
            If it is not begun.
        """
        if self.journal is None:
            raise RuntimeError("the log is empty: fold_every='auto' is decided by the first step")
        self.journal.copy_to(path)

    def close(self) -> None:
        """Flush and let go; twice is fine."""
        if self.journal is not None:
            self.journal.close()


def recorded_choices(logged: LogFile | None) -> dict[str, Choice]:
    """Return what a log has of the fixed points that left their solver open."""
    found = {} if logged is None else logged.header.decided.get("solvers", {})
    return {name: Choice(**choice) for name, choice in found.items()}


def open_run(
    model: nn.Module, lr: float, options: Options, logged: LogFile | None
) -> tuple[Weights, RunLog | None]:
    """Open the weights of a run and its log.

    Parameters
    ----------
    logged
        The log to go on with; None: the run starts here.

    Raises
    ------
    ModelError
        If nothing can be trained.
    LogError
        If the log is of another model or other options.
    StoreError
        If the log or the work folder cannot be used.
    """
    given = parameter_table(model)
    table = with_format(cut_tables(given), options.transfer_dtype)
    if options.log is None:
        return open_weights(model, table, options), None
    header = header_of(model, given, options, lr)
    if logged is None:
        check_absent(options.log)
        weights = open_weights(model, table, options)
        log = RunLog(options.log, header, options.fsync_every, weights)
        if options.fold_every != "auto":
            try:
                log.begin()
            except BaseException:
                weights.store.close()
                raise
        return weights, log
    narrow = any(p.trainable and (p.dtype.itemsize < 4 or p.format) for p in table.values())
    for difference in check(logged.path, logged.header, header, narrow=narrow):
        warnings.warn(
            f"{logged.path}: {difference}: the last bits of losses may be others than if the run "
            f"had never ended.",
            stacklevel=5,
        )
    journal = Journal.go_on(logged, options.log, options.fsync_every)
    try:
        weights = open_weights(model, table, options, journal.belongs)
    except BaseException:
        journal.close()
        raise
    weights.history.restore(*logged.terms())
    log = RunLog(options.log, logged.header, options.fsync_every, weights)
    log.use(journal)
    return weights, log


def open_weights(
    model: nn.Module,
    table: Mapping[str, ParamInfo],
    options: Options,
    resume: Belongs | None = None,
) -> Weights:
    """Open the store that the options ask for; move to the device what stays there.

    Parameters
    ----------
    resume
        As :class:`DiskStore` takes it.

    Raises
    ------
    StoreError
        If the work folder cannot be used.
    """
    clipped = Clipped()
    source = source_of(model)
    if source is None and options.storage == "host":
        pinned = options.memory is not None and options.device.type == "cuda"
        if not pinned:
            model.to(options.device)
        owner = {p.parameter: owner_of(model, p.parameter) for p in table.values()}
        store: Store = HostStore(
            lambda name: getattr(*owner[name]), table, pinned=pinned, clipped=clipped
        )
    else:
        asked = options.storage if source is None or options.storage != "host" else source.storage
        folder = None if options.log is None else work_folder(options.log)
        if str(asked) not in ("host", "disk"):
            folder = Path(asked)
        parameters = dict(model.named_parameters())
        known = source or TensorSource(parameters.__getitem__)
        opened = open_work_folder(folder)
        store = DiskStore(opened, table, known, resume=resume, clipped=clipped)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(options.device))
    period = options.fold_every if isinstance(options.fold_every, int) else 1
    clipped.check(wait=True)
    return Weights(
        model, table, options.distribution, store, options.device, period, options.rounding, clipped
    )


def warn_of_eval_mode(model: nn.Module) -> None:
    """Say once that steps run in eval mode, where that changes the model's function."""
    active = [
        name or type(m).__name__
        for name, m in model.named_modules()
        if m.training
        and (
            (isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0)
            or isinstance(m, nn.modules.batchnorm._BatchNorm)
        )
    ]
    if active:
        warnings.warn(
            f"steps run in eval mode: dropout and batch norm ({active[0]} and {len(active) - 1} "
            f"more) behave as in evaluation. model.training itself is left as it is.",
            stacklevel=4,
        )
