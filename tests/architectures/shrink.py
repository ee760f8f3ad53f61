"""Small configurations of any model type: fields made small by what their names say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from transformers import PreTrainedConfig

Rule = tuple[str, Callable[[int], int]]


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


COUNTS: tuple[Rule, ...] = (
    (r"vocab_size|max_position_embeddings|n_positions", at_most(512)),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", at_most(4)),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", at_most(2)),
    (r"n_group|topk_group|num_expert_group", at_most(1)),
    (r"num_queries", at_most(12)),
    (r"num_kv_shared_layers", at_most(0)),
    (r"max_source_positions", at_most(100)),
)
"""What makes a model large without a word on the sizes of its operators."""

DEPTH: tuple[Rule, ...] = (
    (r"num_feat_extract_layers", lambda value: value),  # a list of sizes goes with it
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", at_most(1)),
    (r"(\w+_)?(hidden_)?layers|n_layers?|(\w+_)?num_layers|num_blocks", at_most(2)),
    (r"(\w+_)?num(_\w+)?_layers|(resampler_)?depth|num_encoder_blocks", at_most(2)),
)

WIDTH: tuple[Rule, ...] = (
    (r"(\w+_)?(intermediate|ffn|ff|moe_intermediate)_(size|dim)|d_ff|mlp_dim", at_most(128)),
    (r"(\w+_)?(hidden|embedding|proj|projector|fusion)_(size|dim)", at_most(64)),
    (r"d_model|n_embd|emb_dim|embed_dim|embedding_dim|dim|word_embed_proj_dim", at_most(64)),
    (r"projection_dim|out_hidden_size|output_dim|shape_size|coordinate_size", at_most(64)),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|n_head_kv", at_most(2)),
    (r"(\w+_)?(attention_heads|num_heads|n_heads?)", at_most(4)),
    (r"(\w+_)?head_dim|d_kv|dim_head|attention_head_size", at_most(16)),
    (r"(kv|q)_lora_rank", at_most(16)),
    (r"image_size|upsample_groups", at_most(64)),
    (r"sliding_window|attention_window", at_most(16)),
)

SCALES = (8, 2)
"""Factors that all sizes and numbers of heads are divided by where `WIDTH` gives no model."""


KEY_HEADS = "num_key_value_heads"
UNSET: dict[str, Any] = {
    "prediction_length": 8, "vocab_size": 64, "pad_token_id": 1, "num_experts_per_tok": 2,
    "n_routed_experts": 4, "attn_layer_indices": [1], "default_language": "en_XX",
}  # fmt: skip
"""What a configuration leaves to its user."""
OPTIONAL: dict[str, Any] = {"head_dim": 16, KEY_HEADS: 2, "sliding_window": 16}
"""What a model derives, or has no need of, where it is not set; or should."""
DERIVED = ("transformers_version", "stage_names", "out_features")
"""What a part of a configuration says although it follows from the rest."""

Width = Callable[[str, int], int]


def shrunken(kind: type[PreTrainedConfig]) -> Iterator[PreTrainedConfig]:
    """Yield small configurations, the smallest first; invalid ones are left out."""
    for depth, unset in product((DEPTH, ()), (UNSET, UNSET | OPTIONAL)):
        for width in (fixed, *(scaled(s) for s in SCALES), unchanged):
            try:
                yield kind(**small(kind(), (*COUNTS, *depth), width, unset))
            except Exception:  # noqa: BLE001  whatever a configuration may say
                continue


def fixed(name: str, value: int) -> int:
    return ruled(WIDTH, name, value)


def unchanged(name: str, value: int) -> int:
    return value


def scaled(factor: int) -> Width:
    """Return what divides every size by a factor, so that sizes that agree go on agreeing."""

    def divide(name: str, value: int) -> int:
        sized = any(re.fullmatch(pattern, name) for pattern, _ in WIDTH)
        keeps = re.fullmatch(r"(\w+_)?head_dim|d_kv|sliding_window|attention_window", name)
        return value if keeps or not sized else max(1, value // factor)

    return divide


def ruled(rules: tuple[Rule, ...], name: str, value: int) -> int:
    """Return the value that the first rule of this name gives."""
    for pattern, change in rules:
        if re.fullmatch(pattern, name):
            return change(value)
    return value


def small(
    config: PreTrainedConfig, rules: tuple[Rule, ...], width: Width, unset: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments that make a configuration small; what a class derives is left to it."""
    found: dict[str, Any] = {}
    layers = vars(config).get("num_hidden_layers")
    for name, value in vars(config).items():
        if name.startswith("_") or name == "model_type" or isinstance(value, bool):
            continue
        if isinstance(value, PreTrainedConfig):
            own = {n: v for n, v in value.to_diff_dict().items() if n not in DERIVED}
            found[name] = own | small(value, rules, width, unset)
        elif name == "rope_parameters" and value and OPTIONAL.keys() <= unset.keys():
            if "num_attention_heads" in vars(config):
                found[name] = value | {"mrope_section": sections(config, width)}
        elif name in unset and value is None:
            found[name] = unset[name]
        elif isinstance(value, int):
            changed = width(name, ruled(rules, name, value))
            if name.endswith("token_id"):
                changed = min(value, vocabulary(config) - 1)
            if changed != value:
                found[name] = changed
        elif isinstance(value, list) and layers and len(value) == layers:
            kept = ruled(rules, "num_hidden_layers", layers)
            found[name] = [*value[: kept - 1], value[-1]]  # the last layer may be of another kind
            if set(value) == {"linear_attention"}:
                found[name][-1] = "full_attention"
    heads, groups = (vars(config).get(n) for n in ("num_attention_heads", KEY_HEADS))
    if groups is not None and groups == heads:  # a model may rely on it
        found[KEY_HEADS] = found.get("num_attention_heads", heads)
    return found


def sections(config: PreTrainedConfig, width: Width) -> list[int]:
    """Divide the rotated half of a head among time, rows and columns."""
    sizes = {n: width(n, v) for n, v in vars(config).items() if isinstance(v, int)}
    head = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    half = int(head * config.rope_parameters.get("partial_rotary_factor", 1)) // 2
    return [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]


def vocabulary(config: PreTrainedConfig) -> int:
    """Return the number of tokens that a shrunken configuration has."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return ruled(COUNTS, "vocab_size", int(size or 512))
