"""The sweep over model types: a sample of it, and that it can tell a difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from tests.architectures import check
from tests.architectures.shrink import COUNTS, DEPTH, UNSET, fixed, scaled, shrunken, small
from tests.reference import Reference

SAMPLE = ("gemma3_text", "mamba", "mpnet", "patchtst", "qwen2_vl", "segformer", "wav2vec2", "xlnet")
"""Of each kind one: text of several forms, images, audio, time series, text with images."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    found = check.check(name)
    assert found["outcome"] == "equal", found
    assert found["error"] <= 1e-5


@pytest.mark.slow
def test_a_loop_on_values_has_no_graph() -> None:
    found = check.check("switch_transformers")
    assert found["outcome"] == "no graph"
    assert "modeling_switch_transformers.py" in found["said"]


def test_what_cannot_be_built_says_why() -> None:
    found = check.check("detr")  # needs a package that is not there
    assert found["outcome"] == "not built"
    assert found["said"]


@pytest.mark.parametrize("run", [0, 1], ids=["resident", "streamed"])
def test_a_difference_is_told(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, runs = check.run, iter(range(2))

    def wrong(*args: Any) -> Any:
        records, weights, budget = honest(*args)
        if next(runs) == run:
            next(iter(weights.values())).view(-1)[0] += 1
        return records, weights, budget

    monkeypatch.setattr(check, "run", wrong)
    found = check.check("bert")
    assert found["outcome"] == "unequal"
    assert not found["streamed"]


def test_a_wrong_loss_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Reference.losses
    monkeypatch.setattr(
        Reference, "losses", lambda self, batch, seed: honest(self, batch, seed + 1)
    )
    found = check.check("bert")
    assert found["outcome"] == "unequal"
    assert found["streamed"]


def test_configurations_become_small() -> None:
    kind = CONFIG_MAPPING["qwen3_next"]
    config = next(shrunken(kind))
    assert config.num_hidden_layers == 2
    assert config.hidden_size == 64
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.vocab_size == 512


def test_parts_become_small() -> None:
    config = CONFIG_MAPPING["qwen2_vl"]()
    found = small(config, (*COUNTS, *DEPTH), fixed, UNSET)
    assert found["vision_config"]["depth"] == 2
    assert found["text_config"]["hidden_size"] == 64


def test_scaled_sizes_go_on_agreeing() -> None:
    divide = scaled(8)
    assert divide("hidden_size", 1024) // divide("num_attention_heads", 16) == 64
    assert divide("head_dim", 64) == 64
    assert divide("vocab_size", 512) == 512


def test_a_small_model_is_small() -> None:
    model, _, _ = check.found(CONFIG_MAPPING["llama"])
    assert sum(p.numel() for p in model.parameters()) < 1 << 20
    assert all(p.dtype == torch.float32 for p in model.parameters())
