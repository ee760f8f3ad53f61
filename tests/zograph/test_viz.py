from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx

import zograph
from tests.zoo import batch, build, loss_fn
from zograph import viz
from zograph.errors import OptionError
from zograph.ir import info
from zograph.passes import PassContext
from zograph.passes.lower import CompiledBody
from zograph.pipeline import default_passes
from zograph.testing import GraphBuilder, capture_function
from zograph.viz.fold import common_path, compact, cycles, folded
from zograph.viz.look import FILL, LINE, MOVE, SLOT, amount
from zograph.viz.reader import read
from zograph.viz.scene import Stage

aten = torch.ops.aten
needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="the program dot (graphviz) is not installed"
)


def run_passes(name: str, last: str = "outline") -> fx.GraphModule:
    gm = capture_function(build(name), loss_fn(name), **batch(name, 4, 16))
    for pass_ in default_passes() if last != "capture" else ():
        gm = pass_.apply(gm, PassContext(backend="eager")).gm
        info(gm).facts |= pass_.contract.provides
        if pass_.name == last:
            break
    return gm


graph = cache(run_passes)


@cache
def scheduled(memory: int | str | None, storage: str = "host") -> fx.GraphModule:
    step = zograph.compile(
        build("opt"), memory=memory, storage=storage, backend="eager", device="cpu"
    )
    step.prepare(**batch("opt", 4, 16))
    return step.graph


def titles(source: str) -> list[str]:
    return re.findall(r"stages? \d[\d, .-]*: [^\"\\]*", source)


def test_equal_graphs_give_equal_text() -> None:
    assert viz.dot_source(run_passes("opt")) == viz.dot_source(graph("opt"))
    assert viz.dot_source(graph("opt")) == viz.dot_source(graph("opt"))


def test_equal_stages_are_folded() -> None:
    whole = titles(viz.dot_source(graph("opt"), fold=False))
    assert [t.split(" (")[0] for t in whole] == [
        "stage 0: inputs",
        "stage 1: stem",
        "stage 2: model.decoder.layers.0",
        "stage 3: model.decoder.layers.1",
        "stage 4: head",
    ]
    less = titles(viz.dot_source(graph("opt")))
    assert less[:2] + less[-1:] == whole[:2] + whole[-1:]
    assert less[2] == "stages 2-3: 2 x model.decoder.layers.N (8.5 k parameters, 34.2 kB each)"
    assert "keys.2-3 [16, 2]" in viz.dot_source(graph("opt"))


@pytest.mark.slow
def test_encoder_and_decoder_are_folded_apart() -> None:
    found = [t.split(" (")[0] for t in titles(viz.dot_source(graph("bart")))]
    assert "stages 2-3: 2 x model.encoder.layers.N" in found
    assert "stages 4-5: 2 x model.decoder.layers.N" in found


def test_flat_graphs_fold_like_outlined_ones() -> None:
    flat, outlined = graph("opt", "materialize"), graph("opt")
    for fold in (True, False):
        ours, theirs = viz.dot_source(flat, fold=fold), viz.dot_source(outlined, fold=fold)
        assert titles(ours) == titles(theirs)
        assert ours.count("<table") == theirs.count("<table")


def test_compiled_bodies_look_like_their_graphs() -> None:
    gm = run_passes("opt")
    before = viz.dot_source(gm)
    for name, body in list(gm.named_children()):
        assert isinstance(body, fx.GraphModule)
        gm.set_submodule(name, CompiledBody(body, None))
    assert viz.dot_source(gm) == before


@pytest.mark.parametrize(
    "last", ["capture", "normalize", "partition", "hoist", "dual_perturbation", "materialize"]
)
def test_every_point_of_the_pipeline_can_be_drawn(last: str) -> None:
    source = viz.dot_source(graph("cnn", last))
    assert ("loss \N{MINUS SIGN}" in source) == (last in ("dual_perturbation", "materialize"))


def test_both_branches_and_shared_nodes_have_colours() -> None:
    source = viz.dot_source(graph("opt"))
    for key in ("+", "-", "hoisted"):
        boxes = rf'\[label="[^"]*" color="{LINE[key]}" fillcolor="{FILL[key]}"'
        assert re.search(boxes, source), key
    assert len(set(LINE.values())) == len(LINE)


