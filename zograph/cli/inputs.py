"""What is wrong with an input, as one message, and checks of plain arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from zograph.errors import ZographError

FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
"""What `transfer_dtype` may be; :mod:`zograph.formats` takes long to import."""


class InputError(ZographError, ValueError):
    """An argument or a file cannot be used; the message says which, where and what to do."""


def integer(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer that is at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {minimum}")
        return value

    return parse


def number(*, above: float | None = None, minimum: float | None = None) -> Callable[[str], float]:
    """Return an argparse type: a finite number with an open or closed lower bound."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is too small: more than {above:g}")
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is too small: at least {minimum:g}")
        return value

    return parse
