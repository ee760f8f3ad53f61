"""Messages of libraries that say nothing to a user of this one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(logger: str, text: str) -> Iterator[None]:
    """Hold back the messages of a logger that contain a text."""

    def is_another(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    log = logging.getLogger(logger)
    log.addFilter(is_another)
    try:
        yield
    finally:
        log.removeFilter(is_another)
