"""The examples of a run, encoded, and the scores of a model on them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from zograph.cli.batches import Encoded, encode, in_order, length_limit
from zograph.cli.data import Dataset
from zograph.cli.models import CLASSIFICATION, Loaded
from zograph.cli.scores import Run, Score, score


@dataclass(frozen=True)
class Sets:
    """The encoded examples and how they are batched."""

    train: list[Encoded]
    sample: list[Encoded]
    held_out: list[Encoded]
    pad: int
    limit: int
    size: int

    def scores(self, run: Run, device: torch.device) -> dict[str, Score]:
        """Score a model on the training sample and on the held-out examples."""
        sets = {"train": self.sample, "held_out": self.held_out}
        return {
            name: score(run, in_order(rows, self.pad, self.limit, self.size), device)
            for name, rows in sets.items()
        }


def make_sets(args: argparse.Namespace, data: Dataset, loaded: Loaded) -> Sets:
    """Tokenise; the training sample to score is the training rows nearest the front."""
    limit = length_limit(args.max_length, loaded.model, loaded.tokenizer)
    labels = args.task == CLASSIFICATION
    train = encode(data.train, loaded.tokenizer, limit, labels=labels)
    held_out = encode(data.held_out, loaded.tokenizer, limit, labels=labels)
    sample = spread(train, args.eval_size)
    held_out = spread(held_out, args.eval_size)
    pad = int(loaded.tokenizer.pad_token_id)
    return Sets(train, sample, held_out, pad, limit, args.batch_size)


def spread(rows: list[Encoded], most: int) -> list[Encoded]:
    """Return at most `most` rows (0: all), evenly spaced."""
    if not most or len(rows) <= most:
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]
