"""Where a run starts: at a model's values, or behind the last step of a seed log."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from torch import nn

from zograph.options import Options
from zograph.parameters import parameter_table
from zograph.seedlog import Journal, LogFile, LogHeader
from zograph.seedlog.identity import check, header_of
from zograph.seedlog.placing import check_absent
from zograph.weights import Weights, open_weights


class RunLog:
    """The log of a run; it is begun as soon as everything that its header says is decided.

    Parameters
    ----------
    path, header, fsync_every
        Of the log to begin.
    journal
        The log, if it is begun.
    """

    def __init__(
        self, path: Path, header: LogHeader, fsync_every: int, journal: Journal | None = None
    ) -> None:
        self.path, self.header, self.fsync_every = path, header, fsync_every
        self._journal = journal

    def journal(self, weights: Weights) -> Journal:
        """Return the log; begin it with what the weights' fold period has come to be.

        Raises
        ------
        StoreError
            If it cannot be made.
        """
        if self._journal is None:
            header, period = self.header, weights.history.every
            if header.options["fold_every"] == "auto":
                header = dataclasses.replace(
                    header,
                    options=header.options | {"fold_every": period},
                    decided={"fold_every": period},
                )
            self._journal = Journal.create(self.path, header, self.fsync_every)
        weights.lineage = self._journal.lineage
        return self._journal

    def close(self) -> None:
        """Flush and let go; twice is fine."""
        if self._journal is not None:
            self._journal.close()


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
    table = parameter_table(model)
    if options.log is None:
        return open_weights(model, table, options), None
    header = header_of(model, table, options, lr)
    log = RunLog(options.log, header, options.fsync_every)
    if logged is not None:
        return go_on(model, options, logged, log)
    check_absent(options.log)
    weights = open_weights(model, table, options)
    if options.fold_every != "auto":
        try:
            log.journal(weights)
        except BaseException:
            weights.store.close()
            raise
    return weights, log


def go_on(
    model: nn.Module, options: Options, logged: LogFile, log: RunLog
) -> tuple[Weights, RunLog]:
    """Open the weights as a log has left them, and the log to append to."""
    table = parameter_table(model)
    narrow = any(p.trainable and p.dtype.itemsize < 4 for p in table.values())
    for difference in check(logged.path, logged.header, log.header, narrow=narrow):
        warnings.warn(
            f"{logged.path}: {difference}: the last bits of losses may be others than if the run "
            f"had never ended.",
            stacklevel=6,
        )
    journal = Journal.go_on(logged, log.path, log.fsync_every)
    try:
        weights = open_weights(model, table, options, journal.belongs)
    except BaseException:
        journal.close()
        raise
    weights.history.restore(*logged.terms())
    log = RunLog(log.path, logged.header, log.fsync_every, journal)
    log.journal(weights)
    return weights, log
