"""`fixed_point` in models that zograph compiles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zograph
from tests.passes.graphs import ready_for
from tests.reference import Reference
from zograph import printer
from zograph.errors import CaptureError, CellError, LossError, PassError
from zograph.fixed_points.nodes import is_solve
from zograph.ir import Kind, meta, placeholders, symbols
from zograph.meter import measure
from zograph.passes import Normalize, PassContext
from zograph.testing import capture_function

Batch = dict[str, Tensor]


class Cell(nn.Module):
    """A block that replaces x by the fixed point of tanh(W z + x)."""

    def __init__(self, width: int = 8, **options: Any) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        given: dict[str, Any] = {"tol": 1e-5, "max_iter": 99, "solver": "anderson"}
        self.options = given | options
        with torch.no_grad():
            self.mix.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        z, _ = zograph.fixed_point(
            lambda z: torch.tanh(self.mix(z) + x), torch.zeros_like(x), **self.options
        )
        return z


class Model(nn.Module):
    """Some blocks between two linear layers, and a loss."""

    def __init__(self, blocks: int = 1, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Cell(**options) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for cell in self.blocks:
            x = cell(x)
        return self.head(x)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def batch(rows: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator)
    return {"x": x, "y": torch.randint(0, 3, (rows,), generator=generator)}


def compiled(model: nn.Module, **options: Any) -> zograph.ZOStep:
    given: dict[str, Any] = {"loss_fn": loss, "lr": 0.02, "eps": 1e-2, "backend": "eager"}
    return zograph.compile(model, **given | options)


def run(model: nn.Module, steps: int = 4, **options: Any) -> tuple[list[Any], list[Tensor]]:
    """The losses of some steps on batches of two sizes, and the weights behind them."""
    step = compiled(model, **options)
    records = []
    for i in range(steps):
        step(**batch(6 + i % 2, seed=i))
        assert step.last is not None
        records.append((step.last.loss_plus, step.last.loss_minus))
    step.synchronize()
    return records, [p.detach().clone() for p in model.parameters()]


class Everything(nn.Module):
    """Its cell closes over all that a cell can, and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.ones(4, 4))
        self.unused = nn.Parameter(torch.ones(4))
        self.register_buffer("scale", torch.full((4,), 0.5))
        self.shift = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        inner = x.cos()

        def cell(z: Tensor) -> Tensor:
            new = z @ self.w + inner * x.shape[0]
            new.add_(self.shift).mul_(self.scale)
            return torch.nn.functional.relu(new + torch.ones(4), inplace=True)

        z, info = zograph.fixed_point(cell, torch.zeros_like(x), tol=1e-6)
        return z.sum() + 0 * self.unused.sum() + 0 * info.iterations.sum()


def test_what_a_cell_closes_over_becomes_operands() -> None:
    model, x = Everything(), torch.randn(5, 4)
    gm = capture_function(model, x=x)
    (node,) = (n for n in gm.graph.nodes if is_solve(n))
    kinds = [(meta(n).kind, meta(n).name) for n in node.args[2]]
    assert kinds[0] == (Kind.PARAMETER, "w")
    assert (Kind.BUFFER, "scale") in kinds
    assert any(kind is Kind.CONSTANT for kind, _ in kinds)
    assert any(kind is Kind.OP for kind, _ in kinds)
    assert len(kinds) == 4
    (cell,) = printer.cells(gm)
    assert not any(n.target._schema.is_mutable for n in cell.graph.nodes if n.op == "call_function")
    values = {"w": model.w, "unused": model.unused, "scale": model.scale, "['x']": x}
    given = [values.get(str(meta(n).name), model.shift) for n in placeholders(gm)]
    with torch.no_grad():
        assert torch.equal(gm(*given)[0], model(x))


def test_tuples_and_info_as_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(0.1 * torch.ones(4, 4))

        def forward(self, x: Tensor) -> Any:
            (a, b), info = zograph.fixed_point(
                lambda a, b: (torch.tanh(b @ self.w + x), 0.5 * a[:, :2].repeat(1, 2)),
                (torch.zeros_like(x), torch.ones_like(x)),
                solver="anderson",
            )
            return a.sum() + b.sum(), info

    step = zograph.compile(Pair(), lr=0.1, backend="eager")
    x = torch.randn(5, 4)
    step(x=x)
    total, info = step.evaluate(x=x)
    step.synchronize()
    with torch.no_grad():
        expected, eager = step.model(x)
    assert isinstance(info, zograph.FixedPointInfo)
    torch.testing.assert_close(total, expected)
    assert torch.equal(info.iterations, eager.iterations)
    assert torch.equal(info.converged, eager.converged)


@pytest.mark.parametrize("solver", ["anderson", "picard"])
def test_losses_are_those_of_an_eager_forward(solver: str) -> None:
    """Numerics contract 1, (a) and (c)."""
    model = Model(2, solver=solver)
    step = compiled(model)
    for i in range(6):
        step.synchronize()
        reference = Reference(copy.deepcopy(model), loss, eps=1e-2)
        data = batch(6 + i % 2, seed=i)
        step(**data)
        record = step.last
        assert record is not None
        plus, minus = reference.losses(data, record.seed)
        assert record.loss_plus == pytest.approx(plus, rel=1e-5)
        assert record.loss_minus == pytest.approx(minus, rel=1e-5)
        assert abs(record.projected_grad - (plus - minus) / 2e-2) <= 1e-5 * abs(plus) / 1e-2


