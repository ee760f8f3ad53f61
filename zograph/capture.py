"""From a model and a batch's signature to a functional ATen graph of the loss.

`torch.export` (non-strict) traces a *fake copy* of the model: same modules, every parameter
and buffer a fake tensor of the wanted dtype on the wanted device. The user's model is neither
moved, cast, switched to eval mode nor otherwise touched, and no weight is read.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from zograph.deciding import Decisions, split_decisions
from zograph.errors import CaptureError, ZographError, first_line
from zograph.faking import castable, fake_copy, placed
from zograph.fixed_points.entering import enter_cells
from zograph.fixed_points.tracing import TracedCell, tracing_cells
from zograph.ir import KEY, GraphInfo, Kind, NodeMeta, fake_mode, info, placeholders
from zograph.memory import uncollected
from zograph.parameters import parameter_table
from zograph.pieces import enter_in_pieces
from zograph.signature import Signature, flatten, sizes
from zograph.silence import silenced
from zograph.traced import ForwardFailed, LossFn, Traced, fixed

KEPT = ("val", KEY, "unbacked_bindings")
"""What stays of the metadata that export leaves on a node; the rest takes megabytes."""


@dataclass
class Capture:
    """A captured graph and how to feed it."""

    gm: fx.GraphModule
    signature: Signature
    symbols: dict[str, sympy.Symbol]
    """The graph's symbol for each symbolic dimension of the signature."""
    ranges: dict[str, tuple[int, float]]
    """For each symbolic dimension of the signature, the sizes that the graph admits."""
    constants: dict[str, torch.Tensor]
    decisions: Decisions | None
    guards: tuple[sympy.Basic, ...]
    """What export demands of the symbols. What Inductor assumes at the hints is not among
    it, since it tells so only on a cold cache (docs/decisions/002-hints.md)."""
    _admitted: dict[tuple[int, ...], bool] = field(default_factory=dict)

    def admits(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch of the signature satisfies all ranges, guards and decisions."""
        return self._fits(sizes(self.signature, batch)) and (
            self.decisions is None or self.decisions.hold(dict(flatten(batch)[0]))
        )

    def _fits(self, sizes: Mapping[str, int]) -> bool:
        if not all(low <= sizes[s] <= high for s, (low, high) in self.ranges.items()):
            return False
        values = {symbol: sizes[name] for name, symbol in self.symbols.items()}
        if any(values[symbol] != sizes[name] for name, symbol in self.symbols.items()):
            return False  # export found that two dimensions must be equal
        key = tuple(values.values())
        if key not in self._admitted:
            self._admitted[key] = all(g.xreplace(values) != sympy.false for g in self.guards)
        return self._admitted[key]


def _no_graph(model: nn.Module, sig: Signature, error: Exception) -> CaptureError:
    """Say what went wrong, where, and what to do."""
    return CaptureError(
        f"{type(model).__name__} could not be captured for ({sig}): "
        f"{type(error).__name__}: {first_line(error)}"
        f"{_user_line(error)}\n"
        f"A graph needs a forward whose branches, loops and sizes do not depend on weights. "
        f"Replace them by torch.where, torch.cond or fixed sizes, or choose another attention or "
        f"experts implementation in the model's config."
    )


def _user_line(error: BaseException) -> str:
    """Return `file:line: code` of the deepest frame outside torch and zograph."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.lineno is not None]
    for frame in reversed(frames):
        if not frame.filename.startswith(own) and Path(frame.filename).exists():
            return f"\n  at {frame.filename}:{frame.lineno}: {frame.line}"
    return ""


def _export(traced: Traced, batch: dict[str, Any], sig: Signature) -> torch.export.ExportedProgram:
    """Export with one named dimension per symbol, its range narrowed where export asks for it."""
    from torch._dynamo.exc import UserError  # slow to import

    dims: dict[str, Any] = {}
    for leaf in sig.leaves:
        dims |= {s: Dim(s, min=2) for s in leaf.sizes if isinstance(s, str) and s not in dims}
    shapes = [
        {d: dims[s] for d, s in enumerate(leaf.sizes) if isinstance(s, str)} or None
        for leaf in sig.leaves
    ]
    dynamic: Any = (pytree.tree_unflatten(shapes, pytree.tree_structure(batch)),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ep = torch.export.export(traced, (batch,), dynamic_shapes=dynamic, strict=False)
        except UserError as error:
            if "Suggested fixes" not in str(error):
                raise
            fixes = str(error).partition("\n\n")[0]  # what follows is no suggestion
            dynamic = refine_dynamic_shapes_from_suggested_fixes(fixes, dynamic)
            ep = torch.export.export(traced, (batch,), dynamic_shapes=dynamic, strict=False)
        ops = [n.target for n in ep.graph.nodes if n.op == "call_function"]
        if any(isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable for op in ops):
            ep = ep.run_decompositions({})  # functionalise, keep composite operators
    return ep


@uncollected()
def capture(
    model: nn.Module,
    batch: Mapping[str, Any],
    sig: Signature,
    *,
    loss_fn: LossFn | None = None,
    want_loss: bool = True,
    device: torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Capture:
    """Trace the loss (and every other output) of `model` for batches of one signature.

    Parameters
    ----------
    model
        Any module; left as it is.
    batch
        Only its structure is used: the sizes come from the signature's stand-ins. At the level
        ``values`` the forward may also ask for the values of what depends on batch and buffers.
    loss_fn
        ``loss_fn(model, **batch) -> loss``; by default the loss is the model's own.
    want_loss
        False captures the outputs alone, for evaluation without labels.
    device, compute_dtype
        Where and in what floating dtype the graph computes. Parameters enter the graph in
        their own dtype and are cast inside.

    Returns
    -------
    Capture
        A functional graph with explicit parameters; its output is (loss, *outputs).

    Raises
    ------
    CaptureError
        If export fails or there is no scalar loss.
    """
    device = device or torch.device("cpu")
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    values = (batch, buffers) if sig.level == "values" else None
    traced = Traced(fake_copy(model, mode, device, compute_dtype), loss_fn, want_loss, values)
    with mode:
        leaves = [leaf.stand_in(sig.level) for leaf in sig.leaves]
        leaves = [placed(x, device, compute_dtype) for x in leaves]
    stand_ins = pytree.tree_unflatten(leaves, pytree.tree_structure(dict(batch)))
    try:
        no_use = silenced("torch.fx.experimental.symbolic_shapes", "Unable to find user code")
        with tracing_cells() as cells, castable(traced), no_use:
            ep = _export(traced, stand_ins, sig)
    except ZographError:
        raise
    except ForwardFailed as failed:
        raise _no_graph(model, sig, failed.error) from failed.error
    except Exception as error:  # torch.export's own
        raise _no_graph(model, sig, error) from error
    return _finish(model, ep, traced, sig, cells)


def _finish(
    model: nn.Module,
    ep: torch.export.ExportedProgram,
    traced: Traced,
    sig: Signature,
    cells: list[TracedCell],
) -> Capture:
    """Annotate the exported graph, restore base dtypes and read off the ranges."""
    gm = ep.graph_module
    signature = ep.graph_signature
    first_names = {id(p): name for name, p in model.named_parameters()}
    own = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    constants: dict[str, torch.Tensor] = {}
    leaves = iter(sig.leaves)
    base: dict[str, torch.dtype] = {}
    tied: dict[str, fx.Node] = {}
    for node, spec in zip(placeholders(gm), signature.input_specs, strict=True):
        target = (spec.target or "").removeprefix("model.")
        match spec.kind:
            case InputKind.PARAMETER:
                name = first_names[id(own[target])]
                node.meta[KEY] = NodeMeta(Kind.PARAMETER, name, source="capture")
                base[node.name] = own[target].dtype
                first = tied.setdefault(name, node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    gm.graph.erase_node(node)
            case InputKind.BUFFER:
                node.meta[KEY] = NodeMeta(Kind.BUFFER, target, source="capture")
                base[node.name] = buffers[target].dtype
            case InputKind.CONSTANT_TENSOR:
                node.meta[KEY] = NodeMeta(Kind.CONSTANT, spec.target, source="capture")
                constants[str(spec.target)] = ep.constants[str(spec.target)]
            case _:
                leaf = next(leaves)
                node.meta[KEY] = NodeMeta(Kind.INPUT, leaf.path, source="capture")
                if leaf.dtype is not None:
                    base[node.name] = leaf.dtype
    kept = [o for o in signature.output_specs if o.kind == OutputKind.USER_OUTPUT]
    dropped = len(signature.output_specs) - len(kept)  # mutations come first
    out = gm.graph.output_node()
    out.args = (tuple(out.args[0][dropped:]),)
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "output"):
            node.meta.setdefault("val", None)  # assertions
            stack = node.meta.get("nn_module_stack") or {}
            calls = ((key, str(cls)) for key, (_, cls) in stack.items())
            node.meta[KEY] = NodeMeta(module=tuple(calls), source=f"capture<{node.name}")
        node.meta = {k: v for k, v in node.meta.items() if k in KEPT}
    out.meta[KEY] = NodeMeta(Kind.OUTPUT, source="capture")
    enter_cells(gm, cells)
    _restore_base(gm, base)
    gm.meta[KEY] = GraphInfo(params=parameter_table(model), has_loss=traced.want_loss)
    decisions = split_decisions(gm, traced.returned.answers, {**buffers, **constants})
    _record_outputs(info(gm), traced)
    enter_in_pieces(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    symbols = _symbols(gm, sig)
    env = fake_mode(gm).shape_env
    assert env is not None
    guards = tuple(guard.expr for guard in env.guards)
    return Capture(gm, sig, symbols, _ranges(symbols, ep), constants, decisions, guards)


def _record_outputs(record: GraphInfo, traced: Traced) -> None:
    index = int(traced.want_loss)
    where: list[int | None] = []
    for leaf in traced.returned.leaves:
        where.append(index if isinstance(leaf, torch.Tensor) else None)
        index += isinstance(leaf, torch.Tensor)
    fixed = (x for x in traced.returned.leaves if not isinstance(x, torch.Tensor))
    record.out_spec = traced.returned.spec
    record.out_leaves = tuple(where)
    record.out_constants = tuple(fixed)


def _restore_base(gm: fx.GraphModule, base: Mapping[str, torch.dtype]) -> None:
    """Let parameters, buffers and inputs enter in their own dtype; cast right behind them."""
    for node in placeholders(gm, Kind.PARAMETER, Kind.BUFFER, Kind.INPUT):
        val = node.meta["val"]
        dtype = base.get(node.name)
        if dtype is None or val.dtype == dtype:
            continue
        with val.fake_mode:
            node.meta["val"] = torch.empty_strided(
                val.shape, val.stride(), dtype=dtype, device=val.device
            )
        if not node.users:
            continue
        with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op != "placeholder")):
            cast = gm.graph.call_function(torch.ops.aten._to_copy.default, (node,))
        node.replace_all_uses_with(cast)
        cast.args, cast.kwargs = (node,), {"dtype": val.dtype}
        cast.meta["val"] = val
        cast.meta[KEY] = NodeMeta(source=f"capture<{node.name}")


def _symbols(gm: fx.GraphModule, sig: Signature) -> dict[str, sympy.Symbol]:
    """Return the graph's symbol for each symbolic dimension of the signature.

    Raises
    ------
    CaptureError
        If export fixed one of them.
    """
    inputs = {n.meta[KEY].name: n.meta["val"] for n in placeholders(gm, Kind.INPUT)}
    found: dict[str, sympy.Symbol] = {}
    for leaf in sig.leaves:
        for dim, size in enumerate(leaf.sizes):
            if isinstance(size, str) and size not in found:
                actual = inputs[leaf.path].shape[dim]
                if not isinstance(actual, torch.SymInt) or not actual.node.expr.is_symbol:
                    raise CaptureError(fixed(f"dimension {dim} of batch{leaf.path}"))
                found[size] = actual.node.expr
    return found


def _ranges(
    symbols: Mapping[str, sympy.Symbol], ep: torch.export.ExportedProgram
) -> dict[str, tuple[int, float]]:
    """Return the sizes that export admits for each symbolic dimension."""
    ranges: dict[str, tuple[int, float]] = {}
    for name, symbol in symbols.items():
        limit = ep.range_constraints.get(symbol)
        low, high = 2, float("inf")
        if limit is not None:
            low = max(low, int(limit.lower))
            high = float(limit.upper) if limit.upper < 2**31 else high
        ranges[name] = (low, high)
    return ranges
