"""Anderson mixing of the zeroth-order trajectory, by the coordinates of its iterates."""

from zograph.trajectory.options import Anderson

__all__ = ["Anderson"]
