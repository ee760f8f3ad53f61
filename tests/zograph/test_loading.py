from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from tests import zoo
from zograph.errors import ModelError, StoreError
from zograph.export import LazyStateDict, save_pretrained, save_streamed
from zograph.loading import from_pretrained
from zograph.parameters import parameter_table
from zograph.stores.checkpoint import INDEX
from zograph.stores.source import as_tensor, source_of

hf.utils.logging.disable_progress_bar()

AUTO: dict[str, Any] = {
    "bert": hf.AutoModelForSequenceClassification,
    "t5": hf.AutoModelForSeq2SeqLM,
    "bart": hf.AutoModelForSeq2SeqLM,
    "vit": hf.AutoModelForImageClassification,
}
NAMES = ["opt", "llama", "qwen3", "gpt2", "bert", "t5", "bart", "mixtral", "vit", "gemma"]


def build(name: str, tie: bool = True) -> nn.Module:
    if name != "gemma":
        return zoo.build(name, tie=tie)
    torch.manual_seed(0)
    config = hf.Gemma2Config(**zoo.SMALL, **zoo.MLP_SIZE, head_dim=16, tie_word_embeddings=tie)
    return hf.Gemma2ForCausalLM(config).eval()


def batch(name: str) -> dict[str, torch.Tensor]:
    return zoo.batch("opt" if name == "gemma" else name, 2, 8)


def load(folder: Path, name: str, **options: Any) -> nn.Module:
    return from_pretrained(folder, auto_class=AUTO.get(name), **options)


def reader(model: nn.Module) -> Callable[[str], torch.Tensor]:
    source, table = source_of(model), parameter_table(model)
    assert source is not None

    def read(name: str) -> torch.Tensor:
        buffer = torch.empty(table[name].bytes, dtype=torch.uint8)
        source.read(table[name], buffer)
        return as_tensor(table[name], buffer)

    return read


def filled(model: nn.Module) -> nn.Module:
    """Give the model its values; ties stay ties."""
    read = reader(model)
    values = {id(p): nn.Parameter(read(name)) for name, p in model.named_parameters()}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = values[id(p)]
    return model


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_same(found: nn.Module, expected: nn.Module, name: str) -> None:
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in expected.named_parameters()]
    state, reference = found.state_dict(), expected.state_dict()
    assert list(state) == list(reference)
    for key, tensor in reference.items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key
    buffers = dict(found.named_buffers())
    assert all(torch.equal(buffers[n], b) for n, b in expected.named_buffers())
    inputs = batch(name)
    dtype = next(expected.parameters()).dtype
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        one, two = found(**inputs), expected(**inputs)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.loss, two.loss)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["auto", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_same_as_transformers(tmp_path: Path, name: str, dtype: torch.dtype | None) -> None:
    build(name).save_pretrained(tmp_path, max_shard_size="60KB")
    before = digests(tmp_path)
    found = load(tmp_path, name, dtype=dtype)
    assert all(p.is_meta for p in found.parameters())
    assert not any(b.is_meta for b in found.buffers())
    assert not found.training
    auto = AUTO.get(name, hf.AutoModelForCausalLM)
    expected = auto.from_pretrained(tmp_path, dtype=dtype or "auto")
    assert found.config.to_dict() == expected.config.to_dict()
    assert_same(filled(found), expected, name)
    assert digests(tmp_path) == before


def test_float16_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    build("llama").half().save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path, "llama").parameters()} == {torch.float16}


def test_a_config_without_dtype(tmp_path: Path) -> None:
    build("llama").half().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {p.dtype for p in load(tmp_path, "llama").parameters()} == {torch.float16}


@pytest.mark.parametrize("tie", [True, False])
def test_ties(tmp_path: Path, tie: bool) -> None:
    build("opt", tie=tie).save_pretrained(tmp_path)
    found = load(tmp_path, "opt")
    embedding, head = found.get_input_embeddings().weight, found.get_output_embeddings().weight
    assert (embedding is head) is tie


def test_both_tied_weights_stored(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    key = next(k for k in values if k.endswith("embed_tokens.weight"))
    values["lm_head.weight"] = values[key].clone()
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load(tmp_path, "opt")
    assert found.get_input_embeddings().weight is found.get_output_embeddings().weight


def test_base_model_into_a_head_and_back(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "head")
    hf.AutoModel.from_pretrained(tmp_path / "head").save_pretrained(tmp_path / "base")
    base = filled(from_pretrained(tmp_path / "head", auto_class=hf.AutoModel))
    reference = hf.AutoModel.from_pretrained(tmp_path / "head")
    pairs = zip(base.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"lacks 2 weights of Bert.*classifier.bias"):
        found = load(tmp_path / "base", "bert", num_labels=5)
    torch.manual_seed(3)
    expected = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5
    )
    assert_same(filled(found), expected, "bert")


def test_model_class_and_wrapper(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path)
    found = from_pretrained(tmp_path, auto_class=hf.OPTForCausalLM)
    assert isinstance(found, hf.OPTForCausalLM)
    wrapped = nn.ModuleDict({"inner": found})
    source = source_of(wrapped)
    assert source is not None
    info = parameter_table(wrapped)["inner.model.decoder.final_layer_norm.weight"]
    buffer = torch.empty(info.bytes, dtype=torch.uint8)
    assert source.read(info, buffer) == info.bytes


