"""Tiny random models of many architectures, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCAB = 99
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP_SIZE = {"intermediate_size": 64, "num_key_value_heads": 2}


def lm_batch(rows: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - max(1, length // 4) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def class_batch(rows: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    batch = lm_batch(rows, length, generator)
    return batch | {"labels": torch.randint(0, 2, (rows,), generator=generator)}


def seq2seq_batch(rows: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    batch = lm_batch(rows, length, generator)
    labels = torch.randint(3, VOCAB, (rows, max(2, length // 2)), generator=generator)
    return batch | {"labels": labels}


def image_batch(rows: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 2, (rows,), generator=generator)}


def xy_batch(rows: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"x": x, "y": torch.randint(0, 4, (rows,), generator=generator)}


class CNN(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(768, 32), nn.Tanh(), nn.Linear(32, 4))


def xy_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), y)


def _t5(tie: bool) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2}
    config = hf.T5Config(**sizes, num_heads=2, decoder_start_token_id=0, tie_word_embeddings=tie)
    return hf.T5ForConditionalGeneration(config)


def _bart(tie: bool) -> nn.Module:
    config = hf.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tie,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def _opt(tie: bool) -> nn.Module:
    config = hf.OPTConfig(
        **SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64,
        tie_word_embeddings=tie,
    )  # fmt: skip
    return hf.OPTForCausalLM(config)


def _gpt2(tie: bool) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=tie
    )
    return hf.GPT2LMHeadModel(config)


def _bert(tie: bool) -> nn.Module:
    config = hf.BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=64)
    return hf.BertForSequenceClassification(config)


def _vit(tie: bool) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.ViTForImageClassification(
        hf.ViTConfig(**sizes, intermediate_size=64, image_size=16, patch_size=4)
    )


def _llama_like(config: Any, model: Any, **extra: Any) -> Callable[[bool], nn.Module]:
    def build(tie: bool) -> nn.Module:
        built: nn.Module = model(config(**SMALL, **MLP_SIZE, **extra, tie_word_embeddings=tie))
        return built

    return build


Batch = Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]
ZOO: dict[str, tuple[Callable[[bool], nn.Module], Batch]] = {
    "opt": (_opt, lm_batch),
    "llama": (_llama_like(hf.LlamaConfig, hf.LlamaForCausalLM), lm_batch),
    "qwen3": (_llama_like(hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=16), lm_batch),
    "gpt2": (_gpt2, lm_batch),
    "bert": (_bert, class_batch),
    "t5": (_t5, seq2seq_batch),
    "bart": (_bart, seq2seq_batch),
    "mixtral": (
        _llama_like(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=4),
        lm_batch,
    ),
    "vit": (_vit, image_batch),
    "cnn": (lambda tie: CNN(), xy_batch),
    "mlp": (lambda tie: MLP(), xy_batch),
}
TIES = {"opt", "llama", "qwen3", "gpt2", "t5", "bart", "mixtral"}


def build(name: str, *, tie: bool = True, seed: int = 0) -> nn.Module:
    """Build one model of the zoo with fixed random weights, in eval mode."""
    torch.manual_seed(seed)
    model = ZOO[name][0](tie)
    with torch.no_grad():  # no tensor of zeros or ones: a wrong term must show
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return model.eval()


def batch(name: str, rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make one batch for a model of the zoo."""
    return ZOO[name][1](rows, length, torch.Generator().manual_seed(seed))


def loss_fn(name: str) -> Callable[..., torch.Tensor] | None:
    """Return the loss function that the model needs, None if it brings its own."""
    return xy_loss if name in ("cnn", "mlp") else None
