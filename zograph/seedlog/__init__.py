"""The seed log: a run as its base and a few numbers a step (docs/log.md)."""

from zograph.seedlog.file import LogFile, read_log
from zograph.seedlog.format import LogHeader
from zograph.seedlog.journal import Journal

__all__ = ["Journal", "LogFile", "LogHeader", "read_log"]
