"""The trajectory of a run: which directions a step measures, and what its losses lead to."""

from __future__ import annotations

from zograph.errors import LogError
from zograph.noise import derive_seed
from zograph.options import Options
from zograph.records import Outcome
from zograph.seedlog import LogFile
from zograph.seedlog.identity import option_of
from zograph.trajectory.control import State, advance


class Trajectory:
    """Plain, or mixed; its state follows from the records of the run and from nothing else.

    Parameters
    ----------
    logged
        The log of the run so far.

    Raises
    ------
    LogError
        If the log has coefficients that its losses do not lead to.
    """

    def __init__(self, options: Options, logged: LogFile | None) -> None:
        self._options = options
        self.state = State()
        """Before the next step; only kept where the trajectory is mixed."""
        if logged is not None and options.anderson is not None:
            written = option_of("anderson", logged.header.options.get("anderson"))
            if written == options.anderson:  # any other is refused with the run's other options
                self._restore(logged)

    def seeds(self, step: int) -> list[int]:
        """Return the seeds of a step's directions; the steps of a cycle share them."""
        o = self._options
        of = step if o.anderson is None else self.state.seed_step
        return [derive_seed(o.seed, of, i) for i in range(o.directions)]

    def follow(self, found: Outcome) -> State:
        """Set what a step moves, and return the state behind it; where mixed, waits for losses."""
        o = self._options
        if o.anderson is None:
            return self.state
        losses = [(d.loss_plus, d.loss_minus) for d in found.record.directions]
        state, found.moved = advance(self.state, o.anderson, losses, lr=found.lr, eps=found.eps)
        return state

    def _restore(self, logged: LogFile) -> None:
        o = self._options
        assert o.anderson is not None
        for row in logged.table:
            each = row["each"]
            losses = each["losses"].tolist()
            self.state, moved = advance(
                self.state, o.anderson, losses, lr=float(row["lr"]), eps=o.eps
            )
            if moved is not None and moved != each["coef"].tolist():
                raise LogError(
                    f"{logged.path}: the losses of step {int(row['step'])} do not lead to the "
                    f"coefficients that it has: another version of zograph mixed them "
                    f"({logged.header.zograph}). Use that version; or write the weights with "
                    f"zograph.replay and start a new run from there."
                )
