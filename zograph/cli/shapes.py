"""Published model sizes: configs by name, without a download.

OPT: arXiv 2205.01068, table 1, with the two peculiarities of the released 350m. Llama 2: arXiv
2307.09288 and its released configs. Qwen3: arXiv 2505.09388, table 1, and its released configs.
"""

from __future__ import annotations

from typing import Any

_OPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "66b": (9216, 64, 72),
    "175b": (12288, 96, 96),
}
"""Width, layers, heads; the feed-forward width is four times the width."""

_LLAMA2 = {
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
    "70b": (8192, 80, 64, 8, 28672),
}
"""Width, layers, heads, key-value heads, feed-forward width."""

_QWEN3 = {
    "0.6b": (1024, 28, 16, 8, 3072, True),
    "1.7b": (2048, 28, 16, 8, 6144, True),
    "4b": (2560, 36, 32, 8, 9728, True),
    "8b": (4096, 36, 32, 8, 12288, False),
    "14b": (5120, 40, 40, 8, 17408, False),
    "32b": (5120, 64, 64, 8, 25600, False),
}
"""As above, then whether the embeddings are tied."""

ZO2 = {
    "opt-1.3b": 3.75,
    "opt-2.7b": 4.14,
    "opt-6.7b": 4.99,
    "opt-13b": 6.18,
    "opt-30b": 8.86,
    "opt-66b": 12.07,
    "opt-175b": 18.04,
}
"""GPU memory in GB of ZO2, fp16, batch 1, sequence 2048 (arXiv 2503.12668)."""


def names() -> list[str]:
    """List the known sizes."""
    families = (("opt", _OPT), ("llama-2", _LLAMA2), ("qwen3", _QWEN3))
    return [f"{family}-{size}" for family, sizes in families for size in sizes]


def known(name: str) -> Any:
    """Return the config of a published size, None if `name` is none."""
    if name not in names():
        return None
    family, _, size = name.rpartition("-")
    return {"opt": opt, "llama-2": llama2, "qwen3": qwen3}[family](size)


def opt(size: str) -> Any:
    """Return the config of an OPT."""
    from transformers import OPTConfig

    width, layers, heads = _OPT[size]
    special: dict[str, Any] = {"word_embed_proj_dim": width}
    if size == "350m":
        special = {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
    return OPTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        vocab_size=50272,
        max_position_embeddings=2048,
        **special,
    )


def llama2(size: str) -> Any:
    """Return the config of a Llama 2."""
    from transformers import LlamaConfig

    width, layers, heads, shared, inner = _LLAMA2[size]
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        intermediate_size=inner,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def qwen3(size: str) -> Any:
    """Return the config of a dense Qwen3."""
    from transformers import Qwen3Config

    width, layers, heads, shared, inner, tied = _QWEN3[size]
    return Qwen3Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=128,
        intermediate_size=inner,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )
