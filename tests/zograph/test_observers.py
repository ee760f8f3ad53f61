from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import fx

from tests.passes.graphs import two_blocks
from zograph import env
from zograph.errors import VerifyError
from zograph.ir import call
from zograph.observers import Observers
from zograph.passes import Pass, PassContext, PassResult
from zograph.pipeline import Pipeline, default_passes, run

aten = torch.ops.aten


@dataclass(frozen=True)
class Double(Pass):
    """Put a second relu behind every relu; leave a stale value if asked to."""

    stale: bool = False
    name: ClassVar[str] = "double"

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        for node in [n for n in gm.graph.nodes if n.target is aten.relu.default]:
            with gm.graph.inserting_after(node):
                new = call(gm.graph, aten.relu.default, (node,), source=f"double<{node.name}")
            node.replace_all_uses_with(new, delete_user_cb=lambda u, new=new: u is not new)
            if self.stale:
                new.meta["val"] = new.meta["val"].half()
        return PassResult(gm, True, ("1 relu doubled",))


def test_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOGRAPH_DUMP", str(tmp_path / "new"))
    observers = Observers()
    run(two_blocks(), Pipeline((Double(),)), PassContext(), observers)
    files = sorted(p.name for p in (tmp_path / "new").iterdir())
    assert files == [
        "00_capture.dot",
        "00_capture.txt",
        "01_double.diff",
        "01_double.dot",
        "01_double.txt",
    ]
    text = (tmp_path / "new" / "01_double.txt").read_text().splitlines()
    assert re.fullmatch(
        r"# after double \(\d+\.\d ms\): \+1 -0 nodes, 5 trainable parameters", text[0]
    )
    assert text[1] == "# aten.relu: 1 -> 2"
    assert text[2] == "# note: 1 relu doubled"
    assert "%relu_1: f32[3, 1] = aten.relu(%relu)" in text
    diff = (tmp_path / "new" / "01_double.diff").read_text()
    assert "--- capture\n+++ double\n" in diff
    assert "+%relu_1: f32[3, 1] = aten.relu(%relu)\n" in diff
    assert [name for name, _ in observers.history] == ["capture", "double"]


def test_a_second_compilation_dumps_into_its_own_folder(tmp_path: Path) -> None:
    for _ in range(3):
        run(two_blocks(), Pipeline((Double(),)), PassContext(), Observers(dump=tmp_path))
    for folder in (tmp_path, tmp_path / "run_2", tmp_path / "run_3"):
        assert (folder / "00_capture.txt").exists()
        assert (folder / "01_double.txt").exists()


def test_a_broken_graph_is_dumped_before_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"(?s)after double: .*made by:  double<relu"):
        run(two_blocks(), Pipeline((Double(True),)), PassContext(), Observers(dump=tmp_path))
    assert "%relu_1: f16[3, 1]" in (tmp_path / "01_double.txt").read_text()


def test_a_broken_capture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = two_blocks()
    relu = next(n for n in gm.graph.nodes if n.target is aten.relu.default)
    relu.meta["val"] = relu.meta["val"].half()
    with pytest.raises(VerifyError, match="after capture"):
        run(gm, Pipeline((Double(),)), PassContext(), Observers())
    monkeypatch.setenv("ZOGRAPH_VERIFY", "0")
    run(gm, Pipeline((Double(True),)), PassContext(), Observers())


def test_timings_and_notes() -> None:
    observers = Observers()
    passes = default_passes().replace("lower")
    run(two_blocks(), passes, PassContext(), observers)
    assert [name for name, _ in observers.timings] == [p.name for p in passes]
    assert all(seconds >= 0 for _, seconds in observers.timings)
    assert ("hoist", "1 nodes hoisted, 1 of them into stage 0") in observers.notes
    assert observers.history == []
    assert observers.overhead > 0


def test_every_variable_is_in_the_table() -> None:
    assert {"ZOGRAPH_DUMP", "ZOGRAPH_VERIFY", "ZOGRAPH_CACHE"} <= set(env.TABLE)
    with pytest.raises(KeyError, match="ZOGRAPH_NONE"):
        env.setting("ZOGRAPH_NONE")
    source = Path(env.__file__).parent
    others = [p for p in source.rglob("*.py") if p.name != "env.py"]
    reading = [p.name for p in others if re.search(r"environ\S*ZOGRAPH_", p.read_text())]
    assert reading == [], "only zograph/env.py reads ZOGRAPH_ variables"
