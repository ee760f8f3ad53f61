"""A model and a batch for a configuration, from the auto classes and the signature of `forward`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

ROWS, LENGTH = 2, 12
MASKS = ("input_features_mask", "padding_mask", "pixel_attention_mask", "spatial_shapes")
LABELS = ((ROWS, LENGTH), (ROWS,))
LAYOUTS = ("plain", "bins first", "bins last", "more dimensions")
"""Of images and audio."""
GRIDS = ((1, 4, 4), (1, 4, 8))
"""Frames, rows and columns of the patches of two images."""
MOST_PARAMETERS = 200_000_000

HEADS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM",
    "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ", "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION", "TIME_SERIES_PREDICTION", "PRETRAINING",
)  # fmt: skip
"""The tasks to look for a class, in this order; then the bare model."""


class NotBuilt(Exception):
    """No configuration or no batch was found."""


def model_class(kind: type[PreTrainedConfig]) -> str | None:
    """Name the first class that has a head for a model type, else the bare model, if any."""
    names = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS]
    for mapping in (*names, "MODEL_MAPPING_NAMES"):
        found = getattr(auto, mapping).get(kind.model_type)
        if found is not None:
            return found if isinstance(found, str) else str(found[0])
    return None


def build(cls: Any, config: PreTrainedConfig) -> nn.Module:
    """Build a model with random weights, none of them constant, in eval mode.

    Raises
    ------
    NotBuilt
        If it is too large.
    """
    if cls.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"{size:,} parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.copy_(torch.nan_to_num(p).clamp(-2, 2) + 0.02 * torch.randn(p.shape))
    assert isinstance(model, nn.Module)
    return model


def batches(model: Any) -> Iterator[dict[str, Any]]:
    """Yield batches to try, each once: with labels and masks, with labels, bare, with all."""
    takes = inspect.signature(model.forward).parameters
    needed = [
        n for n, p in takes.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    named = model.main_input_name
    inputs = (named if isinstance(named, str) else named[0], "input_ids", "pixel_values")
    known = list(dict.fromkeys(n for n in inputs if n in takes))
    decoded = ("attention_mask", "decoder_input_ids")
    extras = (("attention_mask", "labels"), ("labels",), decoded, MASKS, (), tuple(takes))
    seen = set()
    for main, extra in product((known[:1], known[1:2], known[:2]), extras):
        for make in (Maker(model, *way) for way in product(LABELS, LAYOUTS)):
            names = dict.fromkeys([*main, *needed, *(n for n in extra if n in takes)])
            found = {n: make(n) for n in names}
            given = {n: v for n, v in found.items() if v is not None}
            form = tuple((n, v.shape) for n, v in given.items())
            if form not in seen and all(n in given for n in (*main, *needed)):
                seen.add(form)
                yield given


class Maker:
    """Makes the arguments of a forward by their names.

    Parameters
    ----------
    label
        The shape of labels.
    layout
        One of `LAYOUTS`.
    """

    def __init__(self, model: Any, label: tuple[int, ...], layout: str) -> None:
        self.main, self.label, self.layout = model.main_input_name, label, layout
        self.takes = inspect.signature(model.forward).parameters
        self.config = config = model.config
        self.generator = torch.Generator().manual_seed(1)
        parts = (c for c in vars(config).values() if isinstance(c, PreTrainedConfig))
        self.configs = [config, *parts]

    def field(self, *names: str, default: int = 0) -> int:
        """Return the first integer that a configuration or a part of it has by these names."""
        for name in names:
            for config in self.configs:
                value = getattr(config, name, None)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if isinstance(value, int) and value:
                    return value
        return default

    def __call__(self, name: str) -> torch.Tensor | None:
        kinds = (self.text, self.patches, self.images, self.audio, self.series)
        found = (kind(name) for kind in kinds)
        return next((x for x in found if x is not None), None)

    def text(self, name: str) -> torch.Tensor | None:
        """Return tokens, what stands beside them, or labels."""
        vocab = self.field("vocab_size", default=100)
        if name in ("input_ids", "decoder_input_ids", "qformer_input_ids"):
            return self.integers(3, vocab, ROWS, LENGTH)
        if name in ("attention_mask", "decoder_attention_mask"):
            mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
            mask[0, -2:] = 0  # transformers leaves out a mask of ones, but not in a graph
            return mask if self.main == "input_ids" else None
        if name == "labels":
            classes = vocab if len(self.label) == 2 else int(getattr(self.config, "num_labels", 2))
            return self.integers(0, classes, *self.label)
        if name == "bbox":
            return self.integers(0, 100, ROWS, LENGTH, 2).repeat(1, 1, 2).sort(-1).values
        return None

    def patches(self, name: str) -> torch.Tensor | None:
        """Return the patches of images of several sizes in a row, or padded, and their sizes."""
        frames = self.field("temporal_patch_size")
        size = self.field("num_channels", "in_channels", default=3)
        size *= self.field("patch_size", default=1) ** 2
        _, rows, columns = GRIDS[0]
        if name in ("grid_thw", "image_grid_thw"):
            return torch.tensor(GRIDS)
        if name == "merge_sizes":
            return torch.ones(len(GRIDS), dtype=torch.int64)
        if name == "spatial_shapes":
            return torch.tensor([[rows, columns]] * ROWS)
        if name == "pixel_attention_mask":
            return torch.ones(ROWS, rows * columns, dtype=torch.int64)
        if name in ("hidden_states", "pixel_values") and (frames or "grid_thw" in self.takes):
            return self.normal(sum(math.prod(grid) for grid in GRIDS), (frames or 1) * size)
        if name == "pixel_values" and "spatial_shapes" in self.takes:
            return self.normal(ROWS, rows * columns, size)
        return None

    def images(self, name: str) -> torch.Tensor | None:
        """Return images or videos."""
        if name not in ("pixel_values", "pixel_values_videos"):
            return None
        frames = self.field("num_frames", "frames_per_clip")
        if name == "pixel_values_videos":
            frames = frames or 2
        if self.layout == "more dimensions":
            frames = 0 if frames else 2
        channels = self.field("num_channels", "in_channels", default=3)
        sides = [self.field("image_size", default=64)] * 2
        for size in (getattr(config, "image_size", None) for config in self.configs):
            if isinstance(size, (list, tuple)) and len(size) == 2:
                sides = [int(n) for n in size]
        return self.normal(ROWS, *((frames,) if frames else ()), channels, *sides)

    def audio(self, name: str) -> torch.Tensor | None:
        """Return samples of a wave or spectra, or a mask of them."""
        sizes = ("feature_projection_input_dim", "input_dim", "num_mel_bins", "feature_size")
        bins = self.field(*sizes, "input_feat_size", default=80)
        length = 2 * self.field("max_source_positions") or self.field("max_length", default=200)
        shapes = ((5760,), (bins, length), (length, bins), (1, 5760))
        shape = shapes[LAYOUTS.index(self.layout)]
        if name in ("input_features", "audio_values", "input_values", "audio_mel"):
            return self.normal(ROWS, *shape)
        mask = torch.ones(ROWS, shape[0] if self.layout == "bins last" else shape[-1])
        if name == "audio_mel_mask":
            return mask.bool()
        return mask.long() if name in ("input_features_mask", "padding_mask") else None

    def series(self, name: str) -> torch.Tensor | None:
        """Return the past of a time series, or what is known of it."""
        lags = getattr(self.config, "lags_sequence", None)
        length = self.field("context_length", "prediction_length", default=32) + max(lags or [0])
        if name == "past_time_features":
            return self.normal(ROWS, length, self.field("num_time_features"))
        channels = self.field("num_input_channels", "input_size", default=1)
        shape = (length,) if lags and channels == 1 else (length, channels)
        if name == "past_observed_mask":
            return torch.ones(ROWS, *shape)
        return self.normal(ROWS, *shape) if name == "past_values" else None

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def own_loss(model: nn.Module, **batch: Any) -> torch.Tensor:
    """Return a loss of whatever a model puts out: the mean square of every floating tensor."""
    leaves = pytree.tree_leaves(dict(model(**batch)))
    floats = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return torch.stack([x.float().square().mean() for x in floats]).mean()
