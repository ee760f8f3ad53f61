"""The model's own tensors, and the terms that they still owe.

A weight is its base plus pending terms (scale, coefficient, seed). One step's terms are
pending when the step ends; the next visit of each parameter folds them into its base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from zograph.errors import ParameterChangedError
from zograph.ir import Kind, ParamInfo
from zograph.ops import fold_


@dataclass(frozen=True)
class Terms:
    """One step's update: ``w <- fl(fl(scale w) + fl(coef z(seed)))``, term by term."""

    seeds: torch.Tensor
    """int64 [terms]."""
    coefs: torch.Tensor
    """float32 [terms]."""
    scales: torch.Tensor
    """float32 [terms]; taken as 1 for parameters that weight decay spares."""

    @staticmethod
    def of(terms: Sequence[tuple[int, float, float]]) -> Terms:
        """Build from (seed, coefficient, scale) tuples, in order."""
        seeds, coefs, scales = zip(*terms, strict=True) if terms else ((), (), ())
        return Terms(
            torch.tensor(seeds, dtype=torch.int64),
            torch.tensor(coefs, dtype=torch.float32),
            torch.tensor(scales, dtype=torch.float32),
        )


class Weights:
    """Gives stages the tensors that they name, and folds pending terms on their way.

    The tensors are looked up in the model at every visit, so that values which a user
    changes between steps, in place or by a new parameter, are seen.
    """

    def __init__(self, model: nn.Module, table: Mapping[str, ParamInfo], distribution: str) -> None:
        self.model = model
        self.table = table
        self.distribution = distribution
        self.constants: dict[str, torch.Tensor] = {}
        self._owner: dict[str, tuple[nn.Module, str]] = {}
        for name in (*table, *(n for n, _ in model.named_buffers(remove_duplicate=False))):
            path, _, attribute = name.rpartition(".")
            self._owner[name] = (model.get_submodule(path), attribute)
        self._terms = Terms.of(())
        self._owing: set[str] = set()

    def fetch(self, kind: Kind, name: str) -> torch.Tensor:
        """Return a parameter, buffer or constant by name, contiguous."""
        if kind == Kind.CONSTANT:
            return self.constants[name]
        return self._tensor(name).detach().contiguous()

    def _tensor(self, name: str) -> torch.Tensor:
        module, attribute = self._owner[name]
        tensor: torch.Tensor = getattr(module, attribute)
        return tensor

    def check(self) -> None:
        """See that every parameter still is what was compiled.

        Raises
        ------
        ParameterChangedError
            If a parameter's shape, dtype or trainability has changed.
        """
        for name, known in self.table.items():
            tensor = self._tensor(name)
            found = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            if found != (known.shape, known.dtype, known.trainable):
                raise ParameterChangedError(
                    f"parameter {name!r} was compiled as {known.dtype}{list(known.shape)}, "
                    f"requires_grad={known.trainable}, and is now {tensor.dtype}"
                    f"{list(tensor.shape)}, requires_grad={tensor.requires_grad}. Compile again."
                )

    def owe(self, terms: Terms) -> None:
        """Make one step's terms pending for every trainable parameter."""
        assert not self._owing, "the terms of the step before were not folded"
        self._terms = terms
        self._owing = {name for name, p in self.table.items() if p.trainable}

    def fold(self, names: Iterable[str]) -> None:
        """Apply the pending terms to those of the named parameters that still owe them."""
        for name in names:
            if name in self._owing:
                param, terms = self.table[name], self._terms
                fold_(
                    self._tensor(name),
                    terms.seeds,
                    terms.coefs,
                    terms.scales,
                    param.key,
                    distribution=self.distribution,
                    decay=param.decay,
                )
                self._owing.discard(name)

    def settle(self) -> None:
        """Fold whatever is still pending."""
        self.fold(sorted(self._owing))
