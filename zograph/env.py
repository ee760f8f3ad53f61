"""Every environment variable zograph reads: one table, one function."""

from __future__ import annotations

import os

TABLE = {
    "ZOGRAPH_CACHE": "folder for compiled kernels (default: $XDG_CACHE_HOME/zograph)",
    "ZOGRAPH_DUMP": "folder for a text, a drawing source and a diff of the graph after every pass",
    "ZOGRAPH_KERNELS": "off: do not compile the C++ kernels, use the torch definition",
    "ZOGRAPH_VERIFY": "0: do not check the graph after every pass (default: check)",
}


def setting(name: str) -> str | None:
    """Return the value of a variable of the table, None if unset or empty."""
    if name not in TABLE:
        raise KeyError(f"{name} is not in zograph.env.TABLE")
    return os.environ.get(name) or None