@pytest.mark.parametrize("name", ["opt", "cnn", pytest.param("t5", marks=pytest.mark.slow)])
def test_all_parameters_are_drawn(name: str) -> None:
    gm = graph(name)
    scene = compact(read(gm))
    drawn = [p.name for i in scene.items.values() for p in i.params]
    assert set(drawn) == set(info(gm).params)
    assert len(drawn) - len(set(drawn)) == (name in ("opt", "t5"))  # the tied weight, twice
    source = viz.dot_source(gm, fold=False)
    assert source.count("(tied: stage 1)") == (name in ("opt", "t5"))
    for module in {n.rpartition(".")[0] for n in drawn}:
        assert re.search(rf"<b>{re.escape(module)}</b>", source) or any(
            f"<b>{module.removeprefix(s.path + '.')}</b>" in source for s in scene.stages.values()
        )


def test_arrows_end_at_boxes_of_the_scene() -> None:
    for name in ("opt", "cnn"):
        scene = compact(folded(read(graph(name))))
        ends = {e.source for e in scene.edges} | {e.target for e in scene.edges}
        assert ends <= scene.items.keys()


def test_values_enter_a_stage_once_with_their_shape() -> None:
    scene = compact(read(graph("opt")))
    entries = [i for i in scene.items.values() if i.kind == "entry" and i.stage == 3]
    assert sorted((i.branch or "", i.lines[0]) for i in entries) == [
        ("", "b8[s0, 1, s1, s1]"),
        ("+", "f32[s0, s1, 32]"),
        ("-", "f32[s0, s1, 32]"),
    ]


def test_copies_of_a_weight_enter_the_next_stage_with_their_shape() -> None:
    scene = compact(folded(read(graph("llama"))))
    entries = [i for i in scene.items.values() if i.kind == "entry" and i.branch]
    assert {i.lines[0] for i in entries} == {"f32[s0, s1, 32]"}


def test_frozen_and_unused_parameters() -> None:
    b = GraphBuilder()
    x = b.input("x", (2, 3))
    w = b.param("frozen.weight", (4, 3), trainable=False)
    b.param("idle.weight", (4, 3))
    source = viz.dot_source(b.build(b.call(aten.linear.default, x, w)))
    assert "no stage uses" in source
    assert "weight  4x3  48 B  frozen" in source


def test_broken_graphs_and_odd_names_can_be_drawn() -> None:
    b = GraphBuilder()
    x = b.input("<x & y>", (2, 3))
    gm = b.build(b.call(aten.relu.default, x))
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    assert "<x & y>" in viz.dot_source(gm)


def test_words() -> None:
    assert common_path(["a.0", "a.1", "a.2"]) == "a.N"
    assert common_path(["a.0.b", "a.0.c"]) == "a.0.b .. a.0.c"
    assert [amount(n) for n in (0, 999, 1000, 7_087_872, 2.5e15)] == [
        "0 ",
        "999 ",
        "1.0 k",
        "7.1 M",
        "2500 T",
    ]


@needs_dot
@pytest.mark.parametrize(
    ("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")]
)
def test_pictures_are_rendered(
    tmp_path: Path, suffix: str, start: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = viz.draw(graph("opt"), tmp_path / f"step{suffix}", fold=False)
    assert path == tmp_path / f"step{suffix}"
    assert path.read_bytes().startswith(start)
    assert capfd.readouterr().err == ""


@needs_dot
def test_pictures_are_no_ribbons(tmp_path: Path) -> None:
    text = viz.draw(graph("opt"), tmp_path / "step.svg").read_text(encoding="utf-8")
    size = re.search(r'width="(\d+)pt" height="(\d+)pt"', text)
    assert size is not None
    assert max(int(size[1]), int(size[2])) < 3000
    assert "self_attn.q_proj" in text


def test_dot_files_need_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    path = viz.draw(graph("cnn"), str(tmp_path / "step.dot"))
    assert path.read_text(encoding="utf-8") == viz.dot_source(graph("cnn"))


def test_without_dot_the_source_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="apt-get install graphviz"):
        path = viz.draw(graph("cnn"), tmp_path / "step.svg")
    assert path == tmp_path / "step.dot"
    assert path.read_text(encoding="utf-8").startswith("digraph")
    assert not (tmp_path / "step.svg").exists()


