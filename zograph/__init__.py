"""zograph: zeroth-order fine-tuning as compiler passes over PyTorch graphs."""

from zograph import errors, passes
from zograph.compiler import compile, resume
from zograph.device import DeviceSpec
from zograph.fixed_points import FixedPointInfo, fixed_point
from zograph.loading import from_pretrained
from zograph.noise import noise
from zograph.paper import plan
from zograph.pipeline import Pipeline, default_passes
from zograph.plans import Plan
from zograph.records import Direction, StepRecord
from zograph.replaying import replay
from zograph.step import ZOStep
from zograph.traced import Evaluation
from zograph.trajectory import Anderson

__version__ = "0.1.0"

__all__ = [
    "Anderson",
    "DeviceSpec",
    "Direction",
    "Evaluation",
    "FixedPointInfo",
    "Pipeline",
    "Plan",
    "StepRecord",
    "ZOStep",
    "compile",
    "default_passes",
    "errors",
    "fixed_point",
    "from_pretrained",
    "noise",
    "passes",
    "plan",
    "replay",
    "resume",
]
