"""From a budget to a layout: how finely to cut, what stays on the device, how large the slots are.

The cut is chosen by bytes alone, never by time: with Inductor it has a say in bits
(docs/numerics.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import fx
from torch.utils import _pytree as pytree

from zograph.costs import Costs
from zograph.device import DeviceSpec
from zograph.errors import PlanError
from zograph.ir import Kind, info, meta, output, placeholders
from zograph.layout import Layout, StageUse, Tier, most_copies, working_bytes
from zograph.meter import Cost, Sizes, value_bytes
from zograph.schedule.memory import aligned
from zograph.stores.base import padded

Budget = int | Literal["minimum"] | None
"""Bytes; the smallest that is enough; or no limit."""


@dataclass(frozen=True)
class Request:
    """What a layout is wanted for."""

    budget: Budget
    frames: tuple[Sizes, ...]
    """The sizes of every forward that goes through the graph in one step."""
    tier: Tier
    spec: DeviceSpec
    keep: frozenset[str] = frozenset()
    """Parameters on the device already: they stay where the budget allows it."""
    fold_every: int = 1
    """Steps from one write of a streamed weight to the next."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a step: a cut, and which copies are made one after the other."""

    gm: fx.GraphModule
    cut: int | None
    pair: int | None
    uses: tuple[StageUse, ...]
    fixed: int
    copies: int = 0
    """As in :class:`zograph.layout.Layout`."""

    @cached_property
    def _held(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """The weights of each stage, with their slot bytes."""
        params = info(self.gm).params
        return tuple(tuple((n, padded(params[n].stored_bytes)) for n in u.weights)
                     for u in self.uses)  # fmt: skip

    def weights(self) -> frozenset[str]:
        """Return the parameters that a step visits."""
        return frozenset(n for u in self.uses for n in u.weights)

    def units(self, resident: frozenset[str] = frozenset()) -> list[int]:
        """Return the slot bytes of each stage's streamed weights."""
        return [sum(size for n, size in held if n not in resident) for held in self._held]

    def decoded(self) -> int:
        """Return the bytes of the most that a stage decodes, wherever it is stored."""
        params = info(self.gm).params
        encoded = {n: padded(p.bytes) for n, p in params.items() if p.format is not None}
        return max((sum(encoded.get(n, 0) for n in u.weights) for u in self.uses), default=0)

    def activations(self) -> int:
        """Return the bytes that neither weights nor slots take, at their highest."""
        return self.fixed + self.decoded() + working_bytes(self.uses, self.copies)

    def minimum(self) -> int:
        """Return the least budget: one stage's weights at a time, nothing fetched ahead."""
        return self.activations() + max(self.units(), default=0)

    def overlapped(
        self, resident: frozenset[str] = frozenset(), *, depth: int = 2, every: bool = False
    ) -> int:
        """Return the slot bytes that hold the weights of `depth` stages in a row.

        With two, the next stage's weights arrive under a stage; with three, the last one's
        leave at the same time. A stage that is one of a kind, such as a head, may hold more
        than one of the repeated ones; it is fetched alone unless `every`.
        """
        units = self.units(resident)
        count, usual = len(units), max(units, default=0)
        if not every:
            times = Counter(u.body for u in self.uses)
            repeated = [n for n, u in zip(units, self.uses, strict=True) if times[u.body] > 1]
            usual = max(repeated, default=usual)
        most = usual
        for first in range(count):
            row = [units[(first + i) % count] for i in range(min(depth, count))]
            if max(row) <= usual:
                most = max(most, sum(map(aligned, row)))
        return max([*units, most], default=0)

    def depth(self) -> int:
        """Return how many stages have weights on the device at once when all overlaps.

        One computes while another arrives and, where weights are written back, a third leaves.
        """
        params = info(self.gm).params
        folded = "dual" in info(self.gm).facts
        return 3 if folded and any(params[n].trainable for n in self.weights()) else 2

    def total(self) -> int:
        """Return the bytes of all weights that a step visits."""
        params = info(self.gm).params
        return sum(padded(params[n].stored_bytes) for n in self.weights())

    def unrounded(self, request: Request) -> list[str]:
        """List the weights that cannot be folded where they stand: it would round them too often.

        Those are the ones narrower than float32, where the fold period is longer than a step, and
        not stored in a format: these are decoded in memory of their own.
        """
        if request.fold_every == 1:
            return []
        table = info(self.gm).params.items()
        return [n for n, p in table if p.trainable and p.dtype.itemsize < 4 and p.format is None]

    def roomy(self, budget: int) -> bool:
        """Return whether all weights fit, or those of two stages in a row."""
        return self.activations() + min(self.overlapped(), self.total()) <= budget


class Ways:
    """The candidates of one graph at given sizes: found when asked for, then kept.

    They depend on neither budget nor device, so one object serves several requests.

    Parameters
    ----------
    outlined
        As in :func:`choose`.
    frames
        As in :class:`Request`.
    """

    def __init__(
        self, outlined: Callable[[int | None], fx.GraphModule], frames: tuple[Sizes, ...]
    ) -> None:
        self.outlined, self.frames = outlined, frames
        self._costs = Costs(frames)
        self._found: dict[int | None, tuple[Candidate, ...]] = {}

    def at(self, cut: int | None) -> tuple[Candidate, ...]:
        """Return the candidates of a cut, from all pairs of copies to one copy at a time."""
        if cut not in self._found:
            self._found[cut] = tuple(candidates(self.outlined(cut), cut, self._costs))
        return self._found[cut]

    def cuts(self) -> list[int | None]:
        """List the cuts, from whole blocks to the finest."""
        return [None, *finer_cuts(self.at(None)[0].gm)]


def choose(outlined: Callable[[int | None], fx.GraphModule], request: Request) -> Layout:
    """Choose the layout of a step.

    Parameters
    ----------
    outlined
        Returns the outlined graph for a cut (see :class:`zograph.passes.PassContext`).

    Raises
    ------
    PlanError
        If the budget is too small; its `minimum` is the least that is enough.
    """
    return chosen(Ways(outlined, request.frames), request)


def chosen(ways: Ways, request: Request) -> Layout:
    """Choose the layout of a step among known ways; see :func:`choose`."""
    if request.budget is None:
        whole = ways.at(None)[0]
        return layout(whole, request, whole.weights(), 0)
    if isinstance(request.budget, int):
        for cut in ways.cuts():
            for candidate in ways.at(cut):
                if candidate.roomy(request.budget):
                    return filled(candidate, request, request.budget)
    found = [candidate for cut in ways.cuts() for candidate in ways.at(cut)]
    minimum = min(c.minimum() for c in found)
    budget = minimum if request.budget == "minimum" else request.budget
    for candidate in found:
        if candidate.minimum() <= budget:
            return filled(candidate, request, budget)
    raise PlanError(explain(found, budget, minimum), minimum)


def candidates(gm: fx.GraphModule, cut: int | None, costs: Costs) -> Iterator[Candidate]:
    """Yield the ways to make perturbed copies, from all pairs to one copy at a time."""
    uses, fixed = examine(gm, costs, None), fixed_bytes(gm, costs.frames)
    yield Candidate(gm, cut, None, uses, fixed)
    copies = sorted({n for u in uses for n in u.cost.copies})
    for pair in sorted({copies[-1] - 1, 0}, reverse=True) if copies else ():
        yield Candidate(gm, cut, pair, examine(gm, costs, pair), fixed)


def finer_cuts(gm: fx.GraphModule) -> list[int]:
    """List cuts from half the largest stage down to the largest operator's weights."""
    params = info(gm).params
    stages, single = [0], 1
    for node in stage_nodes(gm):
        stages.append(sum(params[n].bytes for n in weights_of(node)))
        single = max([single, *(params[n].bytes for n in weights_of(node))])
    cuts, size = [], max(stages) // 2
    while size > single:
        cuts.append(size)
        size //= 2
    return [*cuts, single] if max(stages) > single else []


def filled(candidate: Candidate, request: Request, budget: int) -> Layout:
    """Use what the budget leaves for slots that work side by side, then for weights that stay.

    Ahead of these weights come, on a CPU, perturbed copies whose memory is kept.
    """
    depth, ways = candidate.depth(), [candidate]
    if request.spec.kind == "cpu":
        ways.insert(0, replace(candidate, copies=most_copies(candidate.uses)))
    if not candidate.unrounded(request):
        for way in ways:
            if way.total() <= budget - way.activations():
                return layout(way, request, way.weights(), 0)
    roomy = (w for w in ways if w.overlapped(depth=depth) <= budget - w.activations())
    candidate = next(roomy, candidate)
    room = budget - candidate.activations()
    if candidate.overlapped() > room:
        return layout(candidate, request, frozenset(), room)
    sizes = {n: padded(p.stored_bytes) for n, p in info(candidate.gm).params.items()}
    while candidate.overlapped(depth=depth) > room:
        depth -= 1
    every = candidate.overlapped(depth=depth, every=True) <= room
    resident: frozenset[str] = frozenset()
    held = 0
    for name in in_order_of_worth(candidate, request):
        more = resident | {name}
        if held + sizes[name] + candidate.overlapped(more, depth=depth, every=every) <= room:
            resident, held = more, held + sizes[name]
    return layout(candidate, request, resident, room - held)


def in_order_of_worth(candidate: Candidate, request: Request) -> list[str]:
    """List parameters by what keeping them saves: those of several visits first, spread evenly.

    A weight that cannot be folded where it stands is no candidate.

    The stages take turns in an order that spreads over the whole step, so that every part of
    it has about the same share of its weights to fetch.
    """
    visits: dict[str, int] = {}
    rank: dict[str, tuple[int, int]] = {}
    turns = spread(len(candidate.uses))
    for turn, use in zip(turns, candidate.uses, strict=True):
        for place, name in enumerate(use.weights):
            visits[name] = visits.get(name, 0) + 1
            rank.setdefault(name, (place, turn))
    for name in candidate.unrounded(request):
        rank.pop(name, None)
    return sorted(rank, key=lambda n: (n not in request.keep, -visits[n], rank[n]))


def spread(count: int) -> list[int]:
    """Return a turn for each of `count` places, such that early turns are far apart."""
    bits = max(1, (count - 1).bit_length())
    reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(count)]
    order = sorted(range(count), key=reverse.__getitem__)
    return [order.index(i) for i in range(count)] if count < 2048 else reverse


