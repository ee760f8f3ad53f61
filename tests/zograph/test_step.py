"""What a step does beyond the numerics contract."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zograph
from tests.reference import Reference
from tests.zoo import CNN, MLP, batch, build, loss_fn, xy_loss
from zograph.errors import (
    BatchError,
    CaptureError,
    LossError,
    ModelError,
    OptionError,
    ParameterChangedError,
    PipelineError,
)


def compiled(name: str = "mlp", **options: Any) -> tuple[nn.Module, zograph.ZOStep]:
    model = build(name)
    options = {"lr": 1e-2, "backend": "eager", "loss_fn": loss_fn(name)} | options
    return model, zograph.compile(model, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_is_a_function_of_its_seed() -> None:
    runs = []
    for seed in (1, 1, 2):
        model, step = compiled(seed=seed)
        losses = [float(step(**batch("mlp", 4, 0, seed=i))) for i in range(4)]
        runs.append((losses, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_the_update_is_pending_until_the_next_visit() -> None:
    model, step = compiled()
    before = weights(model)
    step(**batch("mlp", 4, 0))
    assert same(before, weights(model))
    step.synchronize()
    after = weights(model)
    assert not any(torch.equal(before[n], after[n]) for n in before)
    step.synchronize()
    assert same(after, weights(model))
    assert same(step.state_dict(), after)


def test_synchronizing_between_steps_changes_no_bit() -> None:
    results = []
    for often in (False, True):
        model, step = compiled("opt")
        for i in range(4):
            step(**batch("opt", 2, 9, seed=i))
            if often:
                step.synchronize()
        step.synchronize()
        results.append(weights(model))
    assert same(*results)


def test_last_and_lr() -> None:
    _, step = compiled(eps=1e-3)
    assert step.last is None
    loss = step(**batch("mlp", 4, 0))
    r = step.last
    assert r is not None
    assert (r.step, r.skipped, r.lr) == (0, False, 1e-2)
    assert r.projected_grad == (r.loss_plus - r.loss_minus) / 2e-3
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    assert float(loss) == pytest.approx((r.loss_plus + r.loss_minus) / 2)
    step.lr = 0.5
    step(**batch("mlp", 4, 0))
    assert step.last is not None
    assert (step.last.step, step.last.lr) == (1, 0.5)
    assert step.last.seed != r.seed
    with pytest.raises(OptionError, match="lr is nan"):
        step.lr = float("nan")


def test_directions_average_seeded_estimates() -> None:
    model, step = compiled(directions=3, lr=0.1, weight_decay=0.5)
    reference = Reference(copy.deepcopy(model), xy_loss)
    data = batch("mlp", 4, 0)
    step(**data)
    r = step.last
    assert r is not None
    assert len({d.seed for d in r.directions}) == 3
    assert r.projected_grad == pytest.approx(sum(d.projected_grad for d in r.directions) / 3)
    for d in r.directions:
        assert (d.loss_plus, d.loss_minus) == pytest.approx(reference.losses(data, d.seed))
    for i, d in enumerate(r.directions):
        reference.update(d.seed, -0.1 * d.projected_grad / 3, 1 - 0.1 * 0.5 if i == 0 else 1.0)
    step.synchronize()
    assert same(weights(model), weights(reference.model))


@pytest.mark.parametrize("name", ["mlp", "opt"])
def test_micro_batches_take_the_mean_loss(name: str) -> None:
    parts = [batch(name, 2, 9, seed=0), batch(name, 2, 9, seed=1), batch(name, 1, 7, seed=2)]
    model, step = compiled(name)
    reference = Reference(copy.deepcopy(model), loss_fn(name))
    loss = step(batches=parts)
    r = step.last
    assert r is not None
    pairs = [reference.losses(p, r.seed) for p in parts]
    assert r.loss_plus == pytest.approx(sum(p for p, _ in pairs) / 3, rel=1e-6)
    assert r.loss_minus == pytest.approx(sum(m for _, m in pairs) / 3, rel=1e-6)
    assert float(loss) == pytest.approx((r.loss_plus + r.loss_minus) / 2)
    with pytest.raises(BatchError, match="either one batch"):
        step(batches=[])


def test_weight_decay_spares_vectors_and_biases() -> None:
    model, step = compiled(lr=0.5, weight_decay=0.2)
    before = weights(model)
    step(**batch("mlp", 4, 0))
    step.synchronize()
    r = step.last
    assert r is not None
    c = torch.tensor(-0.5 * r.projected_grad, dtype=torch.float32)
    for n, p in model.named_parameters():
        scale = torch.tensor(1.0 if p.ndim == 1 else 1 - 0.5 * 0.2)
        assert torch.equal(p, before[n] * scale + c * zograph.noise(n, p.shape, r.seed)), n


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    def spiky(model: nn.Module, x: torch.Tensor, y: torch.Tensor, spike: torch.Tensor) -> Any:
        return xy_loss(model, x, y) + spike

    data = batch("mlp", 4, 0)
    model, step = compiled(loss_fn=spiky)
    step(**data, spike=torch.zeros(()))
    step.synchronize()
    before = weights(model)
    with pytest.raises(LossError, match="weights are as before"):
        step(**data, spike=torch.tensor(bad))
    step.synchronize()
    assert same(before, weights(model))
    step(**data, spike=torch.zeros(()))  # the run goes on
    model, step = compiled(loss_fn=spiky, on_nan="skip")
    before = weights(model)
    step(**data, spike=torch.tensor(bad))
    step.synchronize()
    assert same(before, weights(model))
    assert step.last is not None
    assert step.last.skipped


def test_evaluate_returns_the_models_own_output() -> None:
    model, step = compiled("opt")
    data = batch("opt", 3, 11)
    step(**data)
    out = step.evaluate(**data)
    with torch.no_grad():
        expected = model(**data, use_cache=False)
    assert type(out) is type(expected)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.logits, expected.logits)
    unlabelled = {k: v for k, v in data.items() if k != "labels"}
    out = step.evaluate(**unlabelled)
    assert out.loss is None
    assert torch.equal(out.logits, expected.logits)


def test_evaluate_with_a_loss_function() -> None:
    model, step = compiled("cnn")
    data = batch("cnn", 3, 0)
    found = step.evaluate(**data)
    assert torch.equal(found.loss, xy_loss(model, **data))
    assert torch.equal(found.output, model(data["x"]))
    with pytest.raises(BatchError, match="takes no 'z'"):
        step.evaluate(z=data["x"])
    bare = step.evaluate(input=data["x"])
    assert bare.loss is None
    assert torch.equal(bare.output, model(data["x"]))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_bfloat16_compute_over_a_float32_base(backend: str) -> None:
    model, step = compiled("llama", compute_dtype=torch.bfloat16, backend=backend)
    before = weights(model)
    data = batch("llama", 4, 16)
    step(**data)
    r = step.last
    assert r is not None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in twin.named_parameters():
            p.copy_((before[n] + 1e-3 * zograph.noise(n, p.shape, r.seed)).bfloat16())
        expected = twin.to(torch.bfloat16)(**data).loss
    assert r.loss_plus == pytest.approx(float(expected), rel=1e-2)
    step.synchronize()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert step.evaluate(**data).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["cnn", "mlp", "vit"])
def test_bfloat16_compute_takes_float32_inputs(name: str) -> None:
    _, wide = compiled(name)
    _, narrow = compiled(name, compute_dtype=torch.bfloat16)
    data = batch(name, 4, 0)
    assert float(narrow(**data)) == pytest.approx(float(wide(**data)), rel=2e-2)


def test_a_bfloat16_base_is_rounded_once_a_step() -> None:
    model = build("mlp").to(torch.bfloat16)
    step = zograph.compile(model, loss_fn=xy_loss, lr=1.0, backend="eager")
    reference = Reference(copy.deepcopy(model), xy_loss)
    data = {"x": torch.randn(4, 3, 16, 16).bfloat16(), "y": torch.tensor([0, 1, 2, 3])}
    for _ in range(3):
        step(**data)
        assert step.last is not None
        reference.update(step.last.seed, -step.last.projected_grad)
    step.synchronize()
    assert same(weights(model), weights(reference.model))
    assert step.last is not None
    assert step.last.loss_plus != float(torch.tensor(step.last.loss_plus).bfloat16())  # float32


def test_rademacher() -> None:
    model, step = compiled(distribution="rademacher")
    before = weights(model)
    step(**batch("mlp", 4, 0))
    step.synchronize()
    assert step.last is not None
    move = 1e-2 * abs(step.last.projected_grad)
    for n, p in model.named_parameters():
        torch.testing.assert_close(
            (p - before[n]).abs(), torch.full_like(p, move), rtol=1e-2, atol=1e-6
        )


def test_training_learns() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(0, 2, (64,))
    x[:, 0] += 3.0 * y
    model = nn.Linear(8, 2)
    loss = lambda m, x, y: nn.functional.cross_entropy(m(x), y)  # noqa: E731
    step = zograph.compile(model, loss_fn=loss, lr=0.05, backend="eager")
    first = float(loss(model, x, y))
    for _ in range(200):
        step(x=x, y=y)
    step.synchronize()
    assert float(loss(model, x, y)) < 0.5 * first


def test_frozen_parameters_and_buffers_do_not_move() -> None:
    model = build("cnn")
    for n, p in model.named_parameters():
        p.requires_grad_(n.startswith("8."))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    step = zograph.compile(model, loss_fn=xy_loss, lr=1e-2, backend="eager")
    before = weights(model)
    for i in range(2):
        step(**batch("cnn", 4, 0, seed=i))
    step.synchronize()
    after = weights(model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"8.weight", "8.bias"}
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_training_mode_is_left_alone_and_told_about() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    with pytest.warns(UserWarning, match="eval mode"):
        step = zograph.compile(model, loss_fn=loss, backend="eager")
    step(x=torch.ones(3, 4))
    assert model.training
    assert model[1].training


def test_user_changes_between_steps_are_seen() -> None:
    model, step = compiled("mlp", lr=0.0)
    data = batch("mlp", 4, 0)
    step(**data)
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.zero_()
    model[1].weight = nn.Parameter(torch.zeros_like(model[1].weight))
    step(**data)
    assert step.last is not None
    assert step.last.loss_plus == pytest.approx(1.386, abs=0.01)  # log 4
    model[1].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ParameterChangedError, match=r"'1.weight' was compiled as"):
        step(**data)
    model, step = compiled("mlp")
    step(**data)
    model[1].weight.requires_grad_(False)
    with pytest.raises(ParameterChangedError, match="Compile again"):
        step(**data)


def test_callers_tensors_stay_as_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2.0)
            return (x * self.w).sum()

    x = torch.ones(2, 3)
    step = zograph.compile(InPlace(), backend="eager")
    assert float(step(x=x)) == pytest.approx(12.0, rel=1e-2)
    assert torch.equal(x, torch.ones(2, 3))


def test_nested_inputs_masks_constants_and_tensor_constants() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(
            self, data: dict[str, Any], mask: torch.Tensor, power: int = 2, kind: str = "a"
        ) -> dict[str, torch.Tensor]:
            x = torch.where(mask, data["a"], data["b"][0]) ** power
            x = x + torch.tensor([1.0, 2.0, 3.0])
            return {"loss": (x * self.w).sum() * (1 if kind == "a" else -1), "x": x}

    data = {"a": torch.ones(2, 3), "b": [torch.full((2, 3), 2.0)]}
    mask = torch.tensor([[True, False, True], [False, True, True]])
    model = Nested()
    step = zograph.compile(model, lr=0.0, backend="eager")
    for extra in ({}, {"power": 3}, {"kind": "b"}):
        out = step.evaluate(data=data, mask=mask, **extra)
        expected = model(data, mask, **extra)
        assert torch.equal(out["x"], expected["x"])
        assert torch.equal(out["loss"], expected["loss"])
        assert float(step(data=data, mask=mask, **extra)) == pytest.approx(
            float(expected["loss"]), rel=1e-2
        )


def test_prepare_compiles_without_running(tmp_path: Path) -> None:
    model, step = compiled("opt")
    with pytest.raises(RuntimeError, match="nothing is compiled"):
        _ = step.graph
    before = weights(model)
    step.prepare(**batch("opt", 4, 16))
    assert step.last is None
    assert same(before, weights(model))
    assert "capture" in step.compile_seconds
    assert step.draw(tmp_path / "step.dot").read_text().startswith("digraph")


def test_save_pretrained(tmp_path: Path) -> None:
    model, step = compiled("bert")
    data = batch("bert", 4, 9)
    step(**data)
    step.save_pretrained(tmp_path / "out")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert same(weights(model), weights(again))
    step.save_pretrained(tmp_path / "out")  # over itself
    model, step = compiled("mlp")
    step.save_pretrained(tmp_path / "plain")
    assert [p.name for p in (tmp_path / "plain").iterdir()] == ["model.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        step.save_pretrained(tmp_path / "file" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out", "plain"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "adam"}, "method='adam' is unknown; use one of zo-sgd"),
        ({"distribution": "uniform"}, "use one of normal, rademacher"),
        ({"backend": "xla"}, "use one of inductor, eager"),
        ({"on_nan": "ignore"}, "use one of raise, skip"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"directions": 0}, "directions is 0"),
        ({"weight_decay": -1.0}, "must not be negative"),
        ({"compute_dtype": torch.int8}, "must be floating"),
        ({"device": "tpu"}, "'tpu' is unknown"),
        ({"passes": []}, "must be a Pipeline"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        compiled(**options)


def test_passes_in_a_wrong_order() -> None:
    passes = zograph.default_passes().replace("partition")
    with pytest.raises(PipelineError, match="hoist requires a partitioned graph"):
        compiled(passes=passes)
    with pytest.raises(PipelineError, match="no pass is called 'fold'"):
        zograph.default_passes().insert_after("fold")


def test_bad_models() -> None:
    frozen = MLP().requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"):
        zograph.compile(frozen, loss_fn=xy_loss)
    mixed = nn.Linear(2, 2)
    mixed.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ModelError, match=r"'phase' is trainable but torch.complex64"):
        zograph.compile(mixed, loss_fn=xy_loss)


def test_bad_batches() -> None:
    _, step = compiled("bert")
    data = batch("bert", 4, 9)
    with pytest.raises(
        BatchError, match=r"takes no 'atention_mask'. Did you mean 'attention_mask'"
    ):
        step(input_ids=data["input_ids"], atention_mask=data["attention_mask"])
    with pytest.raises(BatchError, match="holds 7, but the classes of the loss takes 0 to 1"):
        step(**data | {"labels": torch.full((4,), 7)})
    with pytest.raises(BatchError, match="holds 99, but an embedding takes 0 to 98"):
        step(**data | {"input_ids": torch.full((4, 9), 99)})
    with pytest.raises(BatchError, match=r"batch\['labels'\] is a list|is a ndarray|is a set"):
        step(**data | {"labels": {1, 2}})
    _, step = compiled("mlp")
    with pytest.raises(BatchError, match="the batch lacks 'y'"):
        step(x=torch.ones(2, 3, 16, 16))


def test_a_model_without_a_loss() -> None:
    _, step = compiled("bert")
    data = batch("bert", 4, 9)
    with pytest.raises(CaptureError, match=r"no loss .*labels="):
        step(input_ids=data["input_ids"])
    model = nn.Linear(3, 2)
    step = zograph.compile(model, backend="eager")
    with pytest.raises(CaptureError, match="returned no loss"):
        step(input=torch.ones(2, 3))
    step = zograph.compile(model, loss_fn=lambda m, x: m(x), backend="eager")
    with pytest.raises(CaptureError, match="0-dimensional"):
        step(x=torch.ones(2, 3))


def test_no_graph_names_model_line_and_way_out(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Branchy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            if y.sum() > 0:  # the line to be named
                return y.sum()
            return y.mean()

    step = zograph.compile(Branchy(3, 2), backend="eager")
    with pytest.raises(CaptureError, match="Branchy could not be captured") as caught:
        step(x=torch.ones(2, 3))
    assert "the line to be named" in str(caught.value)
    assert "torch.where" in str(caught.value)
    assert type(caught.value.__cause__).__name__ == "GuardOnDataDependentSymNode"
    assert "def forward" not in capfd.readouterr().err
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [torch.float32, torch.float64])
def test_a_forward_may_cast_a_module(base: torch.dtype, cast: torch.dtype) -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.gate.register_buffer("scale", torch.tensor([1.0, 0.5]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.gate = self.gate.to(cast)
            return (self.gate(x.to(cast)) * self.gate.scale).square().mean()

    model, x = Router().to(base), torch.randn(3, 4, dtype=base)
    step = zograph.compile(model, backend="eager", device="cpu")
    step(x=x)
    step.synchronize()
    assert {t.dtype for t in model.state_dict().values()} == {base}
    assert torch.equal(step.evaluate(x=x), copy.deepcopy(model)(x))


def test_random_draws_in_eval_mode_are_refused() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (super().forward(x) * torch.rand(2)).sum()

    step = zograph.compile(Noisy(3, 2), backend="eager")
    with pytest.raises(zograph.errors.PassError, match="draws random numbers"):
        step(x=torch.ones(2, 3))


def test_without_a_compiler_the_backend_becomes_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found"):
        step = zograph.compile(CNN(), loss_fn=xy_loss, device="cpu")
    assert step.options.backend == "eager"
