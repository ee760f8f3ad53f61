"""anderson: every fixed point becomes a solve by Anderson mixing or by forward iteration."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from zograph.errors import OptionError, PassError
from zograph.fixed_points.nodes import anderson_solve, fixed_point, picard_solve
from zograph.ir import Kind, annotate, call, info, meta, placeholders
from zograph.passes.base import Contract, Pass, PassContext, PassResult

MODES = ("auto", "always", "off")
SOLVES: dict[str, Callable[..., Any]] = {"anderson": anderson_solve, "picard": picard_solve}
STOPPING = ("tol", "max_iter", "stop")
"""The options of every solve; the others are those of mixing."""


@dataclass(frozen=True)
class Anderson(Pass):
    """Decide how each fixed point is solved, and write it into the graph.

    Before::

        %fixed_point: (f32[s0, 8], ...) = fixed_point(%cell, (%z0,), (%w,), solver='auto', ...)

    After::

        %anderson_solve: (f32[s0, 8], ...) = anderson_solve(%cell, (%z0,), (%w,), window=5, ...)

    Where the context mixes the trajectory, the seed says so; a step's graph is the same otherwise::

        %seed: i64[] = input  # mixing=16 directions x 8 steps, window 7

    A call that names its solver gets it. Where ``solver="auto"``, the mode says: ``always`` mixes,
    ``off`` iterates forward, ``auto`` does what the context's `solvers` has for this fixed point,
    and mixes where it has nothing. Nothing is measured here: the pass `trial` makes a graph that
    does, which runs before the first step, and what it finds is recorded before it decides bits. A
    fixed point goes by the path of the module that calls it, the second one of a module by the path
    with ``#1`` behind; both branches get the same solver.

    Requires: ``partitioned``. Ensures: fact ``solved``; no undecided fixed point ahead of
    ``outline``; a warning where a tolerance is looser than eps. Numerics: changes, by no more than
    the solver's tolerance. Cost: O(nodes); a solve by mixing takes twice the window in states.
    Raises: PassError if `solvers` names no solver. Reference: Walker and Ni 2011.
    """

    mode: Literal["auto", "always", "off"] = "auto"

    name: ClassVar[str] = "anderson"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"partitioned"}),
        provides=frozenset({"solved"}),
        numerics="changes",
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise OptionError(f"mode={self.mode!r} is unknown; use one of {', '.join(MODES)}.")

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        found = Counter[str]()
        for node, name in fixed_points(gm).items():
            solver = self.solver_of(node, name, ctx)
            check_tolerance(gm, node, ctx.eps)
            rewrite(gm, node, solver)
            found[solver] += 1
        if found:
            gm.recompile()
        notes = [f"{n} solves by {solver}" for solver, n in sorted(found.items())]
        mixing = share_directions(gm, ctx)
        notes += [f"the trajectory: {mixing}"] if mixing else []
        return PassResult(gm, bool(found or mixing), tuple(notes))

    def solver_of(self, node: fx.Node, name: str, ctx: PassContext) -> str:
        """Return the solver of a fixed point."""
        asked = str(node.kwargs["solver"])
        if asked != "auto":
            return asked
        if self.mode != "auto":
            return "anderson" if self.mode == "always" else "picard"
        decided = ctx.solvers.get(name, "anderson")
        if decided not in SOLVES:
            raise PassError(
                f"anderson: the solver recorded for the fixed point {name!r} is {decided!r}; it "
                f"must be one of {', '.join(SOLVES)}."
            )
        return decided


def share_directions(gm: fx.GraphModule, ctx: PassContext) -> str:
    """Say of the seed's input which steps share it; return that, empty if nothing changed."""
    if ctx.mixing is None:
        return ""
    m = ctx.mixing
    words = f"{m.directions} directions x {m.inner_steps} steps, window {m.window}"
    for node in placeholders(gm, Kind.NOISE):
        if meta(node).name == "seed" and meta(node).mixing != words:
            annotate(node, mixing=words)
            return words
    return ""


def fixed_points(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """Return the undecided fixed points in order, each with the name that its decision goes by.

    A graph of one branch has the names of one with two, whose hoisted nodes belong to both.
    """
    count: Counter[Any] = Counter()
    found = {}
    for node in gm.graph.nodes:
        if node.target is fixed_point:
            record = meta(node)
            path = record.module[-1][0] if record.module else ""
            path = path.removeprefix("L__self__").removeprefix("model").lstrip(".") or "model"
            branches = (record.branch,) if record.branch else ("+", "-")
            number = count[path, branches[0]]
            count.update((path, branch) for branch in branches)
            found[node] = f"{path}#{number}" if number else path
    return found


def open_points(gm: fx.GraphModule, known: Container[str]) -> dict[fx.Node, str]:
    """Return the fixed points that leave their solver open and are not among the known ones."""
    points = fixed_points(gm).items()
    return {n: name for n, name in points if n.kwargs["solver"] == "auto" and name not in known}


def check_tolerance(gm: fx.GraphModule, node: fx.Node, eps: float | None) -> None:
    """Warn where what a solve leaves undone may be as large as what a perturbation does."""
    tol = float(node.kwargs["tol"])  # type: ignore[arg-type]
    if "dual" in info(gm).facts and eps is not None and tol > eps:
        warnings.warn(
            f"a fixed point is solved to tol={tol:g}, which is looser than eps={eps:g}: the two "
            f"losses of a step may differ by where their solves stop. Use tol={eps / 10:g}.",
            stacklevel=2,
        )


def rewrite(gm: fx.GraphModule, node: fx.Node, solver: str) -> None:
    """Replace an undecided fixed point by a solve."""
    options = {k: v for k, v in node.kwargs.items() if k != "solver"}
    if solver == "picard":
        options = {k: options[k] for k in STOPPING}
    with gm.graph.inserting_before(node):
        solve = call(
            gm.graph,
            SOLVES[solver],
            node.args,
            options,
            source=f"anderson<{node.name}",
            like=node,
        )
    node.replace_all_uses_with(solve)
    gm.graph.erase_node(node)
