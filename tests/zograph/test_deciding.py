"""Forwards that branch on values of the batch: the answers, and the graphs that they choose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import zograph
from tests.reference import Reference
from zograph.deciding import split_decisions
from zograph.errors import CaptureError
from zograph.ir import KEY, GraphInfo, Kind, NodeMeta

EPS = 1e-3
Forward = Callable[[Tensor, Tensor, nn.Module], Tensor]


class Deciding(nn.Module):
    """Embeds ids; what follows is a function of the embedded, a mask and the model."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.most: Tensor
        self.register_buffer("most", torch.tensor(3), persistent=False)
        self.follow = forward

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.follow(self.emb(ids), mask, self)


def take(model: nn.Module, **batch: Tensor) -> Tensor:
    loss: Tensor = model(**batch)
    return loss


def compiled(forward: Forward, **options: Any) -> zograph.ZOStep:
    torch.manual_seed(0)
    options = {"lr": 1e-2, "eps": EPS, "backend": "eager", "device": "cpu"} | options
    return zograph.compile(Deciding(forward), loss_fn=take, **options)


def batch(*rows: list[int]) -> dict[str, Tensor]:
    ids = torch.arange(len(rows) * len(rows[0])).remainder(9).view(len(rows), -1)
    return {"ids": ids, "mask": torch.tensor(rows)}


ONES = batch([1, 1, 1, 1], [1, 1, 1, 1])
SHORT = batch([1, 1, 1, 1], [1, 1, 0, 0])
MOVED = batch([1, 1, 1, 1], [0, 1, 1, 0])
FEWER = batch([1, 1, 1, 1], [1, 0, 0, 0])


def check(step: zograph.ZOStep, data: dict[str, Tensor], rel: float = 0.0) -> int:
    """Take a step, compare it with the eager loop, and return how many graphs there are."""
    step.synchronize()
    probe = Reference(copy.deepcopy(step.model), take, eps=EPS)
    step(**data)
    last = step.last
    assert last is not None
    plus, minus = probe.losses(data, last.seed)
    assert (last.loss_plus, last.loss_minus) == pytest.approx((plus, minus), rel=rel, abs=0)
    return len([c for known in step._graphs._known.values() for c in known
                if not isinstance(c, CaptureError)])  # fmt: skip


def branch(x: Tensor, mask: Tensor, m: Any) -> Tensor:
    x = m.a(x) if mask.eq(0).any() else m.b(x)
    return x[mask.bool()].square().mean()