def test_storage_host_loads_into_memory(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path)
    found = load(tmp_path, "opt", storage="host")
    assert source_of(found) is None
    assert_same(found, build("opt"), "opt")


def test_storage_is_passed_on(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path)
    source = source_of(load(tmp_path, "opt", storage=tmp_path / "work"))
    assert source is not None
    assert source.storage == tmp_path / "work"


def test_meta_model_without_values() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(StoreError, match=r"'weight' among them.*zograph.from_pretrained"):
        source_of(model)
    assert source_of(nn.Linear(3, 3)) is None


def test_other_shape(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    values["model.norm.weight"] = torch.ones(33)
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreError, match=r"'model.norm.weight' has shape \[33\].*needs \[32\]"):
        load(tmp_path, "llama")
    found = load(tmp_path, "llama", ignore_mismatched_sizes=True)
    assert reader(found)("model.norm.weight").shape == (32,)


def test_other_checkpoint(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreError, match=r"holds no weight of LlamaForCausalLM"):
        load(tmp_path, "llama")


def test_no_such_class_or_folder(tmp_path: Path) -> None:
    build("vit").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"AutoModelForCausalLM has no model of type 'vit'"):
        from_pretrained(tmp_path)
    with pytest.raises(StoreError, match=r"no folder here, and the hub does not give it"):
        from_pretrained("no-such-owner/no-such-model", local_files_only=True)


def test_quantized(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantized.*unquantized checkpoint"):
        load(tmp_path, "llama")


@pytest.mark.parametrize("size", ["40KB", "5GB"])
def test_hub_fetches_only_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    build("opt").save_pretrained(hub, max_shard_size=size)
    save_file({"x": torch.ones(2)}, hub / "consolidated.safetensors")

    def snapshot_download(name: str, *, allow_patterns: list[str], revision: str) -> str:
        assert (name, revision) == ("owner/model", "main")
        cache.mkdir(exist_ok=True)
        for path in hub.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = from_pretrained("owner/model", revision="main")
    assert_same(filled(found), build("opt"), "opt")
    assert not (cache / "consolidated.safetensors").exists()


def test_missing_shard(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(StoreError, match=rf"{shard.name} is missing"):
        load(tmp_path, "opt")


def contents(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_export_is_what_transformers_writes(tmp_path: Path, name: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    build(name).save_pretrained(theirs)
    found = load(theirs, name)
    for most in (20e3, 5e9):
        save_streamed(found, reader(found), ours, most)
        assert (ours / INDEX).exists() is (most == 20e3)
        assert (ours / "model.safetensors").exists() is (most == 5e9)
        one, two = contents(ours), contents(theirs)
        assert set(one) == set(two)
        assert all(torch.equal(one[k], two[k]) for k in one)
        for file in theirs.glob("*.json"):
            assert (ours / file.name).read_text() == file.read_text()
        auto = AUTO.get(name, hf.AutoModelForCausalLM)
        assert_same(auto.from_pretrained(ours), auto.from_pretrained(theirs), name)
    assert not list(tmp_path.glob(".*"))
    with safe_open(ours / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_export_of_a_plain_module(tmp_path: Path) -> None:
    model = zoo.build("cnn")
    read = lambda name: model.get_parameter(name).detach()  # noqa: E731
    save_streamed(model, read, tmp_path / "x", 100)
    other = zoo.build("cnn", seed=1)
    load_model(other, str(tmp_path / "x" / "model.safetensors"))
    assert all(torch.equal(b, other.state_dict()[k]) for k, b in model.state_dict().items())


def test_failed_export_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path / "from")
    save_pretrained(build("opt"), tmp_path / "to")
    before = digests(tmp_path / "to")
    found = load(tmp_path / "from", "opt")
    read, calls = reader(found), iter(range(5))

    def failing(name: str) -> torch.Tensor:
        if next(calls, None) is None:
            raise StoreError("the disk is gone")
        return read(name)

    with pytest.raises(StoreError, match=r"gone"):
        save_streamed(found, failing, tmp_path / "to")
    assert digests(tmp_path / "to") == before
    assert not [p for p in (tmp_path / "to").iterdir() if p.is_dir()]


def test_export_over_the_checkpoint_is_refused(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path)
    before = digests(tmp_path)
    found = load(tmp_path, "opt")
    with pytest.raises(StoreError, match=r"weights are read from.*another folder"):
        save_streamed(found, reader(found), tmp_path)
    assert digests(tmp_path) == before


def test_state_dict_reads_on_demand(tmp_path: Path) -> None:
    model = build("bart")
    model.save_pretrained(tmp_path)
    found = load(tmp_path, "bart")
    read, asked = reader(found), []

    def counted(name: str) -> torch.Tensor:
        asked.append(name)
        return read(name)

    state = LazyStateDict(found, counted)
    assert list(state) == list(model.state_dict())
    assert len(state) == len(model.state_dict())
    assert not asked
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor)
    with pytest.raises(KeyError):
        state["no such key"]
    assert len(asked) == sum(not k.endswith("final_logits_bias") for k in state)
