"""The rules on a zeroth-order step: branches apart, noise paired, stages in order, facts true."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

from torch import fx
from torch._ops import OpOverload

from zograph import ir, printer
from zograph.transfers import GATHER, RELEASE, is_transfer
from zograph.verifier import Fault, Scope


def branches(scope: Scope) -> Iterator[Fault]:
    """No node sees both branches but the output, transfers and calls of whole stages."""
    reach: dict[fx.Node, frozenset[str]] = {}
    nothing: frozenset[str] = frozenset()
    for node in scope.nodes:
        if node.op == "output":
            continue
        record = scope.metas[node]
        seen = nothing.union(*(reach.get(s, nothing) for s in node.all_input_nodes))
        both = record.kind is ir.Kind.STAGE or _is_pair(node) or is_transfer(node)
        if both or _is_item_of_both(node, scope):
            reach[node] = frozenset(record.branch or ())
            continue
        reach[node] = frozenset(record.branch) if record.branch else seen
        other = seen - {record.branch} if record.branch else seen
        if other and (record.branch or len(other) > 1):
            kind = f"branch {record.branch}" if record.branch else "no branch"
            advice = "use the copy of the argument that belongs to the same branch"
            mixed = f"a use of branch {' and '.join(sorted(other))}"
            yield Fault(node, f"a node of {kind} that uses its own branch", mixed, advice)


def paired(scope: Scope) -> Iterator[Fault]:
    """Every perturbed use of a parameter on + has its like on -: same parameter, key and seed."""
    single: dict[Any, list[fx.Node]] = {}
    for node in scope.calls:
        if not _is_materialize(node):
            continue
        if _is_pair(node):
            yield from _halves(node, scope)
            continue
        sign, branch = _argument(node, "sign"), scope.metas[node].branch
        if branch is not None and branch != ("+" if sign == 1 else "-"):
            advice = "sign is 1 on branch + and -1 on branch -"
            yield Fault(node, f"the sign of branch {branch}", f"sign {sign}", advice)
        names = ("base", "keys", "slot", "seed", "eps", "distribution", "dtype")
        what = (node.target, *(_argument(node, name) for name in names))
        single.setdefault(what, []).append(node)
    for what, nodes in single.items():
        plus = sum(_argument(n, "sign") == 1 for n in nodes)
        if 2 * plus != len(nodes):
            base = scope.name(what[1])
            found = f"{plus} on branch + and {len(nodes) - plus} on branch -"
            advice = "perturb both branches with the same parameter, key slot, seed and eps"
            yield Fault(nodes[0], f"equal noise for {base} on both branches", found, advice)


def hoisted(scope: Scope) -> Iterator[Fault]:
    """Hoisted nodes need no trainable parameter and no branch."""
    for node, why in _needs(scope.gm, scope.info, {}).items():
        if scope.metas[node].hoisted and node.op != "output":
            advice = "mark a node hoisted only if all that it uses is"
            yield Fault(node, "a hoisted node that both branches can share", why, advice)


def stages(scope: Scope) -> Iterator[Fault]:
    """No node uses a value of a later stage, and stages have names."""
    names = scope.info.stages
    for node in scope.nodes:
        stage = scope.metas[node].stage
        if stage is None:
            continue
        if names and stage not in names:
            found = f"stage {stage}, not in {sorted(names)}"
            yield Fault(node, "a stage of GraphInfo.stages", found, "name the stage there")
        for source in node.all_input_nodes:
            if source.target is RELEASE:  # the token of a slot: stages may run in another order
                continue
            earlier = scope.metas[source].stage if source in scope.metas else None
            if earlier is not None and earlier > stage:
                found = f"a use of {scope.name(source)} of stage {earlier}"
                advice = "number stages along the edges, or move the node into the later stage"
                yield Fault(node, f"values of stages up to {stage}", found, advice)


def facts(scope: Scope) -> Iterator[Fault]:
    """What GraphInfo says is so."""
    yield from _parameters(scope)
    claimed, record = scope.info.facts, scope.info
    out = ir.output(scope.gm)
    results = tuple(out.args[0])  # type: ignore[arg-type]
    if "dual" in claimed:
        found = [ir.meta(n).branch if isinstance(n, fx.Node) else None for n in results]
        if found != ["+", "-"]:
            advice = "return (loss+, loss-) and nothing else"
            yield Fault(out, "two losses, of branch + and -", f"branches {found}", advice)
    elif beyond := [i for i in record.out_leaves if i is not None and i >= len(results)]:
        expected = f"the output that GraphInfo.out_leaves names (index {beyond[0]})"
        yield Fault(out, expected, f"{len(results)} outputs", "keep outputs, or their index")
    if "outlined" in claimed:
        for node in scope.calls:
            moves = node.target is GATHER or ("offloaded" in claimed and is_transfer(node))
            if node.target is not operator.getitem and not ir.is_shape(node) and not moves:
                advice = "give the node a stage before outline, or take the fact back"
                called = f"a call of {ir.op_name(node)}"
                yield Fault(node, "stage calls and size arithmetic only", called, advice)


def _parameters(scope: Scope) -> Iterator[Fault]:
    params, keys = scope.info.params, scope.info.keys
    for node in scope.nodes:
        if node.op != "placeholder":
            return
        record, val = scope.metas[node], node.meta["val"]
        if record.kind is ir.Kind.PARAMETER and params:
            param = params.get(record.name or "")
            if param is None:
                advice = "add it to GraphInfo.params"
                yield Fault(node, "a known parameter", f"{record.name}", advice)
                continue
            shape, dtype = param.shape, param.dtype
            if param.format is not None and "offloaded" in scope.info.facts:
                shape, dtype = param.format.shape(shape), param.format.dtype
            if (tuple(val.shape), val.dtype) != (shape, dtype):
                expected = f"{dtype} {shape}, as in GraphInfo.params"
                advice = "cast behind the placeholder, not in it"
                yield Fault(node, expected, scope.type(val), advice)
        name = record.name or ""
        if record.kind is ir.Kind.NOISE and name.startswith("keys.") and keys:
            names = keys.get(int(name.removeprefix("keys.")), ())
            if tuple(val.shape) != (len(names), 2):
                advice = "keep GraphInfo.keys and the table's placeholder together"
                yield Fault(node, f"one key for each of {names}", scope.type(val), advice)


def _needs(
    gm: fx.GraphModule, record: ir.GraphInfo, given: dict[fx.Node, str]
) -> dict[fx.Node, str]:
    """Return the nodes that need a trainable parameter or a branch, each with one that it needs.

    Results of a stage are told apart: one may be shared, though others are not.

    Parameters
    ----------
    given
        The same for placeholders, where the graph is a stage's body.
    """
    found = dict(given)
    for node in gm.graph.nodes:
        own = ir.meta(node)
        if own.kind in (ir.Kind.PARAMETER, ir.Kind.WEIGHT):
            param = record.params.get(own.name or "")  # one of a list, which holds frozen ones too
            if param is None or param.trainable:
                found[node] = f"the trainable parameter {own.name}"
            continue
        if node.op == "placeholder" or is_transfer(node):
            continue
        why = next((found[s] for s in node.all_input_nodes if s in found), None)
        if why is not None and own.hoisted and node.target is operator.getitem:
            stage, i = cast(tuple[fx.Node, int], node.args)
            if (body := printer.body_of(gm, stage)) is not None:
                takes = zip(ir.placeholders(body), cast(list[fx.Node], stage.args), strict=True)
                within = _needs(body, record, {p: found[s] for p, s in takes if s in found})
                why = within.get(cast(list[fx.Node], ir.output(body).args[0])[i])
        if why is None and own.branch is not None:
            why = f"branch {own.branch}"
        if why is not None:
            found[node] = why
    return found


def _halves(pair: fx.Node, scope: Scope) -> Iterator[Fault]:
    found: dict[int, str | None] = {}
    for user in pair.users:
        if user.target is operator.getitem and user in scope.metas:
            found[int(user.args[1])] = scope.metas[user].branch  # type: ignore[arg-type]
    marks = [found.get(i, "unused") for i in (0, 1)]
    if any(m not in (None, want) for m, want in zip(marks, "+-", strict=True)):
        advice = "take element 0 for branch + and element 1 for branch -"
        base = scope.name(_argument(pair, "base"))
        expected = f"both halves of the noise of {base}, + and -"
        yield Fault(pair, expected, f"{marks[0]} and {marks[1]}", advice)


def _is_materialize(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, OpOverload)
        and target.namespace == "zograph"
        and str(target._opname).startswith("materialize")
    )


def _is_pair(node: fx.Node) -> bool:
    return _is_materialize(node) and isinstance(node.meta.get("val"), (tuple, list))


def _is_item_of_both(node: fx.Node, scope: Scope) -> bool:
    """Whether the node takes an element of a stage's or a pair's result."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    source = node.args[0]
    record = scope.metas.get(source)
    return _is_pair(source) or (record is not None and record.kind is ir.Kind.STAGE)


def _argument(node: fx.Node, name: str) -> Any:
    target = node.target
    assert isinstance(target, OpOverload)
    for i, argument in enumerate(target._schema.arguments):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name)
    return None