def layout(candidate: Candidate, request: Request, resident: frozenset[str], slots: int) -> Layout:
    """Write a decision down."""
    largest, params = candidate.overlapped(resident, every=True), info(candidate.gm).params
    return Layout(
        tier=request.tier,
        spec=request.spec,
        budget=request.budget,
        resident=resident,
        held=sum(padded(params[n].stored_bytes) for n in resident),
        slots=min(slots, 2 * largest),
        pair=candidate.pair,
        cut=candidate.cut,
        fixed=candidate.fixed,
        uses=candidate.uses,
        fold_every=request.fold_every,
        decoded=candidate.decoded(),
        copies=candidate.copies,
    )


def explain(found: Sequence[Candidate], budget: int, minimum: int) -> str:
    """Return the message of an infeasible budget."""
    best = min(found, key=Candidate.minimum)
    use = max(best.uses, key=lambda u: u.peak)
    name = info(best.gm).stages.get(use.stage, "unused weights")
    decoded = f"{best.decoded():,} weights that it decodes, " if best.decoded() else ""
    return (
        f"memory={budget:,} bytes is too small: this batch needs {minimum:,} bytes at least. Of "
        f"these, {max(best.units()):,} are the weights of the largest stage, {decoded}"
        f"{use.cost.scratch_at_peak:,} perturbed copies and "
        f"{use.peak - use.cost.scratch_at_peak:,} "
        f"activations (of {name}), {best.fixed:,} the batch and buffers. Pass a larger budget, a "
        f'smaller batch or memory="minimum".'
    )


