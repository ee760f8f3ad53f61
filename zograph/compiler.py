"""`zograph.compile` and `zograph.resume`: from a model to a compiled zeroth-order step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from zograph.errors import OptionError
from zograph.formats import parse_transfer_dtype
from zograph.options import BACKENDS, Options, device_memory, one_of, parse_memory, pick_device
from zograph.pipeline import Pipeline, default_passes
from zograph.seedlog import read_log
from zograph.seedlog.identity import option_of
from zograph.step import ZOStep
from zograph.trajectory.options import Anderson


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
    transfer_dtype: torch.dtype | str | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    fold_every: int | Literal["auto"] = 1,
    method: Literal["zo-sgd"] = "zo-sgd",
    directions: int = 1,
    distribution: Literal["normal", "rademacher"] = "normal",
    anderson: Anderson | None = None,
    passes: Pipeline | None = None,
    log: str | Path | None = None,
    fsync_every: int = 1,
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
        in a fresh folder of the working directory, removed at the end; with `log`, the folder
        named as the log with ``.work`` behind, kept) or the path of a work folder, which is kept.
        A model of :func:`zograph.from_pretrained` lives on the disk.
    transfer_dtype
        Store and move weights of two or more dimensions in this format: bfloat16, float16,
        float8_e4m3fn, float8_e5m2 or int8 (a float32 scale for every 128 elements); weights no
        wider than it keep their dtype. It changes numbers: a weight is what its stored form says,
        and its pending updates, wherever it is. Use it with `fold_every`, or small updates are
        rounded away. None: stored as they are.
    rounding
        Of a weight to `transfer_dtype`, at its fold points: ``"nearest"`` or ``"stochastic"``.
    fold_every
        Write a streamed weight back every so many steps only; in between it is its stored base
        and pending terms, which each visit applies anew. ``"auto"`` weighs the disk's write rate
        against the noise rate. A float32 weight has the same bits for any period; a narrower one
        is rounded at its fold points, which depend on step and name alone.
    method, directions
        ``"zo-sgd"``, averaging `directions` independent estimates a step.
    distribution
        Of z: ``"normal"`` or ``"rademacher"``.
    anderson
        Mix the trajectory by cycles of steps that share their seeded directions; see
        :class:`zograph.Anderson`. `directions` is then what it says. It needs `lr` as plain ZO-SGD
        with as many directions does; on a GPU each step waits for its losses.
    passes
        The pipeline; ``zograph.default_passes()`` with passes of your own inserted.
    log
        Write the run's seed log there as it goes: :func:`zograph.resume` continues from it after
        a kill, bit for bit. The model's values must not be changed by others from then on.
    fsync_every
        Records of the log from one flush to the next: what a loss of power may cost, beside the
        newest flush under way. 0: the operating system decides. A kill costs nothing.
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
        If the model has no trainable parameter, or one that is not real floating, or a weight to
        store in `transfer_dtype` is NaN.
    StoreError
        If the work folder or the log cannot be used: read-only, in use by another run, or of
        another run.

    Examples
    --------
    >>> import torch, zograph
    >>> model = torch.nn.Linear(4, 2)
    >>> loss = lambda m, x, y: torch.nn.functional.cross_entropy(m(x), y)
    >>> step = zograph.compile(model, loss_fn=loss, lr=0.1, backend="eager")
    >>> step(x=torch.ones(3, 4), y=torch.tensor([0, 1, 0])).shape
    torch.Size([])
    """
    given = dict(locals())
    model, lr = given.pop("model"), given.pop("lr")
    return ZOStep(model, lr, make_options(**given))


def resume(
    model: nn.Module, path: str | Path, log: str | Path | None = None, **options: Any
) -> ZOStep:
    """Go on with a run from its seed log, bit for bit as if it had never ended.

    Parameters
    ----------
    model
        Holds the values that the run started from.
    path
        The log. A torn last record is cut off, with a warning; its step is run again.
    log
        None, or `path`: append to the log. Another path: begin there with a copy.
    **options
        As :func:`zograph.compile` takes them. Those that change numbers are the log's, and so
        are `backend` and, by its last step, `lr`, unless given; `loss_fn` and `passes` must be
        given again. Budget, storage and threads may differ.

    Returns
    -------
    ZOStep
        Its `last` is the log's last step, None if there is none.

    Raises
    ------
    LogError
        If the log is damaged, of another version, model, base or noise, or an option that changes
        numbers, the backend or the kind of device differs from it.
    OptionError
        If an option is unknown or out of range.
    StoreError
        If log or work folder cannot be used.
    """
    logged = read_log(path)
    defaults = {n: p.default for n, p in inspect.signature(compile).parameters.items()}
    if unknown := options.keys() - defaults.keys() | options.keys() & {"model"}:
        raise OptionError(f"{sorted(unknown)[0]!r} is no option of zograph.compile.")
    header = logged.header
    known = {name: option_of(name, value) for name, value in header.options.items()}
    known |= {"backend": header.engine["backend"], "lr": logged.lr()}
    if options.get("fold_every") == "auto":  # it was decided when the log was begun
        del options["fold_every"]
    given = defaults | known | options | {"log": path if log is None else log}
    del given["model"]
    lr = given.pop("lr")
    return ZOStep(model, lr, make_options(**given), logged)


def make_options(
    *,
    device: str | torch.device | None,
    passes: Pipeline | None,
    backend: Literal["inductor", "eager"],
    memory: int | float | str | None,
    log: str | Path | None,
    transfer_dtype: torch.dtype | str | None,
    directions: int,
    anderson: Anderson | None,
    **rest: Any,
) -> Options:
    """Turn what a user writes into options.

    Raises
    ------
    OptionError
        If one is unknown or out of range.
    """
    one_of("backend", backend, BACKENDS)
    chosen = pick_device(device)
    if directions == 1 and isinstance(anderson, Anderson):
        directions = anderson.directions
    return Options(
        device=chosen,
        passes=default_passes() if passes is None else passes,
        backend=usable_backend(backend),
        memory=parse_memory(memory, device_memory(chosen)),
        log=None if log is None else Path(log).expanduser(),
        transfer_dtype=parse_transfer_dtype(transfer_dtype, chosen),
        directions=directions,
        anderson=anderson,
        **rest,
    )


def usable_backend(backend: Literal["inductor", "eager"]) -> Literal["inductor", "eager"]:
    """Fall back to eager, with a warning, where Inductor finds no C++ compiler."""
    if backend == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            warnings.warn(
                "no C++ compiler found, so backend='inductor' becomes 'eager', which is slower. "
                "Install g++ (Debian: apt-get install g++) or set CXX.",
                stacklevel=4,
            )
            return "eager"
    return backend
