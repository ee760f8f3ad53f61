"""The chart is well-formed, complete, deterministic, and small for large schedules."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import networkx as nx

from tests.zograph.schedule.dags import Cost, cpu_disk, cuda_disk, mixed
from zograph.schedule import Schedule, chart, schedule
from zograph.schedule.chart import COLORS, LETTER, WIDTH

SVG = "{http://www.w3.org/2000/svg}"


def plan(count: int = 4) -> Schedule:
    case = cuda_disk(mixed(count), 2)
    return schedule(case.dag, case.units, case.capacity)


def tips(root: ET.Element) -> list[str]:
    return [title.text or "" for title in root.iter(f"{SVG}title")]


def test_every_task_is_a_box_that_says_its_name_and_times() -> None:
    schedule_ = plan()
    root = ET.fromstring(chart(schedule_))
    found = {tip.partition(":")[0] for tip in tips(root)}
    assert found == set(schedule_.dag)
    start, end = schedule_.start["body 0"], schedule_.end["body 0"]
    assert f"body 0: {start:.6g} s to {end:.6g} s" in tips(root)
    assert chart(schedule_) == chart(plan())


def test_the_title_line_and_the_legend() -> None:
    case = cpu_disk([Cost()] * 4, 2)
    words = [
        e.text for e in ET.fromstring(chart(schedule(*vars(case).values()))).iter(f"{SVG}text")
    ]
    assert words[0] == (
        "step 5 s, first step 6 s; 100% of the transfer time under compute; "
        "limited by compute (5 s busy)"
    )
    assert {"fetch", "fold", "compute", "write back", "read", "write", "seconds"} <= set(words)
    assert "pass on" not in words


def test_measured_times_stand_beneath_the_predicted() -> None:
    schedule_ = plan()
    measured = {name: (schedule_.start[name], schedule_.end[name] + 1) for name in schedule_.dag}
    measured.pop("body 3")
    root = ET.fromstring(chart(schedule_, measured))
    words = [e.text for e in root.iter(f"{SVG}text")]
    assert words.count("predicted") == words.count("measured") == len(schedule_.order)
    assert len(tips(root)) == 2 * len(schedule_.dag) - 1
    rows = {e.get("y") for e in root.iter(f"{SVG}rect") if e.get("fill") in COLORS.values()}
    assert len(rows) == 2 * len(schedule_.order) + 1  # and the legend


def test_text_does_not_overlap() -> None:
    schedule_ = plan(12)
    measured = {name: (schedule_.start[name], schedule_.end[name] + 1) for name in schedule_.dag}
    for root in (ET.fromstring(chart(schedule_)), ET.fromstring(chart(schedule_, measured))):
        lines: dict[str, list[tuple[float, float]]] = {}
        for e in root.iter(f"{SVG}text"):
            width = len(e.text or "") * LETTER * float(e.get("font-size", 10)) / 10.5
            x = (
                float(e.get("x", 0))
                - {"start": 0, "middle": 0.5, "end": 1}[e.get("text-anchor", "")] * width
            )
            lines.setdefault(e.get("y", ""), []).append((x, x + width))
        for spans in lines.values():
            spans.sort()
            assert all(a[1] <= b[0] for a, b in pairwise(spans))
            assert spans[-1][1] <= WIDTH


def test_boxes_too_small_to_see_are_merged() -> None:
    case = cpu_disk([Cost(fetch=1.0, fold=0.001, body=0.001, store=0.001)] * 500, 3)
    schedule_ = schedule(case.dag, case.units, case.capacity)
    measured = {name: (i * 1e-3, i * 1e-3 + 1e-4) for i, name in enumerate(schedule_.dag)}
    measured["body 499"] = (0.0, 500.0)
    text = chart(schedule_, measured)
    assert len(tips(ET.fromstring(text))) < 3000
    assert " more:" in text
    assert len(text) < 600_000


def test_an_empty_schedule() -> None:
    assert "step 0 s" in chart(schedule(nx.DiGraph(), {}, {}))