@pytest.mark.parametrize("name", ["step.gif", "step", "step.SVG"])
def test_unknown_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"\.svg, \.png, \.pdf, \.dot"):
        viz.draw(graph("cnn"), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_transfers_stand_in_one_strip_a_stage() -> None:
    scene = read(scheduled("minimum"))
    strips = {i.stage: i for i in scene.items.values() if i.kind == "transfers"}
    assert set(strips) == set(scene.stages) - {0}
    whole = ["fetch", "wait", "fold", "write back", "release"]
    assert list(strips[1].moves) == whole
    params = {n: p for s in scene.stages.values() for n, p in s.params.items()}
    fetched = sum(s.moves["fetch"].high for s in strips.values() if "fetch" in s.moves)
    tied = params["model.decoder.embed_tokens.weight"].bytes
    assert fetched == sum(p.bytes for p in params.values()) + tied
    assert strips[1].moves["fetch"].streams == ("to_device",)
    assert strips[1].moves["write back"].streams == ("to_host",)
    assert all(s.moves["fold"].high == 1 for s in strips.values() if "fold" in s.moves)
    refills = [e for e in scene.edges if e.port == "release"]
    assert all(scene.items[e.source].kind == scene.items[e.target].kind == "transfers"
               for e in refills)  # fmt: skip
    assert len(refills) >= len(strips) - 2


def test_streams_are_named_and_coloured() -> None:
    source = viz.dot_source(scheduled("minimum", "disk"))
    assert re.search(r'bgcolor="#DDD6F3">fetch [^<]*<br/><font point-size="8">read<', source)
    assert re.search(r'bgcolor="#F3D3E3">write back [^<]*<br/><font point-size="8">write<', source)
    assert "fold 1 term<" in source
    for words in ("weights arrive in slots", "the new weights leave", "a released slot is filled"):
        assert words in source
    assert f'color="{SLOT}" constraint=false style=dashed' in source


def test_weights_stay_boxes_under_transfers() -> None:
    for memory in (None, "minimum"):
        scene = compact(read(scheduled(memory)))
        drawn = {p.name for i in scene.items.values() for p in i.params}
        assert drawn == set(info(scheduled(memory)).params)
        perturbed = {p.name for i in scene.items.values() if i.ports for p in i.params}
        assert perturbed == drawn
        assert not any("materialize" in line for i in scene.items.values() for line in i.lines)


def test_a_resident_step_shows_folds_only() -> None:
    source = viz.dot_source(scheduled(None))
    assert MOVE["fold"] in source
    assert MOVE["fetch"] not in source
    assert MOVE["write back"] not in source
    assert "released" not in source
    assert [t.split(" (")[0] for t in titles(source)][2] == (
        "stages 2-3: 2 x model.decoder.layers.N"
    )


def test_cycles_of_stages_are_folded() -> None:
    found = [t.split(" (")[0] for t in titles(viz.dot_source(scheduled("minimum")))]
    parts = [t for t in found if "2 x model.decoder.layers.N, part" in t]
    assert len(parts) >= 3
    first, second = (int(n) for n in re.findall(r"\d+", parts[0].split(":")[0]))
    assert second - first == len(parts)
    assert len(found) < len(titles(viz.dot_source(scheduled("minimum"), fold=False)))


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        ("abc", ["a", "b", "c"]),
        ("abbbc", ["a", "bbb", "c"]),
        ("xabcabcabcy", ["x", "abcabcabc", "y"]),
        ("aabaab", ["aabaab"]),
        ("abab", ["abab"]),
        ("", []),
    ],
)
def test_runs_are_found(forms: str, expected: list[str]) -> None:
    stages = [Stage(i, "", form) for i, form in enumerate(forms)]
    runs = [[s for cycle in run for s in cycle] for run in cycles(stages)]
    assert ["".join(str(s.form) for s in run) for run in runs] == expected


def test_numbers_of_stages() -> None:
    assert Stage(7, "", "").numbers() == "7"
    assert Stage(2, "", "", repeats=12).numbers() == "2-13"
    assert Stage(2, "", "", repeats=2, step=3).numbers() == "2, 5"
    assert Stage(2, "", "", repeats=4, step=3).numbers() == "2, 5 .. 11"


def test_unused_weights_have_a_stage_of_their_own() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x).square().mean()

    step = zograph.compile(Model(), backend="eager", device="cpu")
    step.prepare(x=torch.ones(2, 4))
    source = viz.dot_source(step.graph)
    assert "unused idle.weight" in source
    assert "no stage uses" not in source


@needs_dot
def test_streamed_pictures_are_rendered(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = viz.draw(scheduled("minimum"), tmp_path / "step.svg").read_text(encoding="utf-8")
    assert "write back" in text
    assert capfd.readouterr().err == ""


def test_a_timeline_is_drawn(tmp_path: Path) -> None:
    schedule = info(scheduled("minimum")).schedule
    assert schedule is not None
    path = schedule.draw(tmp_path / "timeline.svg")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert "measured" not in text
    spans = {n: (100 + s, 100 + schedule.end[n]) for n, s in schedule.start.items()}
    both = schedule.draw(tmp_path / "both.svg", spans).read_text(encoding="utf-8")
    assert "measured" in both
    with pytest.raises(OptionError, match=r"\.svg"):
        schedule.draw(tmp_path / "timeline.png")
