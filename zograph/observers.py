"""What happens around every pass: verify, time, dump, compare. Passes do none of it."""

from __future__ import annotations

import difflib
import time
from collections import Counter
from pathlib import Path

from torch import fx

from zograph import printer
from zograph.env import setting
from zograph.ir import info
from zograph.passes.base import Pass, PassResult
from zograph.verifier import Verifier


class Observers:
    """Watches one run of a pipeline.

    Attributes
    ----------
    timings : list of (str, float)
        Seconds of each pass, verification and dumps apart.
    notes : list of str
        What the passes said, each line headed by the pass.
    """

    def __init__(self) -> None:
        self.timings: list[tuple[str, float]] = []
        self.notes: list[str] = []
        folder = setting("ZOGRAPH_DUMP")
        self._dump = Dump(Path(folder)) if folder else None
        self._verifier = None if setting("ZOGRAPH_VERIFY") == "0" else Verifier()
        self._start = 0.0

    def before(self, pass_: Pass, gm: fx.GraphModule) -> None:
        """Note the state that the pass will change."""
        if not self.timings:
            self._verify(gm, "capture")
            if self._dump:
                self._dump.write("capture", gm, None)
        self._start = time.perf_counter()

    def after(self, pass_: Pass, result: PassResult) -> None:
        """Time, verify and dump what the pass left.

        Raises
        ------
        VerifyError
            If the graph breaks a rule; a dump is written first.
        """
        seconds = time.perf_counter() - self._start
        self.timings.append((pass_.name, seconds))
        self.notes += [f"{pass_.name}: {note}" for note in result.notes]
        if self._dump:
            self._dump.write(pass_.name, result.gm, seconds)
        self._verify(result.gm, pass_.name)

    def _verify(self, gm: fx.GraphModule, after: str) -> None:
        if self._verifier:
            self._verifier.check(gm, after=after)


class Dump:
    """Writes a text, a picture and a difference per pass into a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
        self._folder = folder / f"{max(taken, default=-1) + 1:03d}"  # one per capture
        self._folder.mkdir()
        self._count = 0
        self._text = ""
        self._ops: Counter[str] = Counter()

    def write(self, name: str, gm: fx.GraphModule, seconds: float | None) -> None:
        """Write ``NN_name.txt``, ``.dot`` and ``.diff`` (against the pass before)."""
        from zograph import viz  # draws with graphviz, wanted here alone

        text, ops = printer.text(gm), printer.summary(gm)
        took = "" if seconds is None else f" ({seconds * 1e3:.1f} ms)"
        added, removed = (ops - self._ops).total(), (self._ops - ops).total()
        params = [p for p in info(gm).params.values() if p.trainable]
        header = f"# after {name}{took}: +{added} -{removed} nodes, {len(params)} trainable tensors"
        stem = self._folder / f"{self._count:02d}_{name}"
        stem.with_suffix(".txt").write_text(f"{header}\n{text}")
        stem.with_suffix(".dot").write_text(viz.dot_source(gm))
        if self._count:
            lines = difflib.unified_diff(
                self._text.splitlines(), text.splitlines(), "before", "after", lineterm=""
            )
            changed = [
                f"# {op}: {self._ops[op]} -> {ops[op]}"
                for op in sorted({*ops, *self._ops})
                if ops[op] != self._ops[op]
            ]
            stem.with_suffix(".diff").write_text("\n".join([header, *changed, *lines, ""]))
        self._text, self._ops = text, ops
        self._count += 1
