"""docs/plans.md shows what `zograph plan` prints, and figures that add up."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, Fence, fences
from zograph.cli import main
from zograph.cli.plan import paper
from zograph.cli.shapes import ZO2
from zograph.paper import Paper
from zograph.testing import Golden

PAGE = DOCS / "plans.md"
SHOWN = [b for b in fences(PAGE.read_text(encoding="utf-8")) if b.language in ("sh", "text")]
PAIRS = [(SHOWN[i].body.strip(), i + 1) for i in range(0, len(SHOWN), 2)]


def rewrite(page: Path, old: Fence, body: str) -> None:
    lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
    count = old.body.count("\n")
    lines[old.line - 1 : old.line - 1 + count] = [body]
    page.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def _one_capture_of_a_model() -> Iterator[None]:
    """The commands plan on one :class:`zograph.paper.Paper` of a model and a batch."""
    made: dict[tuple[Any, ...], Paper] = {}

    def known(model: Any, args: Namespace) -> Paper:
        asked = (args.batch, args.seq, args.directions, args.transfer_dtype)
        key = (model.to_json_string(), str(model.dtype), *asked)
        if key not in made:
            made[key] = paper(model, args)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zograph.cli.plan.paper", known)
        yield


SLOW = (pytest.mark.slow, pytest.mark.xdist_group("docs/plans.md"))


@pytest.mark.parametrize(
    ("command", "place"),
    [pytest.param(*p, marks=() if "opt-125m" in p[0] else SLOW) for p in PAIRS],
)
def test_a_text_is_what_its_command_prints(
    command: str, place: int, capsys: pytest.CaptureFixture[str], golden: Golden
) -> None:
    assert main(shlex.split(command)[1:]) == 0
    printed = capsys.readouterr().out
    if golden.update:
        shown = [f for f in fences(PAGE.read_text(encoding="utf-8")) if f.language != "python"]
        rewrite(PAGE, shown[place], printed)
        return
    assert SHOWN[place].body == printed


def test_every_command_has_its_text() -> None:
    assert [b.language for b in SHOWN] == ["sh", "text"] * len(PAIRS)
    assert all(command.startswith("zograph plan ") for command, _ in PAIRS)


def test_the_family_is_below_zo2() -> None:
    body = next(SHOWN[place].body for command, place in PAIRS if " opt " in command)
    found = re.findall(r"^(opt-\S+) +[\d.]+ +([\d.]+) +([\d.]+)", body, re.MULTILINE)
    assert {name: float(theirs) for name, _, theirs in found} == ZO2
    assert all(float(ours) < float(theirs) for _, ours, theirs in found)


def test_the_budget_of_9_gb_reaches_its_bound() -> None:
    body = next(SHOWN[place].body for command, place in PAIRS if "9GB minimum" in command)
    memory, times = (line.split() for line in body.splitlines() if line.startswith("9GB"))
    least, _ = (line.split() for line in body.splitlines() if line.startswith("minimum "))
    assert float(least[1]) < 3.1
    assert float(memory[1]) <= 9.0
    assert float(memory[7]) <= 356  # host
    compute, transfer, step = map(float, times[6:9])
    assert step <= 1.1 * max(compute, transfer)
    disk = next(SHOWN[place].body for command, place in PAIRS if "--storage disk" in command)
    assert float(next(s for s in disk.splitlines() if s.startswith("9GB")).split()[7]) <= 16


def test_items_of_a_derivation_add_up() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## OPT-175B by item")[1]
    for rows in re.findall(r"\| item \| \| GB \|\n\| --- \| --- \| --- \|\n((?:\|.*\n)+)", text):
        cells = [line.strip("|").split("|") for line in rows.splitlines()]
        amounts = {c[0].strip(): float(c[2]) for c in cells}
        total = amounts.pop("all")
        assert sum(amounts.values()) == pytest.approx(total, abs=0.002)
