"""Loss, accuracy and perplexity over a set of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zograph.cli.batches import IGNORED

Run = Callable[..., Any]
"""A model's forward or a step's `evaluate`: from a batch to an output with loss and logits."""


@dataclass(frozen=True)
class Score:
    """Means over a set of examples.

    Attributes
    ----------
    loss
        Mean cross-entropy in nats, per example or per predicted token.
    accuracy
        Share of right classes; None for a language model.
    count
        Examples, or predicted tokens.
    """

    loss: float
    accuracy: float | None
    count: int

    @property
    def error(self) -> float:
        """The binomial standard error of the accuracy."""
        p = self.accuracy or 0.0
        return math.sqrt(p * (1 - p) / self.count)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"loss {self.loss:.4f}  perplexity {self.perplexity:.2f}  ({self.count} tokens)"
        accuracy = f"accuracy {self.accuracy:.3f} +- {self.error:.3f}"
        return f"loss {self.loss:.4f}  {accuracy}  ({self.count} examples)"

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the numbers for a settings file."""
        values = asdict(self)
        if self.accuracy is None:
            values["perplexity"] = self.perplexity
        else:
            values["standard_error"] = self.error
        return values

    def agrees(self, other: Score, tolerance: float) -> bool:
        """Whether two losses are the same within a relative tolerance (absolute below 1)."""
        return abs(self.loss - other.loss) <= tolerance * max(1.0, abs(self.loss))


def score(run: Run, batches: Iterable[dict[str, torch.Tensor]], device: torch.device) -> Score:
    """Score a model on batches whose ignored labels do not count."""
    loss, right, count, classify = 0.0, 0, 0, True
    for batch in batches:
        labels = batch["labels"]
        classify = labels.ndim == 1
        valid = int((labels if classify else labels[:, 1:]).ne(IGNORED).sum())
        with torch.no_grad():
            out = run(**{name: t.to(device) for name, t in batch.items()})
        loss += float(out.loss) * valid
        count += valid
        if classify:
            right += int((out.logits.argmax(-1).cpu() == labels).sum())
    return Score(loss / count, right / count if classify else None, count)
