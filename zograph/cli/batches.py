"""Tokenised examples in batches of one size and few lengths, so that graphs are reused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zograph.cli.data import Example
from zograph.cli.inputs import InputError

IGNORED = -100
"""The label that losses of torch and transformers pass over."""

SHORTEST = 8


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and its class; None for a language model."""

    ids: list[int]
    label: int | None


def length_limit(asked: int | None, model: Any, tokenizer: Any) -> int:
    """Return the longest text in tokens: as asked, else 128 or what the model can take.

    Raises
    ------
    InputError
        If more is asked than the model has positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if asked is not None and asked > positions:
        raise InputError(f"--max-length {asked}: the model has only {positions} positions")
    return asked or int(min(128, positions, tokenizer.model_max_length))


def encode(
    examples: Sequence[Example], tokenizer: Any, limit: int, *, labels: bool
) -> list[Encoded]:
    """Tokenise texts, cut to `limit` tokens; texts too short to predict from are dropped.

    Raises
    ------
    InputError
        If nothing is left.
    """
    ids = tokenizer([e.text for e in examples], truncation=True, max_length=limit)["input_ids"]
    least = 1 if labels else 2
    encoded = [
        Encoded(list(tokens), e.label if labels else None)
        for e, tokens in zip(examples, ids, strict=True)
        if len(tokens) >= least
    ]
    if not encoded:
        raise InputError(f"no text has {least} tokens or more")
    return encoded


def padded_length(longest: int, limit: int) -> int:
    """Return the bucket of a length: a power of two from 8, at most `limit`."""
    length = SHORTEST
    while length < longest:
        length *= 2
    return min(length, limit)


def collate(rows: Sequence[Encoded], pad: int, limit: int, size: int) -> dict[str, torch.Tensor]:
    """Build a batch of `size` rows of one padded length.

    Missing rows repeat the last one with labels that the loss ignores.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask``, int64 [size, length]; ``labels``, int64 [size]
        for classes and [size, length] for language models.
    """
    length = padded_length(max(len(r.ids) for r in rows), limit)
    shape = (size, length)
    ids = torch.full(shape, pad)
    mask = torch.zeros(shape, dtype=torch.int64)
    classify = rows[0].label is not None
    labels = torch.full((size,) if classify else shape, IGNORED)
    for i in range(size):
        row = rows[min(i, len(rows) - 1)]
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = 1
        if i < len(rows):
            if row.label is not None:
                labels[i] = row.label
            else:
                labels[i, :n] = ids[i, :n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def in_order(
    rows: Sequence[Encoded], pad: int, limit: int, size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield every row once, in batches of `size`; sorted by length to pad little."""
    ordered = sorted(rows, key=lambda r: len(r.ids))
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size], pad, limit, size)


def shuffled(
    rows: Sequence[Encoded], pad: int, limit: int, size: int, seed: int, start: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches without end: shuffled anew each epoch, the remainder carried over.

    Parameters
    ----------
    start
        Batches to leave out: what is yielded depends on seed and position alone.
    """
    generator = np.random.default_rng(seed)
    epochs, first = divmod(start * size, len(rows))
    for _ in range(epochs):
        generator.permutation(len(rows))
    waiting: list[int] = generator.permutation(len(rows)).tolist()[first:]
    while True:
        while len(waiting) < size:
            waiting.extend(generator.permutation(len(rows)).tolist())
        chosen, waiting = waiting[:size], waiting[size:]
        yield collate([rows[i] for i in chosen], pad, limit, size)


def make_batch(config: Any, rows: int, length: int) -> dict[str, Any]:
    """Return random tokens with labels."""
    ids = torch.randint(3, config.vocab_size, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
