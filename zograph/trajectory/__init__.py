"""Anderson mixing of the zeroth-order trajectory, in the coordinates of shared seeded directions."""

from zograph.trajectory.options import Anderson

__all__ = ["Anderson"]
