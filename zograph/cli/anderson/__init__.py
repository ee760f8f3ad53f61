"""`zograph bench anderson`: the fixed points of a deep-equilibrium model, one module a part."""

from zograph.cli.anderson.command import add_parser

__all__ = ["add_parser"]
