"""Canonical text of a graph: stable over torch versions, made for people and golden files.

One line per node::

    %relu: f32[2, 3] = aten.relu(%mm)  # stage=3 branch=+ hoisted

Placeholders go by the name in their metadata, other nodes by the short name of the op and a
counter, symbolic sizes by the order in which they appear. Nothing depends on the names that
torch.fx gives to nodes, so a rewrite that leaves the graph equal leaves the text equal.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from zograph import ir

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_SHORT = {
    dtype: prefix_out + str(dtype).removeprefix(f"torch.{prefix_in}")
    for prefix_in, prefix_out in _DTYPES.items()
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and str(dtype).removeprefix(f"torch.{prefix_in}")[:1].isdigit()
} | {torch.bool: "b8"}


def text(gm: fx.GraphModule, *, provenance: bool = False) -> str:
    """Return the canonical text of a graph, stage bodies and cells once each after it.

    Parameters
    ----------
    gm
        The graph. It may be broken: what is missing is printed as ``?``.
    provenance
        Print the ``source`` of each node too.

    Returns
    -------
    str
        Lines joined by newlines, the last one ended.

    Examples
    --------
    >>> from zograph.testing import GraphBuilder
    >>> b = GraphBuilder()
    >>> x = b.input("x", (2, 3))
    >>> print(text(b.build(b.call(torch.ops.aten.sum.default, x))), end="")
    %x: f32[2, 3] = input
    %sum: f32[] = aten.sum(%x)
    return (%sum,)
    """
    printer = Printer(gm, provenance=provenance)
    lines = [line for _, line in printer.lines(gm)]
    for module, stages in printer.bodies.items():
        lines += ["", _header(stages, printer.body_name(module))]
        lines += [f"  {line}" for _, line in printer.lines(module)]
    for module in printer.cells:
        lines += ["", f"cell: {printer.body_name(module)}"]
        lines += [f"  {line}" for _, line in printer.lines(module)]
    return "\n".join(lines) + "\n"


def around(gm: fx.GraphModule, node: fx.Node, lines: int = 3) -> str:
    """Return the text around a node, an arrow before it.

    Parameters
    ----------
    gm
        The graph that `node` stands in (its own graph, not one that holds it as a stage).
    node
        The node to show.
    lines
        How many lines to show before and after it.
    """
    printed = list(Printer(gm).lines(gm))
    at = next((i for i, (n, _) in enumerate(printed) if n is node), None)
    if at is None:
        return f"    {node.name} is not in this graph"
    window = range(max(0, at - lines), min(len(printed), at + lines + 1))
    return "\n".join(("--> " if i == at else "    ") + _clip(printed[i][1]) for i in window)


def summary(gm: fx.GraphModule) -> Counter[str]:
    """Count ops by name in the main graph and, once each, in its stage bodies and cells."""
    count: Counter[str] = Counter()
    for module in graphs(gm):
        for node in module.graph.nodes:
            if node.op == "call_function":
                count[ir.op_name(node)] += 1
            elif node.op == "call_module":
                count["stage"] += 1
    return count


def bodies(gm: fx.GraphModule) -> dict[fx.GraphModule, list[fx.Node]]:
    """Map each distinct stage body to the nodes that call it, in order of first call."""
    found: dict[fx.GraphModule, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if (body := body_of(gm, node)) is not None:
            found.setdefault(body, []).append(node)
    return found


def graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """List the main graph, its stage bodies and its cells, each once."""
    return [gm, *bodies(gm), *cells(gm)]


def cells(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """List the distinct graphs that the main graph and its stage bodies hold as values."""
    found: dict[fx.GraphModule, None] = {}
    for module in [gm, *bodies(gm)]:
        for node in module.graph.nodes:
            if (cell := cell_of(module, node)) is not None:
                found[cell] = None
    return list(found)


def cell_of(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that a node stands for, None if it stands for something else."""
    return _graph(gm, node) if ir.meta(node).kind is ir.Kind.CELL else None