def test_bits_do_not_depend_on_budget_or_storage(tmp_path: Path) -> None:
    """Numerics contract 2."""
    expected = run(Model(), steps=3)
    for options in (
        {"memory": "minimum"},
        {"memory": "minimum", "storage": tmp_path / "work", "fold_every": 3},
    ):
        records, weights = run(Model(), steps=3, **options)
        assert records == expected[0], options
        assert all(map(torch.equal, weights, expected[1])), options


def test_bits_are_kept_across_a_resume(tmp_path: Path) -> None:
    records, weights = run(Model(), steps=5)
    first = compiled(Model(), log=tmp_path / "log")
    for i in range(2):
        first(**batch(6 + i % 2, seed=i))
    first.close()
    model = Model()
    step = zograph.resume(model, tmp_path / "log", loss_fn=loss)
    for i in range(2, 5):
        step(**batch(6 + i % 2, seed=i))
        assert step.last is not None
        assert (step.last.loss_plus, step.last.loss_minus) == records[i]
    step.synchronize()
    assert all(map(torch.equal, model.parameters(), weights))


def test_equal_blocks_share_a_solve() -> None:
    step = compiled(Model(3))
    step(**batch())
    text = printer.text(step.graph)
    assert text.count("cell: ") == 1
    assert text.count("= anderson_solve(") == 2  # both branches of one body
    assert len([n for n in step.graph.graph.nodes if meta(n).kind is Kind.STAGE]) == 8


def test_a_frozen_solve_is_shared_by_the_branches() -> None:
    model = Model()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head"))
    step = compiled(model)
    step(**batch())
    assert printer.text(step.graph).count("= anderson_solve(") == 1


def test_the_model_learns() -> None:
    model = Model()
    step = compiled(model, lr=0.1)
    losses = [float(step(**batch(16))) for _ in range(20)]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.slow
def test_compiled_cells_agree_with_eager_ones() -> None:
    (records, _), (expected, _) = run(Model(), backend="inductor"), run(Model())
    for found, wanted in zip(records, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_narrow_compute_dtype() -> None:
    options = {"tol": 2e-2, "eps": 3e-2}
    step = compiled(Model(tol=options["tol"]), compute_dtype=torch.bfloat16, eps=options["eps"])
    assert float(step(**batch())) == pytest.approx(loss(Model(), **batch()).item(), rel=0.05)


def test_nan_shows_in_the_loss() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            z, _ = zograph.fixed_point(lambda z: (self.w * x).log() + 0 * z, torch.zeros_like(x))
            return z.mean()

    step = zograph.compile(Broken(), lr=0.1, backend="eager")
    step(x=torch.ones(3, 4))
    with pytest.raises(LossError):
        step(x=-torch.ones(3, 4))


def test_max_iter_warns_with_counts() -> None:
    step = compiled(Model(tol=1e-7, max_iter=3))
    with pytest.warns(UserWarning, match=r"6 of 6 samples did not reach tol=1e-07 in max_iter=3"):
        step(**batch())


def test_a_loose_tolerance_warns() -> None:
    step = compiled(Model(tol=1e-2), eps=1e-3)
    with pytest.warns(UserWarning, match="looser than eps=0.001"):
        step(**batch())


def _filled(z: Tensor) -> Tensor:
    z[0] = 1.0
    return z


def test_bad_cells_are_refused() -> None:
    def with_cell(cell: Any) -> Any:
        def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
            z, _ = zograph.fixed_point(lambda z: cell(model, z), torch.zeros(3, 4))
            return z.sum() + model(x).sum()

        return loss_fn

    x = torch.ones(3, 4)
    cells = {
        "turned state 0 from": (lambda m, z: m(z).double(), CellError),
        "writes in place to its state: f": (lambda m, z: m(z.mul_(0.5)), CellError),
        "writes in place": (lambda m, z: m(z) + m.weight.mul_(0.5)[:3], CaptureError),
        "writes in place ": (lambda m, z: _filled(m(z)), CaptureError),
        "solves a fixed point itself": (
            lambda m, z: zograph.fixed_point(lambda y: 0.1 * m(y) + z, z)[0],
            CaptureError,
        ),
        "draws random numbers": (lambda m, z: m(z) * torch.rand_like(z), PassError),
    }
    for message, (cell, error) in cells.items():
        step = zograph.compile(nn.Linear(4, 4), loss_fn=with_cell(cell), lr=0.1, backend="eager")
        with pytest.raises(error, match=message):
            step(x=x)


def test_other_traces_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"Only zograph\.compile can capture it"):
        torch.export.export(Cell(), (torch.ones(2, 8),), strict=False)


def test_the_plan_counts_the_window() -> None:
    """The memory of a solve grows by two states for each state of the window."""
    peaks = []
    for window in (4, 9):
        model = Model(window=window)
        gm = capture_function(model, loss, **batch(64))
        gm = ready_for("gather", Normalize().apply(gm, PassContext()).gm)
        (body,) = (b for b in printer.bodies(gm) if any(map(is_solve, b.graph.nodes)))
        rows = {s: 64 for n in placeholders(gm) for s in symbols(n.meta["val"])}
        peaks.append(measure(body, rows).peak_bytes)
    assert peaks[1] - peaks[0] == 5 * 2 * 64 * 8 * 4
