"""The rules on transfers: every slot is waited for, folded once, written back and released."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from zograph import ir
from zograph.errors import VerifyError
from zograph.schedule import check
from zograph.transfers import DECODE, ENCODE, FETCH, FOLD, RELEASE, WAIT, WRITEBACK
from zograph.verifier import Fault, Scope

WEIGHTS = (ir.Kind.PARAMETER, ir.Kind.WEIGHT)


def slots(scope: Scope) -> Iterator[Fault]:
    """A fetch has one wait; its weights are used by its own stage alone, ahead of the release.

    So are weights that are decoded.
    """
    place = {n: i for i, n in enumerate(scope.nodes)}
    released = {w: n for n in _calls(scope, RELEASE) for w in _weights(n)}
    for fetch in _calls(scope, FETCH):
        waits = [u for u in fetch.users if u.target is WAIT]
        if len(waits) != 1 or len(fetch.users) != 1:
            advice = "use a fetch by its one wait, and the weights through that"
            yield Fault(fetch, "one wait and no other user", f"{len(waits)} waits", advice)
    waits = [w for w in _calls(scope, WAIT) if len(w.all_input_nodes[0].users) == 1]
    for node in [*waits, *_calls(scope, DECODE)]:
        for weight in _slot_weights(node) if node.target is WAIT else [node]:
            stage = scope.metas[node].stage
            end = released.get(weight)
            final = not any(u.target in (FOLD, DECODE) for u in weight.users)
            if end is None and final:
                advice = "add a release behind the stage"
                yield Fault(weight, "a release of its slot", "none", advice)
            for user in weight.users:
                if scope.metas[user].stage != stage:
                    found = f"a use by {scope.name(user)} of stage {scope.metas[user].stage}"
                    advice = "fetch the weight again for the other stage"
                    yield Fault(weight, f"uses of stage {stage} only", found, advice)
                if end is not None and place[user] > place[end]:
                    found = f"{scope.name(user)} behind {scope.name(end)}"
                    yield Fault(weight, "uses ahead of its release", found, "release it later")


def folds(scope: Scope) -> Iterator[Fault]:
    """Trainable weights are folded once and written back where they were fetched; frozen never.

    A weight that is not written in every step is folded wherever it is fetched. Of weights that
    are stored in a format :func:`codecs` says the same.
    """
    if "offloaded" not in scope.info.facts:
        return
    seen: set[str] = set()
    written = {w: n for n in _calls(scope, WRITEBACK) for w in _weights(n)}
    elided: set[str] = set()
    for fold in _calls(scope, FOLD):
        for i, weight in enumerate(_weights(fold)):
            name = str(scope.metas[weight].name)
            param = scope.info.params[name]
            if not param.trainable:
                advice = "leave frozen weights out of the fold"
                yield Fault(fold, "folds of trainable weights", f"{name} is frozen", advice)
            fetched = weight.op == "call_function"
            items = [u for u in fold.users if u.target is operator.getitem and u.args[1] == i]
            back = [written[u] for u in items if u in written]
            if name in seen and not (name in elided and fetched and not back):
                advice = "fold a weight where it is first visited"
                yield Fault(fold, f"one fold of {name} a step", "a second one", advice)
            if fetched and name not in seen and not back:
                advice = "write the folded weight back"
                yield Fault(fold, f"a write-back of {name}", "none", advice)
            seen.add(name)
            elided.update([name] if any(len(b.args) > 1 for b in back) else [])
            if late := [u for u in weight.users if u is not fold and u.target is not RELEASE]:
                found = f"{scope.name(late[0])} uses the weight as it was fetched"
                advice = "use the result of the fold"
                yield Fault(fold, f"uses of {name} behind its fold", found, advice)
    seen |= {str(scope.metas[n].name) for n in _calls(scope, DECODE) if _has_terms(n)}
    missing = [n for n, p in scope.info.params.items() if p.trainable and n not in seen]
    if "dual" in scope.info.facts and missing:
        advice = "fold what no stage uses at the end of the step"
        yield Fault(None, f"a fold of {missing[0]}", "none", advice)


def codecs(scope: Scope) -> Iterator[Fault]:
    """A weight that is stored in a format is used decoded, folded once and encoded to be stored."""
    if "offloaded" not in scope.info.facts:
        return
    seen: set[str] = set()
    moves = (FETCH, WAIT, operator.getitem, DECODE, WRITEBACK, RELEASE)
    for node in scope.nodes:
        record = scope.metas[node]
        param = scope.info.params.get(str(record.name))
        if param is None or param.format is None or record.kind not in WEIGHTS:
            continue
        if node.target is not DECODE:
            if late := [u for u in node.users if u.target not in moves]:
                advice = "decode the weight first"
                yield Fault(late[0], f"{param.name} decoded", "what is stored of it", advice)
            continue
        back = [u for u in node.users if u.target is ENCODE]
        fetched = node.all_input_nodes[0].op == "call_function"
        if _has_terms(node) and not param.trainable:
            advice = "decode frozen weights without terms"
            yield Fault(node, "terms of trainable weights", f"{param.name} is frozen", advice)
        elif _has_terms(node) and param.name in seen and (back or node.args[4]):
            advice = "apply terms where a weight is first visited"
            yield Fault(node, f"one fold of {param.name} a step", "a second one", advice)
        elif _has_terms(node) and param.name not in seen:
            stored = [u for u in back if not fetched or any(w.target is WRITEBACK for w in u.users)]
            if not stored:
                advice = "encode the weight and write it back"
                yield Fault(node, f"a new stored value of {param.name}", "none", advice)
        seen.update([param.name] if _has_terms(node) else [])


def schedule(scope: Scope) -> Iterator[Fault]:
    """The schedule has no race, keeps every edge and stays within its memory."""
    found, layout = scope.info.schedule, scope.info.layout
    if found is None or layout is None:
        return
    for arena, peak in found.peak.items():
        if peak > found.capacity[arena]:
            advice = "move units down, or raise the budget"
            text = f"{peak} bytes"
            yield Fault(None, f"{arena} slots within {found.capacity[arena]} bytes", text, advice)
    try:
        check(found)
    except VerifyError as error:
        yield Fault(None, "a schedule without races", str(error), "add the event that is missing")


def _has_terms(decode: fx.Node) -> bool:
    """Whether a decoding applies pending terms."""
    return len(decode.args) > 4


def _calls(scope: Scope, target: Any) -> list[fx.Node]:
    return [n for n in scope.calls if n.target is target]


def _weights(node: fx.Node) -> list[fx.Node]:
    """The list of weights that a transfer takes first."""
    return [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]


def _slot_weights(wait: fx.Node) -> list[fx.Node]:
    """The weights in a slot: as they arrived, and as they are after the fold."""
    arrived = [u for u in wait.users if scope_weight(u)]
    folds = {u for w in arrived for u in w.users if u.target is FOLD}
    taken = {n for f in folds for n in _weights(f) if n in arrived}
    folded = [
        u
        for f in folds
        for u in f.users
        if u.target is operator.getitem and _weights(f)[int(u.args[1])] in taken  # type: ignore
    ]
    return [*arrived, *folded]


def scope_weight(node: fx.Node) -> bool:
    """Whether a node takes a weight out of a list."""
    return node.target is operator.getitem and ir.meta(node).kind is ir.Kind.WEIGHT
