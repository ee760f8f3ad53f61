"""The exceptions that zograph raises at its users.

Every one of them is a :class:`ZographError`. Faults of zograph itself are
``AssertionError``: they are bugs, and the message of a pass names the pass.
"""

from __future__ import annotations


class ZographError(Exception):
    """Base of every error that a user can cause and can mend."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; empty if it says nothing."""
    return str(error).strip().partition("\n")[0]


class OptionError(ZographError, ValueError):
    """An option of :func:`zograph.compile` has no meaning; the message lists what has."""


class BatchError(ZographError, ValueError):
    """A batch does not fit the model: missing key, wrong shape, label out of range."""


class ModelError(ZographError, ValueError):
    """The model cannot be trained this way, for example a trainable complex parameter."""


class CaptureError(ZographError, RuntimeError):
    """The model's forward could not be turned into a graph, or its loss was not found."""


class PassError(ZographError, RuntimeError):
    """A pass met a graph that it cannot rewrite."""


class VerifyError(PassError):
    """A graph breaks a rule of the verifier; the message holds the graph around the fault."""


class PipelineError(ZographError, ValueError):
    """Passes stand in an order that their contracts forbid."""


class CellError(ZographError, ValueError):
    """A fixed point's cell returns NaN, or other shapes or dtypes than it is given."""


class LossError(ZographError, ArithmeticError):
    """A loss is NaN or infinite. The weights are as they were before the step."""


class ParameterChangedError(ZographError, RuntimeError):
    """A parameter's shape, dtype or trainability changed after the model was compiled."""


class StoreError(ZographError, OSError):
    """Stored weights cannot be read or written: missing, damaged, locked, or the disk is full."""


class LogError(ZographError, ValueError):
    """A seed log is damaged, of another version, or of another model or other options."""


class PlanError(ZographError, ValueError):
    """A memory budget is too small.

    Attributes
    ----------
    minimum : int
        The smallest budget in bytes that is enough for this model and batch.
    """

    def __init__(self, message: str, minimum: int) -> None:
        super().__init__(message)
        self.minimum = minimum
