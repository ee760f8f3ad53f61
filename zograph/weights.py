"""The weights of a model, wherever they live, and the terms that they still owe.

A weight is its base plus pending terms (scale, coefficient, seed). A step's terms are pending
when it ends; the next visit of each parameter folds them. What a parameter owes is told by its
`version`, the number of steps whose terms are in its stored value: a transfer that fails, or a
run that is interrupted, leaves the version behind and the terms in the history, and the next
visit makes up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from zograph import codec
from zograph.applying import decode_terms, fold_terms
from zograph.clipping import Clipped
from zograph.errors import ParameterChangedError
from zograph.history import History, Terms
from zograph.ir import Kind, ParamInfo
from zograph.pool import pool
from zograph.stores.base import Store, padded, page_aligned
from zograph.stores.disk import DiskStore
from zograph.stores.source import as_stored, as_tensor


class Weights:
    """Gives stages the tensors that they name, and folds pending terms on their way.

    Where the store is the model itself, tensors are looked up in it at every visit, so that
    values which a user changes between steps, in place or by a new parameter, are seen.

    Parameters
    ----------
    store
        Where the newest values are.
    device
        Where steps are computed.
    fold_every
        The fold period: see :class:`History`.
    rounding
        Of weights to their formats: ``nearest`` or ``stochastic``.
    clipped
        Counts what formats cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        table: Mapping[str, ParamInfo],
        distribution: str,
        store: Store,
        device: torch.device,
        fold_every: int = 1,
        rounding: str = "nearest",
        clipped: Clipped | None = None,
    ) -> None:
        self.rounding = rounding
        self.clipped = Clipped() if clipped is None else clipped
        self.model = model
        self.device = device
        self.table = table
        """The parameters, large tables in pieces."""
        self.distribution = distribution
        self.store = store
        self.constants: dict[str, torch.Tensor] = {}
        self.held: dict[str, torch.Tensor] = {}
        """Weights that stay on the device, as they are stored, while the store has another,
        perhaps older, copy."""
        self._owner: dict[str, tuple[nn.Module, str]] = {}
        buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
        for name in (*(p.parameter for p in table.values()), *buffers):
            self._owner[name] = owner_of(model, name)
        whole = ((n, self._whole(n)) for n in (p.parameter for p in table.values()))
        self._compiled = {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in whole}
        self.visiting: dict[str, torch.Tensor] = {}
        """Folded copies of weights on the device whose base is encoded or not to be rounded yet."""
        self.shown: dict[str, torch.Tensor] = {}
        """Bases of weights whose newest value is shown in the model meanwhile."""
        self.history = History(fold_every)
        self.lineage: Callable[[int], int] = lambda version: 0
        """Gives what the log says of a version; stored with each value (see `Store.write`)."""
        steps = store.fold_steps()
        self.version = {n: steps[n] for n, p in table.items() if p.trainable}
        if isinstance(store, DiskStore):
            store.origin = lambda: self.lineage(0)

    def on_device(self) -> frozenset[str]:
        """Return the weights that are held on the device."""
        return frozenset(self.held)

    @property
    def folder(self) -> Path | None:
        """The folder that the store writes to, None if it is memory."""
        return self.store.folder.path if isinstance(self.store, DiskStore) else None

    def fetch(self, kind: Kind, name: str) -> torch.Tensor:
        """Return a buffer, a constant or a weight that stays on the device, contiguous."""
        if kind == Kind.CONSTANT:
            return self.constants[name]
        if kind == Kind.BUFFER:
            return self._of_model(name).detach().contiguous()
        return self.resident(name).contiguous()

    def resident(self, name: str) -> torch.Tensor:
        """Return a weight where it stands on the device: in the model, or as it is held."""
        found = self.visiting.get(name)
        return self.base(name) if found is None else found

    def base(self, name: str) -> torch.Tensor:
        """Return the stored value of a weight that stands on the device; its bytes, if encoded."""
        found = self.held.get(name)
        if found is None:
            found = self.store.tensor(name)
        assert found is not None, f"{name} is neither held nor in the model"
        return found

    def keeps_base(self, name: str) -> bool:
        """Whether a weight is rounded when it is folded, and may be so at its fold points only."""
        return self.history.every > 1 and self.table[name].dtype.itemsize < 4

    def is_fold_point(self, name: str, version: int) -> bool:
        """Whether a weight is folded into its stored base at a version."""
        return self.history.is_fold_point(version, self.table[name].key)

    def stays(self, name: str) -> bool:
        """Whether the stored tensor itself is on the device."""
        tensor = self.store.tensor(name)
        return tensor is not None and tensor.device.type == self.device.type

    def hold(self, names: Iterable[str]) -> None:
        """Keep these weights, and no others, on the device.

        Raises
        ------
        StoreError
            If one cannot be read, or one that leaves cannot be written.
        """
        wanted = [n for n in names if not self.stays(n)]
        for name in self.held.keys() - set(wanted):
            self.save(name)
            del self.held[name]
        for name in wanted:
            if name not in self.held:
                self.held[name] = self.read(name).to(self.device)

    def save(self, name: str) -> None:
        """Write a held weight to its store if that has an older value."""
        version = self.version.get(name, 0)
        if version > self.store.fold_steps().get(name, 0):
            param, buffer = self.table[name], page_aligned(padded(self.table[name].stored_bytes))
            as_stored(param, buffer).copy_(self.held[name])
            self.write(name, buffer, version)

    def write(self, name: str, buffer: torch.Tensor, version: int) -> int:
        """Store a weight of a version; return the bytes written.

        Raises
        ------
        StoreError
            If the store fails; its old value is still there.
        """
        count = self.store.write(name, buffer, version, self.lineage(version))
        self.version[name] = version
        return count

    def _of_model(self, name: str) -> torch.Tensor:
        """Return a parameter or buffer, or its part that is a piece, from the model."""
        param = self.table.get(name)
        return self._whole(name) if param is None else param.view(self._whole(param.parameter))

    def _whole(self, name: str) -> torch.Tensor:
        module, attribute = self._owner[name]
        tensor: torch.Tensor = getattr(module, attribute)
        return tensor

    @property
    def elsewhere(self) -> bool:
        """Whether the model itself has no memory for its weights."""
        return any(self._whole(name).is_meta for name in self._compiled)

    def read(self, name: str) -> torch.Tensor:
        """Return the stored value of a weight, in memory of its own; its bytes, if encoded."""
        buffer = page_aligned(padded(self.table[name].stored_bytes))
        self.store.read(name, buffer)
        return as_stored(self.table[name], buffer)

    def value(self, name: str) -> torch.Tensor:
        """Return the newest value of a weight, pending terms included, in memory of its own."""
        held = self.held.get(name)
        found = self.read(name) if held is None else held.clone()
        if self.table[name].format is not None:
            found, encoded = self.room_for(name, found.device), found
            self.decode(name, encoded, self.version.get(name, 0), found)
        elif name in self.version:
            self.fold(name, found, self.version[name])
        return found.cpu()

    def parameter(self, name: str) -> torch.Tensor:
        """Return the newest value of a parameter, put together where it is in pieces."""
        parts = [n for n, p in self.table.items() if p.parameter == name]
        if parts == [name]:
            return self.value(name)
        whole = torch.empty(self._whole(name).shape, dtype=self._whole(name).dtype)
        for part in parts:
            self.table[part].view(whole).copy_(self.value(part))
        return whole

    def rows(self, names: Sequence[str], index: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return rows of a stored table, as an embedding does, and the bytes read from a disk.

        Parameters
        ----------
        names
            The table, or its pieces in order.

        Raises
        ------
        StoreError
            If the store cannot be read.
        """
        params = [self.table[name] for name in names]
        flat, width = index.flatten().to("cpu"), params[0].shape[1:]
        out, nbytes = torch.empty((flat.numel(), *width), dtype=params[0].dtype), 0
        for param in params:
            local = flat - param.row
            (here,) = torch.where((local >= 0) & (local < param.shape[0]))
            found = torch.empty((here.numel(), *width), dtype=param.dtype)
            nbytes += self.store.read_rows(param.name, local[here], found)
            out[here] = found
        return out.view(*index.shape, *width).to(self.device), nbytes

    def show(self) -> None:
        """Copy the newest values into the model, if it has memory for them and is not the store.

        Raises
        ------
        StoreError
            If the store cannot be read.
        """
        if self.elsewhere:
            return
        for name, param in self.table.items():
            tensor = self._of_model(name).detach()
            if param.format is not None:  # the model's own tensor is not what is stored
                tensor.copy_(self.value(name))
            elif param.trainable and self.store.tier != "host":
                if self.keeps_base(name):
                    self.shown.setdefault(name, tensor.clone())
                tensor.copy_(self.value(name))

    def conceal(self) -> None:
        """Put the bases back into the model that :meth:`settle` and :meth:`show` have replaced."""
        for name, base in self.shown.items():
            self._of_model(name).detach().copy_(base)
        self.shown.clear()

    def check(self) -> None:
        """See that every parameter still is what was compiled.

        Raises
        ------
        ParameterChangedError
            If a parameter's shape, dtype or trainability has changed.
        """
        for name, known in self._compiled.items():
            tensor = self._whole(name)
            found = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            if found != known:
                raise ParameterChangedError(
                    f"parameter {name!r} was compiled as {known[1]}{list(known[0])}, "
                    f"requires_grad={known[2]}, and is now {tensor.dtype}"
                    f"{list(tensor.shape)}, requires_grad={tensor.requires_grad}. Compile again."
                )

    def owe(self, terms: Terms) -> None:
        """Make the terms of the newest step pending for every trainable parameter."""
        self.history.add(terms, min(self.version.values()))

    def fold(self, name: str, weight: torch.Tensor, version: int) -> int:
        """Apply to a weight of a version, in place, what it still owes; return its new version."""
        owed = self.history.since(version, self.table[name].key)
        if owed is None:
            return version
        fold_terms(weight, self.table[name], *owed, self.distribution)
        return self.history.newest

    def decode(self, name: str, stored: torch.Tensor, version: int, out: torch.Tensor) -> int:
        """Read an encoded weight of a version into `out`, with what it owes; return its version."""
        param = self.table[name]
        newest = self.history.newest if param.trainable else version
        owed = self.history.since(version, param.key) if param.trainable else None
        counts = decode_terms(
            stored, param, owed, out, at_fold_point=self.is_fold_point(name, newest),
            rounding=self.rounding, distribution=self.distribution,
        )  # fmt: skip
        self.clipped.add(name, counts)
        return newest

    def encode(self, name: str, weight: torch.Tensor, stored: torch.Tensor) -> None:
        """Store what :meth:`decode` has rounded at a fold point; nothing is lost."""
        form = self.table[name].format
        assert form is not None
        codec.encode(weight, form, stored)

    def room_for(self, name: str, device: torch.device) -> torch.Tensor:
        """Return memory for a decoded weight."""
        param = self.table[name]
        if device.type == "cpu":
            return pool.empty(param.shape, param.dtype)
        return torch.empty(param.shape, dtype=param.dtype, device=device)

    def decode_resident(self, name: str, out: torch.Tensor | None = None) -> None:
        """Decode a weight that stands on the device, for its visits or into `out`."""
        self.visiting.pop(name, None)
        base = self.base(name)
        if out is None:
            out = self.visiting[name] = self.room_for(name, base.device)
        self.decode(name, base, self.version.get(name, 0), out)

    def encode_resident(self, name: str, weight: torch.Tensor | None = None) -> None:
        """Encode what was decoded into its base on the device, at a fold point."""
        newest = self.history.newest
        if self.version[name] < newest and self.is_fold_point(name, newest):
            decoded = self.visiting[name] if weight is None else weight
            self.encode(name, decoded, self.base(name))
            self.version[name] = newest

    def fold_resident(self, name: str) -> None:
        """Fold a weight that stays on the device: where it stands, or in a copy for its visits."""
        self.visiting.pop(name, None)
        weight, newest = self.resident(name), self.history.newest
        if self.keeps_base(name) and not self.is_fold_point(name, newest):
            if self.version[name] < newest:
                self.visiting[name] = weight.clone()
                self.fold(name, self.visiting[name], self.version[name])
        else:
            self.version[name] = self.fold(name, weight, self.version[name])

    def leave(self, names: Iterable[str]) -> None:
        """Say that a step needs these weights no more."""
        for name in names:
            self.visiting.pop(name, None)

    def settle(self) -> None:
        """Fold whatever is pending into the store, one weight at a time.

        Where that would round a base between its fold points, the base stays; the newest value is
        shown in the model, if it has memory of its own, until :meth:`conceal`.

        Raises
        ------
        StoreError
            If the store fails; what was not folded stays pending.
        """
        for name, version in self.version.items():
            if self.table[name].format is not None:
                self._settle_encoded(name, version)
            elif self.keeps_base(name):
                stored = self.store.tensor(name)
                if stored is not None and name not in self.held and name not in self.shown:
                    self.shown[name] = stored.clone()
                    self.fold(name, stored, version)
            elif name in self.held or self.stays(name):
                self.fold_resident(name)
            elif version < self.history.newest:
                buffer = page_aligned(padded(self.table[name].bytes))
                self.store.read(name, buffer)
                folded = self.fold(name, as_tensor(self.table[name], buffer), version)
                self.write(name, buffer, folded)
            if name in self.held:
                self.save(name)

    def _settle_encoded(self, name: str, version: int) -> None:
        """Fold an encoded weight into the store, if the newest version is its fold point."""
        newest = self.history.newest
        if version == newest or not self.is_fold_point(name, newest):
            return
        if name in self.held or self.stays(name):
            self.decode_resident(name)
            self.encode_resident(name)
            self.leave([name])
            return
        buffer = page_aligned(padded(self.table[name].stored_bytes))
        self.store.read(name, buffer)
        decoded = self.room_for(name, buffer.device)
        self.decode(name, buffer, version, decoded)
        self.encode(name, decoded, as_stored(self.table[name], buffer))
        self.write(name, buffer, newest)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter or buffer, and its name there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
