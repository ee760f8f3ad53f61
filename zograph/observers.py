"""What stands around every pass: verify, time, dump, diff. Passes contain none of that."""

from __future__ import annotations

import difflib
import time
from collections import Counter
from pathlib import Path

from torch import fx

from zograph import env, ir, printer
from zograph.passes.base import Pass, PassResult
from zograph.verifier import Verifier

AT_CAPTURE = ("random", "dead", "functional")
"""Rules that hold from `normalize` on."""


class Observers:
    """Called around every pass of :func:`zograph.pipeline.run`.

    Parameters
    ----------
    verify
        Check the graph after every pass; by default unless ``ZOGRAPH_VERIFY=0``.
    dump
        Folder for a text, a drawing source and a diff per pass; by default ``ZOGRAPH_DUMP``.

    Attributes
    ----------
    timings
        (pass, seconds) in order; the observers' own time is not in it.
    history
        (pass, canonical text) in order, ``capture`` first; empty unless dumping.
    notes
        (pass, message) for everything that passes reported.
    overhead
        Seconds spent in the observers themselves.
    """

    def __init__(self, *, verify: bool | None = None, dump: str | Path | None = None) -> None:
        folder = env.setting("ZOGRAPH_DUMP") if dump is None else dump
        self.dump = None if folder is None else Path(folder)
        wanted = env.setting("ZOGRAPH_VERIFY") != "0" if verify is None else verify
        self.verifier = Verifier() if wanted else None
        self.timings: list[tuple[str, float]] = []
        self.history: list[tuple[str, str]] = []
        self.notes: list[tuple[str, str]] = []
        self.overhead = 0.0
        self._counts: Counter[str] = Counter()
        self._started = 0.0
        self._first = True

    @classmethod
    def silent(cls) -> Observers:
        """Return observers that only time: for graphs that are looked at and thrown away."""
        quiet = cls(verify=False)
        quiet.dump = None
        return quiet

    def before(self, pass_: Pass, gm: fx.GraphModule) -> None:
        """Take note of the graph that a pass is about to see; check it if it is the first."""
        start = time.perf_counter()
        if self._first:
            self._first = False
            if self.verifier is not None:
                self.verifier.check(gm, after="capture", skip=AT_CAPTURE)
            if self.dump is not None:
                self.dump = fresh_folder(self.dump)
                self._write("capture", gm, "captured")
        self._started = time.perf_counter()
        self.overhead += self._started - start

    def after(self, pass_: Pass, result: PassResult) -> None:
        """Time the pass, keep its notes, dump its graph, then verify it.

        Raises
        ------
        VerifyError
            If the pass left a graph that breaks a rule. The dump of that graph is written.
        """
        start = time.perf_counter()
        seconds = start - self._started
        self.timings.append((pass_.name, seconds))
        self.notes += [(pass_.name, note) for note in result.notes]
        if self.dump is not None:
            head = f"after {pass_.name} ({1000 * seconds:.1f} ms)"
            self._write(pass_.name, result.gm, head, result.notes)
        if self.verifier is not None:
            self.verifier.check(result.gm, after=pass_.name)
        self.overhead += time.perf_counter() - start

    def _write(self, name: str, gm: fx.GraphModule, head: str, notes: tuple[str, ...] = ()) -> None:
        from zograph import viz  # drawing pulls in graphviz; most compilations never dump

        assert self.dump is not None
        text, counts = printer.text(gm), printer.summary(gm)
        header = [f"# {head}: {describe(self._counts, counts)}, {describe_parameters(gm)}"]
        header += [f"# {line}" for line in op_changes(self._counts, counts)] if self.history else []
        header += [f"# note: {note}" for note in notes]
        before_name, before = self.history[-1] if self.history else ("nothing", "")
        self.history.append((name, text))
        self._counts = counts
        stem = self.dump / f"{len(self.history) - 1:02d}_{name}"
        diff = difflib.unified_diff(
            before.splitlines(True), text.splitlines(True), before_name, name
        )
        title = "\n".join(header)
        stem.with_suffix(".txt").write_text(f"{title}\n{text}", encoding="utf-8")
        if len(self.history) > 1:
            stem.with_suffix(".diff").write_text(f"{title}\n{''.join(diff)}", encoding="utf-8")
        stem.with_suffix(".dot").write_text(viz.dot_source(gm), encoding="utf-8")


def describe(before: Counter[str], after: Counter[str]) -> str:
    """Return ``+6 -0 nodes``: how many calls came and went, by kind of call."""
    return f"+{(after - before).total()} -{(before - after).total()} nodes"


def op_changes(before: Counter[str], after: Counter[str]) -> list[str]:
    """Return a line per operator whose count changed."""
    names = sorted(n for n in before | after if before[n] != after[n])
    return [f"{name}: {before[name]} -> {after[name]}" for name in names]


def describe_parameters(gm: fx.GraphModule) -> str:
    """Return ``12 trainable parameters``."""
    count = sum(p.trainable for p in ir.info(gm).params.values())
    return f"{count} trainable parameter{'' if count == 1 else 's'}"


def fresh_folder(folder: Path) -> Path:
    """Create a folder for one compilation's dumps: the folder itself, or ``run_2``... in it."""
    if not (folder / "00_capture.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    number = 2
    while (folder / f"run_{number}").exists():
        number += 1
    (folder / f"run_{number}").mkdir()
    return folder / f"run_{number}"
