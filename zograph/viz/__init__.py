"""Pictures of graphs: stages as boxes, both branches in colour, weights by their size."""

from __future__ import annotations

import warnings
from pathlib import Path

import graphviz
from torch import fx

from zograph.errors import OptionError
from zograph.viz.dot import digraph
from zograph.viz.fold import compact, folded
from zograph.viz.reader import read

__all__ = ["SUFFIXES", "dot_source", "draw", "source"]

SUFFIXES = (".svg", ".png", ".pdf", ".dot")


def dot_source(gm: fx.GraphModule, *, fold: bool = True) -> str:
    """Return the picture of a graph in the dot language; equal graphs give equal text.

    Parameters
    ----------
    gm
        A graph at any point of the pipeline.
    fold
        Draw a run of consecutive stages with the same body once.

    Examples
    --------
    >>> import torch
    >>> from zograph.testing import GraphBuilder
    >>> b = GraphBuilder()
    >>> x = b.input("x", (2, 3))
    >>> "relu" in dot_source(b.build(b.call(torch.ops.aten.relu.default, x)))
    True
    """
    scene = read(gm)
    return str(digraph(compact(folded(scene) if fold else scene)).source)


def draw(gm: fx.GraphModule, path: str | Path, *, fold: bool = True) -> Path:
    """Draw a graph into a file.

    Parameters
    ----------
    gm
        A graph at any point of the pipeline, for example `step.graph`.
    path
        Where to write; the suffix chooses the format: ``.svg``, ``.png``, ``.pdf`` or ``.dot``.
    fold
        Draw a run of consecutive stages with the same body once. False draws every stage.

    Returns
    -------
    Path
        The file written. Without the program ``dot`` this is the ``.dot`` file beside `path`.

    Raises
    ------
    OptionError
        If the suffix is none of the four.

    Warns
    -----
    UserWarning
        If the program ``dot`` is missing.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise OptionError(f"cannot draw {path.name!r}: the suffix must be {', '.join(SUFFIXES)}")
    text = dot_source(gm, fold=fold)
    if path.suffix != ".dot":
        try:
            path.write_bytes(graphviz.Source(text).pipe(format=path.suffix[1:]))
        except graphviz.ExecutableNotFound:
            path = path.with_suffix(".dot")
            warnings.warn(
                f"the program `dot` is not installed, so {path} was written instead. Install "
                "graphviz (Debian: apt-get install graphviz) and draw again.",
                UserWarning,
                stacklevel=2,
            )
        else:
            return path
    path.write_text(text, encoding="utf-8")
    return path
