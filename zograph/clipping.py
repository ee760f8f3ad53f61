"""What weights lost at the ends of their format's range: counted, and said once a run."""

from __future__ import annotations

import warnings

from torch import Tensor

from zograph.errors import ModelError


class Clipped:
    """Counts, by parameter, the elements that a format could not hold.

    On a GPU the counts stay on the device until :meth:`check` is told to wait.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """Elements that were set to the largest number of the format, by parameter."""
        self._open: dict[str, Tensor] = {}
        """What is not read yet, by parameter."""
        self._said = False

    def add(self, name: str, counts: Tensor) -> None:
        """Add what :func:`zograph.codec.encode` or `decode` has returned of a parameter.

        Raises
        ------
        ModelError
            If the weight has NaNs; on a GPU :meth:`check` raises it.
        """
        if counts.device.type == "cpu":
            self._count(name, counts)
            return
        before = self._open.get(name)
        self._open[name] = counts if before is None else before + counts

    def check(self, *, wait: bool = False) -> None:
        """Warn, once in a run, if elements were clipped.

        Parameters
        ----------
        wait
            Wait for a GPU's counts.

        Raises
        ------
        ModelError
            If a weight has NaNs.
        """
        while wait and self._open:
            self._count(*self._open.popitem())
        if self._said or not self.counts:
            return
        self._said = True
        worst = max(self.counts, key=self.counts.__getitem__)
        warnings.warn(
            f"{sum(self.counts.values())} elements of {len(self.counts)} weights are beyond the "
            f"range of transfer_dtype and were set to its largest number; the most, "
            f"{self.counts[worst]}, in {worst!r}. bfloat16 and int8 have no such limit.",
            stacklevel=3,
        )

    def _count(self, name: str, counts: Tensor) -> None:
        clipped, nan = counts.tolist()
        if nan:
            raise ModelError(
                f"parameter {name!r} has {nan} elements that are NaN; transfer_dtype stores "
                f"numbers only. Repair the model, or leave transfer_dtype out."
            )
        if clipped:
            self.counts[name] = self.counts.get(name, 0) + clipped
