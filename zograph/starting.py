"""Where a run starts: at a model's values, or behind the last step of a seed log."""

from __future__ import annotations

import warnings

from torch import nn

from zograph.options import Options
from zograph.parameters import parameter_table
from zograph.seedlog import Journal, LogFile
from zograph.seedlog.identity import check, header_of
from zograph.weights import Weights, open_weights


def open_run(
    model: nn.Module, lr: float, options: Options, logged: LogFile | None
) -> tuple[Weights, Journal | None]:
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
    if logged is None:
        weights = open_weights(model, table, options)
        try:
            journal = Journal.create(options.log, header, options.fsync_every)
        except BaseException:
            weights.store.close()
            raise
    else:
        for difference in check(logged.path, logged.header, header):
            warnings.warn(
                f"{logged.path}: {difference}: the last bits of losses may be others than if the "
                f"run had never ended.",
                stacklevel=5,
            )
        journal = Journal.go_on(logged, options.log, options.fsync_every)
        try:
            weights = open_weights(model, table, options, journal.belongs)
        except BaseException:
            journal.close()
            raise
        weights.history.restore(*logged.terms())
    weights.lineage = journal.lineage
    return weights, journal