@pytest.mark.parametrize("memory", [None, "minimum"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_graph_serves_the_batches_that_decide_alike(memory: Any, backend: str) -> None:
    step = compiled(branch, memory=memory, backend=backend)
    rel = 0.0 if backend == "eager" else 1e-5
    assert check(step, ONES, rel) == 1
    assert step._graphs.last is not None
    assert step._graphs.last.capture.signature.level == "values"
    assert check(step, SHORT, rel) == 2
    assert check(step, MOVED, rel) == 2  # another mask, the same answers
    assert check(step, FEWER, rel) == 3  # the same branch, another count
    assert check(step, ONES, rel) == 3


def rows_of(x: Tensor, mask: Tensor, m: Any) -> Tensor:
    return torch.stack([x[i, : int(row.sum())].mean() for i, row in enumerate(mask)]).sum()


def written(x: Tensor, mask: Tensor, m: Any) -> Tensor:
    seen = mask.clone()
    seen[:, 0] = 0
    seen[seen.bool()] = 2
    seen += 1
    return x.mean() * (3 if seen.eq(1).sum() > 2 else 4)


WAYS: dict[str, Forward] = {
    "bool": lambda x, mask, m: x.mean() if mask.all() else x.sum(),
    "item": lambda x, mask, m: x.mean() * mask.sum().item(),
    "int of a maximum": lambda x, mask, m: x[:, : int(mask.sum(1).min())].mean(),
    "tolist": lambda x, mask, m: sum(p.mean() for p in x.view(8, 4).split(
        [mask.sum().item(), 8 - mask.sum().item()] if not mask.all() else [3, 5])),
    "a loop over rows": rows_of,
    "in": lambda x, mask, m: x.mean() if 0 in mask else x.sum(),
    "equal": lambda x, mask, m: x.mean() if torch.equal(mask[0], mask[1]) else x.sum(),
    "nonzero": lambda x, mask, m: x.view(8, 4)[mask.view(-1).nonzero().squeeze(1)].mean(),
    "nonzero as tuple": lambda x, mask, m: x[torch.nonzero(mask, as_tuple=True)].mean(),
    "where": lambda x, mask, m: x[torch.where(mask > 0)].mean(),
    "argwhere": lambda x, mask, m: x.mean() * len(torch.argwhere(mask)),
    "a mask": lambda x, mask, m: x[mask.bool()].mean(),
    "a mask in a tuple": lambda x, mask, m: x[:, mask[1].bool(), 1:].mean(),
    "masked_select": lambda x, mask, m: x.masked_select(mask.bool()[..., None]).mean(),
    "repeat_interleave": lambda x, mask, m: x.repeat_interleave(mask.sum(1), dim=0).mean(),
    "repeat_interleave of counts": lambda x, mask, m: x.view(8, 4)[
        torch.repeat_interleave(mask.sum(1))].mean(),
    "unique": lambda x, mask, m: x.mean() * len(torch.unique(mask)),
    "unique_consecutive": lambda x, mask, m: x.mean() * len(mask.view(-1).unique_consecutive()),
    "a tensor of tensors": lambda x, mask, m: x[
        0, torch.tensor([row.sum() - 1 for row in mask])].mean(),
    "sizes that are tensors": lambda x, mask, m: x.view(-1)[
        torch.arange(mask.sum()).view(1, mask.sum())].mean(),
    "of the form of what weights made": lambda x, mask, m: (
        x.mean() * torch.ones_like(x).sum().item()),
    "a list of tensors as an index": lambda x, mask, m: x[
        0, [row.sum() - 1 for row in mask]].mean(),
    "sizes by keyword": lambda x, mask, m: nn.functional.interpolate(
        x, size=mask.sum(), mode="linear").mean(),
    "bounds of slices": lambda x, mask, m: x.view(8, 4)[: mask.sum()].mean(),
    "splits by tensors": lambda x, mask, m: x.split(m.most, dim=1)[0].mean(),
    "pads by tensors": lambda x, mask, m: nn.functional.pad(x, (0, mask.sum())).mean(),
    "buffers": lambda x, mask, m: x[:, : m.most - mask[1, -1]].mean(),
    "numpy": lambda x, mask, m: x.mean() * float(mask.numpy().sum()),
    "writes": written,
}  # fmt: skip


@pytest.mark.parametrize("memory", [None, "minimum"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask(way: str, memory: Any) -> None:
    """Without a budget, sizes that depend on values may stay open in a graph for all batches."""
    step = compiled(WAYS[way], memory=memory)
    for data in (SHORT, ONES, MOVED, FEWER):
        check(step, data)


@pytest.mark.parametrize("memory", [None, "minimum"])
def test_a_buffer_that_changes_is_decided_by_anew(memory: Any) -> None:
    step = compiled(lambda x, mask, m: x.mean() if m.most > 2 else x.sum(), memory=memory)
    assert check(step, ONES) == 1
    step.model.most.fill_(1)  # type: ignore[operator, union-attr]
    assert check(step, ONES) == 2
    step.model.most.fill_(3)  # type: ignore[operator, union-attr]
    assert check(step, ONES) == 2


def test_a_size_that_weights_decide_has_no_budget() -> None:
    def forward(x: Tensor, mask: Tensor, m: Any) -> Tensor:
        return torch.cat([x[x > 0], x.view(-1)]).mean()

    check(compiled(forward), ONES)
    with pytest.raises(CaptureError, match="no budget can be planned"):
        compiled(forward, memory="minimum")(**ONES)


def test_a_branch_on_weights_has_no_graph() -> None:
    with pytest.raises(CaptureError, match=r"x.mean\(\) if x.sum\(\) > 0"):
        compiled(lambda x, mask, m: x.mean() if x.sum() > 0 else x.sum())(**ONES)


@pytest.mark.parametrize(
    "write",
    [
        lambda seen, x: seen.__setitem__(0, x[0, :, 0]),
        lambda seen, x: seen[0].copy_(x[0, :, 0]),
        lambda seen, x: seen.__iadd__(x[..., 0]),
        lambda seen, x: torch.mul(x[..., 0], 2, out=seen),
    ],
    ids=["set", "through a view", "add", "out"],
)
def test_what_weights_were_written_into_is_forgotten(write: Any) -> None:
    def forward(x: Tensor, mask: Tensor, m: Any) -> Tensor:
        seen = mask.float()
        write(seen, x)
        return x.mean() if seen[0].any() else x.sum()

    with pytest.raises(CaptureError, match="could not be captured"):
        compiled(forward)(**ONES)


def test_random_numbers_do_not_follow_from_the_batch() -> None:
    with pytest.raises(CaptureError, match="could not be captured"):
        compiled(lambda x, m, _: x.mean() if torch.rand_like(m.float())[0, 0] > 0 else x.sum())(
            **ONES
        )


def test_what_is_normalized_follows_from_the_batch() -> None:
    def forward(x: Tensor, mask: Tensor, m: Any) -> Tensor:
        shares = nn.functional.normalize(mask.float(), p=1.0, dim=-1)
        return x.mean() if shares.max() > 0.3 else x.sum()

    step = compiled(forward)
    for data in (SHORT, ONES):
        check(step, data)


def test_a_decision_without_a_graph_leaves_the_others_theirs() -> None:
    def forward(x: Tensor, mask: Tensor, m: Any) -> Tensor:
        return x.mean() if mask.all() or x.sum() > 0 else x.sum()

    step = compiled(forward)
    for _ in range(2):
        with pytest.raises(CaptureError):
            step(**SHORT)
        check(step, ONES)


def test_a_step_on_batches_that_decide_differently() -> None:
    step = compiled(branch)
    probe = Reference(copy.deepcopy(step.model), take, eps=EPS)
    step(batches=[ONES, SHORT, MOVED])
    last = step.last
    assert last is not None
    losses = [probe.losses(data, last.seed) for data in (ONES, SHORT, MOVED)]
    assert last.loss_plus == pytest.approx(sum(p for p, _ in losses) / 3, rel=1e-6)


def test_answers_are_found_on_the_cpu() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta[KEY] = NodeMeta(Kind.INPUT, "['x']")
    options = {"dtype": torch.int64, "device": torch.device("cuda")}
    more = graph.call_function(torch.ops.aten.arange.default, (3,), options)
    total = graph.call_function(torch.ops.aten.add.Tensor, (x, more))
    for node in (more, total, graph.output((x, total))):
        node.meta[KEY] = NodeMeta()
    gm = torch.fx.GraphModule(nn.Module(), graph)
    gm.meta[KEY] = GraphInfo(params={}, has_loss=False)
    decisions = split_decisions(gm, [torch.tensor([1, 2, 3])], {})
    assert decisions is not None
    assert gm.graph.output_node().args == ((x,),)
    assert decisions.hold({"['x']": torch.ones(3, dtype=torch.int64)})
    assert not decisions.hold({"['x']": torch.zeros(3, dtype=torch.int64)})
    assert not decisions.hold({"['x']": torch.zeros(4, dtype=torch.int64)})  # not computable


def images(model: nn.Module, *grids: tuple[int, int, int]) -> dict[str, Tensor]:
    """Make a batch with one image of patches a row, in places of its text."""
    config: Any = model.config
    sizes = torch.tensor(grids)
    ids = torch.arange(len(grids) * 20).remainder(90).add(3).view(len(grids), 20)
    for row, count in zip(ids, (sizes.prod(1) // 4).tolist(), strict=True):
        row[2 : 2 + count] = config.image_token_id
    patch = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    pixels = torch.randn(
        int(sizes.prod(1).sum()), patch, generator=torch.Generator().manual_seed(0)
    )
    kinds = (ids == config.image_token_id).long()
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels,
            "image_grid_thw": sizes, "mm_token_type_ids": kinds}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, "minimum"])
def test_text_with_images(memory: Any) -> None:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
              "intermediate_size": 64, "fullatt_block_indexes": [1], "window_size": 16}  # fmt: skip
    text = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "intermediate_size": 64,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                "rope_theta": 1e4}}  # fmt: skip
    tokens = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens)
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    step = zograph.compile(model, lr=1e-3, eps=EPS, backend="eager", device="cpu", memory=memory)
    graphs = set()
    for grids in ([(1, 4, 4), (1, 4, 8)], [(1, 8, 4), (1, 4, 4)], [(1, 4, 4), (1, 4, 8)]):
        data = images(model, *grids)
        step.synchronize()
        probe = Reference(copy.deepcopy(model), None, eps=EPS)
        step(**data)
        last = step.last
        assert last is not None
        assert (last.loss_plus, last.loss_minus) == probe.losses(data, last.seed)
        graphs.add(step.graph)
    assert len(graphs) == 2