def stage_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """List the calls of stage bodies, in order."""
    return [n for n in gm.graph.nodes if meta(n).kind == Kind.STAGE]


def weights_of(node: fx.Node) -> list[str]:
    """List the parameters that a stage is called with."""
    return [str(meta(s).name) for s in node.all_input_nodes if meta(s).kind == Kind.PARAMETER]


def examine(gm: fx.GraphModule, costs: Costs, pair: int | None) -> tuple[StageUse, ...]:
    """Measure every stage of an outlined graph at the given sizes, on fake tensors."""
    bodies: dict[str, list[Cost]] = {}
    for node in stage_nodes(gm):
        if str(node.target) not in bodies:
            body = gm.get_submodule(str(node.target))
            assert isinstance(body, fx.GraphModule)
            bodies[str(node.target)] = costs.of(body, pair)
    alive = live_values(gm, costs.frames)
    uses = []
    for node in stage_nodes(gm):
        found = bodies[str(node.target)]
        results = [c.result_bytes for c in found]
        cost = replace(
            max(found, key=lambda c: c.peak_bytes),
            work=tuple(w for c in found for w in c.work),
            noise=sum(c.noise for c in found),
        )
        live = alive[node] + sum(results) - min(results)
        target, weights = str(node.target), tuple(weights_of(node))
        uses.append(StageUse(int(meta(node).stage or 0), target, weights, live, cost))
    unused = unused_weights(gm)
    first = max((u.stage for u in uses), default=0) + 1
    return (*uses, *(StageUse(first + i, None, (n,), 0, Cost()) for i, n in enumerate(unused)))


def unused_weights(gm: fx.GraphModule) -> list[str]:
    """List the trainable parameters that a step must update although no stage uses them."""
    if "dual" not in info(gm).facts:
        return []
    used = {n for node in stage_nodes(gm) for n in weights_of(node)}
    return [n for n, p in info(gm).params.items() if p.trainable and n not in used]


def live_values(gm: fx.GraphModule, frames: Sequence[Sizes]) -> dict[fx.Node, int]:
    """Return, for each stage, the bytes that other stages made and that must outlive its start."""
    nodes = list(gm.graph.nodes)
    position = {n: i for i, n in enumerate(nodes)}
    results = set(output(gm).all_input_nodes)
    spans = []
    for node in nodes:
        if node.op == "placeholder" or node.op == "output" or meta(node).kind == Kind.STAGE:
            continue
        end = len(nodes) if node in results else max(map(position.__getitem__, node.users))
        spans.append((position[node], end, sum(value_bytes(node.meta["val"], f) for f in frames)))
    calls = stage_nodes(gm)
    return {
        s: sum(n for begin, end, n in spans if begin < position[s] <= end) for s in calls
    }  # fmt: skip


def fixed_bytes(gm: fx.GraphModule, frames: Sequence[Sizes]) -> int:
    """Return the bytes of buffers, constants and tables once, and of every batch."""
    stored = placeholders(gm, Kind.BUFFER, Kind.CONSTANT, Kind.NOISE)
    total = sum(value_bytes(n.meta["val"], frames[0]) for n in stored if n.users)
    inputs = pytree.tree_leaves([n.meta["val"] for n in placeholders(gm, Kind.INPUT)])
    return total + sum(value_bytes(v, sizes) for v in inputs for sizes in frames)