def body_of(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that a stage node runs, through a compiled wrapper if there is one."""
    return _graph(gm, node) if node.op == "call_module" else None


def _graph(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    module: Any = gm
    for atom in str(node.target).split("."):
        module = getattr(module, atom, None)
    for attribute in ("body", "_orig_mod", "module"):
        if isinstance(module, fx.GraphModule):
            return module
        module = getattr(module, attribute, module)
    return module if isinstance(module, fx.GraphModule) else None


class Printer:
    """Names and lines of the graphs of one text.

    Symbols and bodies are numbered over the whole text, nodes within their graph.
    """

    def __init__(self, gm: fx.GraphModule, *, provenance: bool = False) -> None:
        self.bodies, self.cells = bodies(gm), cells(gm)
        self._body_names = {body: f"body{i}" for i, body in enumerate(self.bodies)}
        self._body_names |= {cell: f"cell{i}" for i, cell in enumerate(self.cells)}
        self._provenance = provenance
        self._names: dict[fx.Node, str] = {}
        self._symbols: dict[Any, Any] = {}
        self._expressions: dict[Any, str] = {}

    def body_name(self, body: fx.GraphModule) -> str:
        """Return the name of a stage body or cell in this text."""
        return self._body_names[body]

    def lines(self, gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
        """Yield each node of a graph with its line."""
        self._name_nodes(gm)
        for node in gm.graph.nodes:
            yield node, self._line(gm, node)

    def name(self, node: fx.Node) -> str:
        """Return the canonical name of a node whose graph has been printed."""
        return self._names.get(node, f"%?{node.name}")

    def type(self, val: Any) -> str:
        """Return the text of a fake value's type."""
        if isinstance(val, torch.Tensor):
            sizes = ", ".join(self._int(s) for s in val.shape)
            device = "" if val.device.type == "cpu" else f"@{val.device.type}"
            return f"{_SHORT.get(val.dtype, str(val.dtype))}[{sizes}]{device}"
        if isinstance(val, (tuple, list)):
            inner = ", ".join(self.type(v) for v in val)
            return f"({inner},)" if len(val) == 1 else f"({inner})"
        if val is None:
            return "none"
        for name, kinds in _SCALARS:
            if isinstance(val, kinds):
                return f"{name}({self._int(val)})"
        return type(val).__name__

    def _name_nodes(self, gm: fx.GraphModule) -> None:
        used: set[str] = set()
        counters: Counter[str] = Counter()
        # Placeholders choose first: their names come from the model, not from a counter.
        ordered = sorted(gm.graph.nodes, key=lambda n: n.op != "placeholder")
        for node in ordered:
            base = self._base_name(node)
            while True:
                count = counters[base]
                counters[base] += 1
                name = f"%{base}_{count}" if count else f"%{base}"
                if name not in used:
                    break
            used.add(name)
            self._names[node] = name

    def _base_name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return re.sub(r"\['([^']*)'\]", r".\1", ir.meta(node).name or node.name).lstrip(".")
        if node.op == "call_module":
            return "stage"
        if ir.meta(node).kind is ir.Kind.CELL:
            return "cell"
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return str(target._opname)
        return ir.op_name(node).rsplit(".", 1)[-1]

    def _line(self, gm: fx.GraphModule, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self._arg(node.args[0] if node.args else None)}"
        if (cell := cell_of(gm, node)) is not None:
            return f"{self.name(node)} = {self._body_names[cell]}"
        left = f"{self.name(node)}: {self.type(node.meta['val']) if 'val' in node.meta else '?'}"
        line = f"{left} = {self._call(gm, node)}"
        comment = self._comment(node)
        return f"{line}  # {comment}" if comment else line

    def _call(self, gm: fx.GraphModule, node: fx.Node) -> str:
        record = ir.meta(node)
        if node.op == "placeholder":
            kind = "placeholder" if record.kind is ir.Kind.OP else str(record.kind)
            param = ir.info(gm).params.get(record.name or "")
            frozen = record.kind is ir.Kind.PARAMETER and param is not None and not param.trainable
            return f"frozen {kind}" if frozen else kind
        if node.op == "get_attr":
            return f"get_attr({node.target})"
        args = [self._arg(a) for a in node.args]
        args += [f"{k}={self._arg(node.kwargs[k])}" for k in sorted(node.kwargs)]
        name = ir.op_name(node)
        if (body := body_of(gm, node)) is not None:
            name = self._body_names.get(body, name)
        return f"{name}({', '.join(args)})"

    def _comment(self, node: fx.Node) -> str:
        record = ir.meta(node)
        words = [] if record.stage is None else [f"stage={record.stage}"]
        words += [] if record.branch is None else [f"branch={record.branch}"]
        words += ["hoisted"] if record.hoisted else []
        words += [f"mixing={record.mixing}"] if record.mixing else []
        words += [f"from={record.source}"] if self._provenance and record.source else []
        return " ".join(words)

    def _arg(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return self.name(arg)
        if isinstance(arg, tuple):
            inner = ", ".join(self._arg(a) for a in arg)
            return f"({inner},)" if len(arg) == 1 else f"({inner})"
        if isinstance(arg, list):
            return f"[{', '.join(self._arg(a) for a in arg)}]"
        if isinstance(arg, dict):
            return f"{{{', '.join(f'{k}: {self._arg(arg[k])}' for k in sorted(arg))}}}"
        if isinstance(arg, slice):
            return ":".join(
                "" if a is None else self._arg(a) for a in (arg.start, arg.stop, arg.step)
            )
        if isinstance(arg, torch.dtype):
            return _SHORT.get(arg, str(arg))
        if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._int(arg)
        if isinstance(arg, torch.Tensor):
            return f"tensor {self.type(arg)}"
        if isinstance(arg, (torch.layout, torch.memory_format)):
            return str(arg).removeprefix("torch.")
        if isinstance(arg, (str, int, float, complex, type(None), type(...))):
            return repr(arg)
        return str(arg) if isinstance(arg, torch.device) else type(arg).__name__

    def _int(self, size: Any) -> str:
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(size)
        expression = size.node.expr
        if expression not in self._expressions:
            for symbol in sorted(expression.free_symbols, key=str):
                if symbol not in self._symbols:
                    unbacked = str(symbol).startswith("u")
                    letter = "u" if unbacked else "s"
                    count = sum(str(s).startswith(letter) for s in self._symbols.values())
                    self._symbols[symbol] = type(symbol)(f"{letter}{count}", **symbol.assumptions0)
            renamed = expression.xreplace(self._symbols)
            self._expressions[expression] = str(renamed)
        return self._expressions[expression]


_SCALARS: tuple[tuple[str, Any], ...] = (
    ("bool", (bool, torch.SymBool)),
    ("int", (int, torch.SymInt)),
    ("float", (float, torch.SymFloat)),
)


def _header(calls: list[fx.Node], name: str) -> str:
    stages = sorted({s for n in calls if (s := ir.meta(n).stage) is not None})
    where = ", ".join(map(str, stages)) if stages else "?"
    return f"stage {where}: {name}"


def _clip(line: str, width: int = 200) -> str:
    return line if len(line) <= width else f"{line[: width - 4]} ..."
