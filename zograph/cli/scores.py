"""Loss, accuracy and perplexity over a set of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch.nn import functional

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
    loss_error
        Standard error of the mean loss over the examples; None for a language model.
    """

    loss: float
    accuracy: float | None
    count: int
    loss_error: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Score:
        """Return what :meth:`as_dict` was called on."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})

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
        loss = f"loss {self.loss:.4f} +- {self.loss_error or 0.0:.4f}"
        accuracy = f"accuracy {self.accuracy:.3f} +- {self.error:.3f}"
        return f"{loss}  {accuracy}  ({self.count} examples)"

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
    loss, squares, right, count, classify = 0.0, 0.0, 0, 0, True
    for batch in batches:
        labels = batch["labels"]
        classify = labels.ndim == 1
        valid = int((labels if classify else labels[:, 1:]).ne(IGNORED).sum())
        with torch.no_grad():
            out = run(**{name: t.to(device) for name, t in batch.items()})
        loss += float(out.loss) * valid
        count += valid
        if classify:
            logits = out.logits.float().cpu()
            right += int((logits.argmax(-1) == labels).sum())
            each = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
            squares += float(each.double().square().sum())
    mean = loss / count
    if not classify:
        return Score(mean, None, count)
    return Score(mean, right / count, count, math.sqrt(max(0.0, squares / count - mean**2) / count))


def change(before: Score, after: Score) -> str:
    """Say how far two scores of the same examples are apart, in standard errors.

    The error of a difference is taken as of two independent samples, which overstates it:
    the examples are the same.
    """
    fall = before.loss - after.loss
    if before.accuracy is None or after.accuracy is None:
        return f"loss {-fall:+.4f}, perplexity {after.perplexity - before.perplexity:+.2f}"
    rise = after.accuracy - before.accuracy
    parts = []
    for name, difference, errors in (
        ("loss", -fall, (before.loss_error or 0.0, after.loss_error or 0.0)),
        ("accuracy", rise, (before.error, after.error)),
    ):
        error = math.hypot(*errors)
        known = f" ({abs(difference) / error:.1f} standard errors)" if error else ""
        parts.append(f"{name} {difference:+.4f}{known}")
    return ", ".join(parts)
