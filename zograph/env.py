"""Every environment variable zograph reads: one table, one function."""

from __future__ import annotations

import os

TABLE = {
    "ZOGRAPH_CACHE": "folder for compiled kernels (default: $XDG_CACHE_HOME/zograph)",
    "ZOGRAPH_KERNELS": "off: do not compile the C++ kernels, use the torch definition",
}


def setting(name: str) -> str | None:
    """Return the value of a variable of the table, None if unset or empty."""
    if name not in TABLE:
        raise KeyError(f"{name} is not in zograph.env.TABLE")
    return os.environ.get(name) or None
