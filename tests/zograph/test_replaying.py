"""A replay has the bits of the run, from folders and models, and refuses what does not fit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import zograph
from tests.zograph.seedlog import runs
from zograph import replaying
from zograph.applying import fold_terms
from zograph.errors import LogError, OptionError, StoreError

STEPS = 7
Values = dict[str, torch.Tensor]


def run(log: Path, dtype: torch.dtype = torch.float32, **options: Any) -> list[Values]:
    """Run with a log; return the weights before the first and behind each step."""
    with runs.start(dtype, log=log, **options) as step:
        found = [runs.values(step)]
        for i in range(STEPS):
            runs.take(step, range(i, i + 1), dtype)
            found.append(runs.values(step))
    return found


@pytest.fixture
def log(tmp_path: Path) -> Path:
    with runs.start(log=tmp_path / "run.zolog") as step:
        runs.take(step, range(3))
    return tmp_path / "run.zolog"


def same(folder: Path, expected: Values) -> bool:
    found = load_file(folder / "model.safetensors")
    assert found.keys() <= expected.keys()
    return all(torch.equal(t, expected[n]) for n, t in found.items())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "directions": {"directions": 3},
    "rademacher": {"distribution": "rademacher"},
    "elided": {"fold_every": 3, "directions": 2},
    "encoded": {"transfer_dtype": "int8", "rounding": "stochastic", "fold_every": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_bits_of_the_run(options: str, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = run(tmp_path / "log", dtype, **OPTIONS[options])
    for until in (0, 2, 5, None):
        out = zograph.replay(runs.model(dtype), tmp_path / "log", until=until, out=tmp_path / "o")
        assert out == tmp_path / "o"
        assert same(out, expected[STEPS if until is None else until])
        for path in out.iterdir():
            path.unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_is_done_in_pieces(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "log", dtype, fold_every=2, directions=2)
    monkeypatch.setattr(replaying, "ATONCE", 3 * 256)
    out = zograph.replay(runs.model(dtype), tmp_path / "log", out=tmp_path / "o")
    assert same(out, expected[STEPS])


def test_a_skipped_step_moves_nothing(tmp_path: Path) -> None:
    with runs.start(log=tmp_path / "log", on_nan="skip") as step:
        runs.take(step, range(2))
        bad = runs.batch(2)
        step(x=bad["x"] * float("nan"), y=bad["y"])
        runs.take(step, range(3, 5))
        expected = runs.values(step)
    assert same(zograph.replay(runs.model(), tmp_path / "log", out=tmp_path / "o"), expected)


def test_the_model_stays_as_it_is(log: Path, tmp_path: Path) -> None:
    model, before = runs.model(), runs.model().state_dict()
    zograph.replay(model, log, out=tmp_path / "o")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "GPT2LMHeadModel": transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32
    ),
    "BertForSequenceClassification": transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    ),
    "T5ForConditionalGeneration": transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_folders_of_any_architecture(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    model = getattr(transformers, name)(CONFIGS[name]).eval()
    model.save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    labels = torch.tensor([0, 1]) if "Sequence" in name else torch.arange(16).view(2, 8)
    batch = {"input_ids": torch.arange(16).view(2, 8), "labels": labels}
    with zograph.compile(
        model, lr=0.01, log=tmp_path / "log", device="cpu", backend="eager"
    ) as step:
        for _ in range(3):
            step(**batch)
        step.save_pretrained(tmp_path / "run")
    out = zograph.replay(base, tmp_path / "log", out=tmp_path / "o")
    assert same(out, load_file(tmp_path / "run" / "model.safetensors"))
    names = {p.name for p in out.iterdir()}
    assert names == {p.name for p in (tmp_path / "run").iterdir()} | {"tokenizer.json"}


def test_other_bases_are_refused(log: Path, tmp_path: Path) -> None:
    other = runs.model()
    nn.init.zeros_(next(other.parameters()))
    frozen = runs.model()
    next(frozen.parameters()).requires_grad_(False)
    bases: dict[str, nn.Module] = {
        "starts from other values": other,
        "trained other parameters": frozen,
        "is of another model": runs.model(torch.float64),
    }
    for message, base in bases.items():
        with pytest.raises(LogError, match=message):
            zograph.replay(base, log, out=tmp_path / "o")
    transformers.GPT2LMHeadModel(CONFIGS["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(LogError, match="another model than"):
        zograph.replay(tmp_path / "gpt2", log, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("until", [-1, 4, 1.0, True])
def test_until_is_in_the_log(until: Any, log: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"until is .* has 3 steps: give 0 \(the base\) to 3"):
        zograph.replay(runs.model(), log, until=until, out=tmp_path / "o")


def test_a_torn_tail_is_left_out_and_left_alone(log: Path, tmp_path: Path) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole[:-5])
    with pytest.warns(UserWarning, match="are left out; it ends with 2 steps"):
        cut = zograph.replay(runs.model(), log, out=tmp_path / "cut")
    assert log.read_bytes() == whole[:-5]
    log.write_bytes(whole)
    two = zograph.replay(runs.model(), log, until=2, out=tmp_path / "two")
    assert same(cut, load_file(two / "model.safetensors"))


def test_damage_is_an_error(log: Path, tmp_path: Path) -> None:
    data = bytearray(log.read_bytes())
    data[-2 * 48 + 10] ^= 1
    log.write_bytes(data)
    with pytest.raises(LogError, match="is damaged at byte"):
        zograph.replay(runs.model(), log, out=tmp_path / "o")
    with pytest.raises(StoreError, match="cannot be read"):
        zograph.replay(runs.model(), tmp_path / "none", out=tmp_path / "o")


def test_what_is_there_is_replaced_only_when_asked(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(OptionError, match="is not empty"):
        zograph.replay(runs.model(), log, out=out)
    assert [p.name for p in out.iterdir()] == ["mine"]
    zograph.replay(runs.model(), log, out=out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    with pytest.raises(OptionError, match="which is read: choose another"):
        zograph.replay(runs.model(), log, out=tmp_path, overwrite=True)
    assert log.exists()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt, also in a process that was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_leaves_nothing(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold, calls = fold_terms, []

    def interrupted(*args: Any) -> None:
        fold(*args)
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(replaying, "fold_terms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zograph.replay(runs.model(), log, out=tmp_path / "new" / "o")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(log.name)] == []
