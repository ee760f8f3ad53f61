"""Loading a pretrained model without loading its weights.

transformers' own loader runs on lazy tensors (:mod:`zograph.stores.lazy`): it renames,
converts and ties as always, draws what the checkpoint lacks and computes buffers, and leaves
for every weight a recipe of how to read it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zograph.errors import ModelError, StoreError
from zograph.stores.checkpoint import INDEX, SINGLE, Checkpoint, read_index
from zograph.stores.lazy import LazyTensor, fill, leaf
from zograph.stores.source import Origin, set_origin

GENERATION = "generation_config.json"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def from_pretrained(
    path_or_id: str | Path,
    *,
    auto_class: Any = None,
    storage: str | Path = "disk",
    dtype: torch.dtype | str | None = None,
    **config_overrides: Any,
) -> nn.Module:
    """Build a pretrained model whose weights stay on the disk.

    Parameters
    ----------
    path_or_id
        A folder with config.json and safetensors, or a model's id on the Hugging Face hub.
    auto_class
        A class of transformers; by default ``AutoModelForCausalLM``.
    storage
        ``"disk"``: new weights go into a fresh work folder, removed at the end. A path: into
        that folder, which is kept. ``"host"``: the weights are loaded into memory.
    dtype
        Of the parameters; read weights are converted. None: that of the config or, if it has
        none, of the checkpoint.
    **config_overrides
        Fields of the config, for example ``num_labels=2``, and what the class's own
        ``from_pretrained`` takes (``attn_implementation``, ``revision`` and so on).

    Returns
    -------
    nn.Module
        In eval mode. Parameters are on the meta device; buffers have their values. Compile it
        with :func:`zograph.compile`, which finds the weights.

    Raises
    ------
    StoreError
        If the folder holds no safetensors, a file is missing or damaged, a weight's shape is
        not the config's, or no weight of the checkpoint belongs to the model.
    ModelError
        If `auto_class` has no model of the config's type, or the checkpoint is quantized.
    """
    import transformers

    auto = transformers.AutoModelForCausalLM if auto_class is None else auto_class
    hub = {key: config_overrides.pop(key) for key in HUB_OPTIONS if key in config_overrides}
    wanted: Any = "auto" if dtype is None else dtype
    folder = locate(path_or_id, hub)
    if storage == "host":
        loaded: nn.Module = auto.from_pretrained(folder, dtype=wanted, **config_overrides)
        return loaded.eval()
    checkpoint = Checkpoint(folder)
    config, rest = transformers.AutoConfig.from_pretrained(
        folder, return_unused_kwargs=True, **config_overrides
    )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{path_or_id} is quantized, and its weights can be read only as numbers that are not "
            f"trained. Use the model's unquantized checkpoint."
        )
    model_class, config = choose_class(auto, config)
    mismatches = bool(rest.pop("ignore_mismatched_sizes", False))
    with quiet():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: leaf(checkpoint, name) for name in checkpoint.entries},
            dtype=wanted,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **rest,
        )
    _check(model, info, folder, mismatches)
    model.config.name_or_path = str(path_or_id)
    if (folder / GENERATION).exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    _detach(model, storage)
    evaluated: nn.Module = model.eval()
    return evaluated


def locate(path_or_id: str | Path, options: dict[str, Any]) -> Path:
    """Return the local folder of a model, fetched from the hub if it is an id.

    Raises
    ------
    StoreError
        If there is no such folder and the hub does not give such a model.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    patterns = ["*.json"]
    try:
        folder = Path(snapshot_download(str(path_or_id), allow_patterns=patterns, **options))
        index = folder / INDEX  # the same weights may be there in other files too
        patterns += read_index(index) if index.exists() else [SINGLE]
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns, **options))
    except StoreError:
        raise
    except (OSError, ValueError, RuntimeError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise StoreError(
            f"{path_or_id} is no folder here, and the hub does not give it: {reason} Check the "
            f"path or id, or download the model first."
        ) from e


def choose_class(auto: Any, config: Any) -> tuple[Any, Any]:
    """Return the model class that an auto class stands for, and the part of the config it takes.

    Raises
    ------
    ModelError
        If the auto class has no model of this type.
    """
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None:
        return auto, config
    if type(config) not in mapping:
        raise ModelError(
            f"{auto.__name__} has no model of type {config.model_type!r}: pass another auto_class, "
            f"or the model's class itself."
        )
    found = mapping[type(config)]
    classes = found if isinstance(found, (tuple, list)) else (found,)
    named = [c for c in classes if c.__name__ in (config.architectures or ())]
    chosen = (*named, *classes)[0]
    takes = chosen.config_class
    if takes is not None and not isinstance(config, takes):
        config = config.get_text_config()
    return chosen, config


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bar of a loading that loads nothing."""
    import transformers

    messages: Any = transformers.utils.logging
    shown = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            messages.enable_progress_bar()


def _check(model: nn.Module, info: dict[str, Any], folder: Path, mismatches: bool) -> None:
    """Refuse a checkpoint of another model; warn of weights that it lacks."""
    name = type(model).__name__
    if info["mismatched_keys"] and not mismatches:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise StoreError(
            f"{folder}: {key!r} has shape {list(found)}, and {name} with this config needs "
            f"{list(expected)} ({len(info['mismatched_keys'])} such weights). Check config.json "
            f"and overrides, or pass ignore_mismatched_sizes=True to draw these anew."
        )
    if not any(isinstance(p, LazyTensor) for p in model.parameters()):
        raise StoreError(
            f"{folder} holds no weight of {name}: checkpoint and config.json do not belong "
            f"together, or auto_class is wrong."
        )
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.warn(
            f"{folder} lacks {len(missing)} weights of {name}, which are drawn at random: {shown}. "
            f"Train them before use.",
            stacklevel=3,
        )


def _detach(model: nn.Module, storage: str | Path) -> None:
    """Put meta parameters in place of lazy and drawn ones, and values into lazy buffers."""
    made: dict[torch.Tensor, nn.Parameter] = {}
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is None:
                continue
            if value not in made:
                empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
                made[value] = nn.Parameter(empty, requires_grad=value.requires_grad)
                set_origin(made[value], Origin(value.detach(), storage))
            module._parameters[key] = made[value]
        for key, buffer in module._buffers.items():
            if isinstance(buffer, LazyTensor):
                real = torch.empty(buffer.shape, dtype=buffer.dtype)
                fill(buffer, real)
                module._buffers[key] = real
