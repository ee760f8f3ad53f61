"""Fixed points: `zograph.fixed_point`, its solvers, its derivative and its node in a graph."""

from zograph.fixed_points.call import fixed_point
from zograph.fixed_points.comparing import Choice
from zograph.fixed_points.options import SolveOptions
from zograph.fixed_points.progress import FixedPointInfo

__all__ = ["Choice", "FixedPointInfo", "SolveOptions", "fixed_point"]
