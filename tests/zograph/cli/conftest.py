"""Tiny models with a tiny tokenizer, in folders as transformers writes them."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [
    "good",
    "fine",
    "nice",
    "glad",
    "bad",
    "poor",
    "sad",
    "ugly",
    "the",
    "a",
    "day",
    "was",
    "very",
]
GOOD = {"good", "fine", "nice", "glad"}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    )


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 sentences, labelled 1 where they hold a good word."""
    path = tmp_path_factory.mktemp("data") / "sentences.csv"
    lines = ["text,label"]
    for start in ("the day was", "a day was", "the day was very", "a very", "very"):
        lines += [f"{start} {w},{int(w in GOOD)}" for w in WORDS[:8]]
    path.write_text("\n".join(lines) + "\n")
    return path
