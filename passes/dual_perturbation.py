"""dual_perturbation: one forward becomes two, at theta + eps z and theta - eps z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings, free_unbacked_symbols
from torch.utils import _pytree as pytree

import zograph.ops  # noqa: F401  (registers zograph::materialize_one)
from zograph.errors import PassError
from zograph.ir import (
    KEY,
    Branch,
    Kind,
    annotate,
    call,
    evaluate,
    fake_mode,
    info,
    meta,
    output,
    placeholder,
    placeholders,
)
from zograph.passes.base import Contract, Pass, PassContext, PassResult

SIGNS: dict[Branch, int] = {"+": 1, "-": -1}


@dataclass(frozen=True)
class DualPerturbation(Pass):
    """Copy what depends on trainable weights into a + and a - branch.

    Before::

        %linear: f32[s0, 8] = aten.linear(%x, %w)                                # stage=1
        return (%loss, %linear)

    After::

        %w_p: f32[8, 8] = zograph.materialize_one(%w, ..., sign=1)               # branch=+
        %linear: f32[s0, 8] = aten.linear(%x, %w_p)                              # branch=+
        %w_m: f32[8, 8] = zograph.materialize_one(%w, ..., sign=-1)              # branch=-
        %linear_1: f32[s0, 8] = aten.linear(%x, %w_m)                            # branch=-
        return (%loss, %loss_1)

    Requires: ``hoisted``. Ensures: fact ``dual``; the output is (loss+, loss-) and nothing
    that they do not need remains; hoisted nodes are shared; no node of one branch uses one
    of the other; a weight is perturbed once per stage and branch, right before its use. New
    inputs: ``seed``, ``eps``, the pending terms ``seeds``, ``coefs``, ``scales`` of length
    `terms`, and per stage a table ``keys.N`` of noise keys and first indices, so that equal
    stages stay equal. Numerics: changes. Cost: O(nodes); twice the activations. Raises: PassError
    if the loss depends on no trainable weight. Reference: Malladi et al. 2023 (MeZO), algorithm 1.
    """

    terms: int = 0
    """Number of pending terms that a weight carries beside its base."""

    name: ClassVar[str] = "dual_perturbation"
    contract: ClassVar[Contract] = Contract(
        requires=frozenset({"hoisted"}), provides=frozenset({"dual"}), numerics="changes"
    )

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if placeholders(gm, Kind.NOISE):
            return PassResult(gm, False, ("the graph has its two branches already",))
        loss = output(gm).args[0][0]  # type: ignore[index]
        if not info(gm).has_loss or not isinstance(loss, fx.Node) or meta(loss).hoisted:
            raise PassError(
                "dual_perturbation: the loss depends on no trainable parameter, so both branches "
                "would be equal. Check requires_grad and that the loss uses the model's output."
            )
        output(gm).args = ((loss,),)
        gm.graph.eliminate_dead_code()
        originals = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
        Branches(gm, ctx, self.terms).build(originals, loss)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return PassResult(gm, True)


class Branches:
    """The rewrite's state: noise inputs and the copies made so far."""

    def __init__(self, gm: fx.GraphModule, ctx: PassContext, terms: int) -> None:
        self.gm, self.ctx = gm, ctx
        params = info(gm).params
        self.trainable = {
            n: params[str(meta(n).name)]
            for n in placeholders(gm, Kind.PARAMETER)
            if params[str(meta(n).name)].trainable
        }
        self.device = next(iter(self.trainable)).meta["val"].device
        self.common = [
            self.noise_input(name, dtype, shape)
            for name, dtype, shape in (
                ("seeds", torch.int64, (terms,)),
                ("coefs", torch.float32, (terms,)),
                ("scales", torch.float32, (terms,)),
                ("seed", torch.int64, ()),
                ("eps", torch.float32, ()),
            )
        ]
        self.copies: dict[Branch, dict[fx.Node, fx.Node]] = {"+": {}, "-": {}}
        self.perturbed: dict[tuple[fx.Node, int, Branch], fx.Node] = {}
        self.keys: dict[int, fx.Node] = {}

    def noise_input(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> fx.Node:
        with fake_mode(self.gm):
            val = torch.empty(shape, dtype=dtype, device=self.device)
        return placeholder(self.gm, name, val, kind=Kind.NOISE, source="dual_perturbation")

    def build(self, originals: list[fx.Node], loss: fx.Node) -> None:
        """Replace the branched nodes by their copies and return both losses."""
        casts = {n for n in originals if self.is_cast(n)}
        self.reserve_keys(originals, casts)
        branched = [n for n in originals if not meta(n).hoisted and meta(n).stage is not None]
        for node in branched:
            for branch in SIGNS:
                if node not in casts:
                    with self.gm.graph.inserting_before(node):
                        self.copies[branch][node] = self.copy(node, branch, casts)
        output(self.gm).args = ((self.copies["+"][loss], self.copies["-"][loss]),)
        for node in reversed(branched):
            self.gm.graph.erase_node(node)

    def is_cast(self, node: fx.Node) -> bool:
        """Whether the node casts a trainable weight to the compute dtype."""
        to_copy = node.target is torch.ops.aten._to_copy.default
        return to_copy and node.args[0] in self.trainable and set(node.kwargs) == {"dtype"}

    def reserve_keys(self, originals: list[fx.Node], casts: set[fx.Node]) -> None:
        """Give every stage a table with the keys of the weights that it perturbs."""
        used: dict[int, dict[str, None]] = {}
        for node in originals:
            for source in node.all_input_nodes:
                weight = source.args[0] if source in casts else source
                if weight in self.trainable and node not in casts:
                    names = used.setdefault(int(meta(node).stage or 0), {})
                    names[self.trainable[weight].name] = None  # type: ignore[index]
        for stage, names in sorted(used.items()):
            self.keys[stage] = self.noise_input(f"keys.{stage}", torch.int64, (len(names), 2))
            info(self.gm).keys[stage] = tuple(names)

    def copy(self, node: fx.Node, branch: Branch, casts: set[fx.Node]) -> fx.Node:
        """Copy a node into a branch, its weights perturbed."""

        def argument(arg: fx.Node) -> fx.Node:
            weight = arg.args[0] if arg in casts else arg
            if weight in self.trainable:
                assert isinstance(weight, fx.Node)
                return self.perturb(weight, arg.meta["val"].dtype, node, branch)
            return self.copies[branch].get(arg, arg)

        args: Any = fx.node.map_arg(node.args, argument)
        kwargs: Any = fx.node.map_arg(node.kwargs, argument)
        new = self.gm.graph.create_node(node.op, node.target, args, kwargs)
        new.meta = dict(node.meta)
        leaves = [x for x in pytree.tree_leaves(node.meta["val"]) if isinstance(x, torch.Tensor)]
        if branch == "-" and any(free_unbacked_symbols(x) for x in leaves):
            new.meta["val"] = evaluate(node.target, args, kwargs)  # type: ignore[arg-type]
            env = fake_mode(self.gm).shape_env
            new.meta["unbacked_bindings"] = compute_unbacked_bindings(env, new.meta["val"])
        new.meta[KEY] = meta(node)
        annotate(new, branch=branch, source=f"dual_perturbation<{node.name}")
        return new

    def perturb(
        self, weight: fx.Node, dtype: torch.dtype, user: fx.Node, branch: Branch
    ) -> fx.Node:
        """Return w+ or w- for a user, made once per stage and branch."""
        stage = int(meta(user).stage or 0)
        made = self.perturbed.get((weight, stage, branch))
        if made is None:
            seeds, coefs, scales, seed, eps = self.common
            param = self.trainable[weight]
            slot = info(self.gm).keys[stage].index(param.name)
            probe = (self.keys[stage], slot, seed, eps)
            tail = (dtype, self.ctx.distribution, param.decay, SIGNS[branch])
            made = self.perturbed[weight, stage, branch] = call(
                self.gm.graph,
                torch.ops.zograph.materialize_one.default,
                (weight, seeds, coefs, scales, *probe, *tail),
                source=f"dual_perturbation<{weight.name}",
                like=None,
                stage=stage,
                branch=branch,
                module=meta(user).module,
            )
        return made
