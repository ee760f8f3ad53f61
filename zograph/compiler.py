"""`zograph.compile`: from a model to a compiled zeroth-order step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from zograph.options import BACKENDS, Options, device_memory, one_of, parse_memory, pick_device
from zograph.pipeline import Pipeline, default_passes
from zograph.step import ZOStep


def compile(
    model: nn.Module,
    *,
    loss_fn: Callable[..., Any] | None = None,
    lr: float = 1e-6,
    eps: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
    memory: int | float | str | None = None,
    storage: str | Path = "host",
    method: Literal["zo-sgd"] = "zo-sgd",
    directions: int = 1,
    distribution: Literal["normal", "rademacher"] = "normal",
    passes: Pipeline | None = None,
    on_nan: Literal["raise", "skip"] = "raise",
    dynamic: bool = True,
    backend: Literal["inductor", "eager"] = "inductor",
) -> ZOStep:
    """Compile a model into a zeroth-order training step.

    A step perturbs every trainable weight along a seeded direction z, measures the loss at
    ``w + eps z`` and ``w - eps z`` and moves the weights by ``-lr g z`` with
    ``g = (loss_plus - loss_minus) / (2 eps)`` (SPSA; MeZO, Malladi et al. 2023). No
    perturbed copy of the whole model ever exists. The model's own parameters are updated;
    an update becomes visible in them when the next step visits them or at
    :meth:`ZOStep.synchronize`.

    Parameters
    ----------
    model
        Any module. Parameters with ``requires_grad=False`` are never perturbed. It is
        captured in eval mode; its own mode is left alone.
    loss_fn
        ``loss_fn(model, **batch)`` returning a 0-dim loss. By default the loss that the
        model itself returns (as models of transformers do when the batch has labels).
    lr, eps
        Step size and perturbation, both in units of the weights.
    weight_decay
        Weights shrink by ``1 - lr * weight_decay`` a step; parameters of one dimension or
        fewer and those named ``*bias`` are spared.
    seed
        All randomness of the run comes from it.
    device
        CUDA if there is one, else the CPU. The model is moved there.
    compute_dtype
        Floating dtype of the perturbed weights, of floating inputs and of the forward; the
        stored weights keep theirs and the loss is reduced in float32. None: the stored dtype.
    memory
        What a step may take of the device's memory: bytes, ``"8GB"``, ``"2GiB"``, a fraction
        of it, or ``"minimum"``. Weights that do not fit are streamed through it from where they
        are stored, and the results are the same. None: everything stays on the device.
    storage
        Where streamed weights live: ``"host"`` (the model's own memory), ``"disk"`` (a work file
        in a fresh folder of the working directory, removed at the end) or the path of a work
        folder, which is kept. A model of :func:`zograph.from_pretrained` lives on the disk.
    method, directions
        ``"zo-sgd"``, averaging `directions` independent estimates a step.
    distribution
        Of z: ``"normal"`` or ``"rademacher"``.
    passes
        The pipeline; ``zograph.default_passes()`` with passes of your own inserted.
    on_nan
        On a NaN or infinite loss ``"raise"`` :class:`zograph.errors.LossError`, or
        ``"skip"`` the update. The weights stay intact either way.
    dynamic
        Try one graph for all batch and sequence sizes before one graph per shape.
    backend
        ``"inductor"`` compiles the stages; ``"eager"`` needs no compiler.

    Returns
    -------
    ZOStep
        Compiled lazily: at its first call or :meth:`ZOStep.prepare`.

    Raises
    ------
    OptionError
        If an option is unknown or out of range.
    ModelError
        If the model has no trainable parameter, or one that is not real floating.
    StoreError
        If the work folder cannot be used: read-only, in use by another run, or of another run.

    Examples
    --------
    >>> import torch, zograph
    >>> model = torch.nn.Linear(4, 2)
    >>> loss = lambda m, x, y: torch.nn.functional.cross_entropy(m(x), y)
    >>> step = zograph.compile(model, loss_fn=loss, lr=0.1, backend="eager")
    >>> step(x=torch.ones(3, 4), y=torch.tensor([0, 1, 0])).shape
    torch.Size([])
    """
    one_of("backend", backend, BACKENDS)
    chosen = pick_device(device)
    options = Options(
        loss_fn=loss_fn,
        eps=eps,
        weight_decay=weight_decay,
        seed=seed,
        device=chosen,
        compute_dtype=compute_dtype,
        method=method,
        directions=directions,
        distribution=distribution,
        passes=default_passes() if passes is None else passes,
        on_nan=on_nan,
        dynamic=dynamic,
        backend=usable_backend(backend),
        memory=parse_memory(memory, device_memory(chosen)),
        storage=storage,
    )
    return ZOStep(model, lr, options)


def usable_backend(backend: Literal["inductor", "eager"]) -> Literal["inductor", "eager"]:
    """Fall back to eager, with a warning, where Inductor finds no C++ compiler."""
    if backend == "inductor":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            warnings.warn(
                "no C++ compiler found, so backend='inductor' becomes 'eager', which is slower. "
                "Install g++ (Debian: apt-get install g++) or set CXX.",
                stacklevel=3,
            )
            return "eager"
    return backend
