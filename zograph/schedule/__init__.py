"""Schedules: a step's tasks on streams that run side by side, within the slot memory.

:func:`schedule` orders them, :func:`races` proves the result from its orders and events alone,
:func:`chart` draws it.
"""

from zograph.schedule.chart import chart
from zograph.schedule.listing import least_capacity, schedule
from zograph.schedule.races import Race, check, races
from zograph.schedule.result import CapacityError, Event, Schedule
from zograph.schedule.tasks import Stream, Task, Unit

__all__ = [
    "CapacityError",
    "Event",
    "Race",
    "Schedule",
    "Stream",
    "Task",
    "Unit",
    "chart",
    "check",
    "least_capacity",
    "races",
    "schedule",
]
