"""zograph: zeroth-order fine-tuning as compiler passes over PyTorch graphs."""

from zograph import errors, passes
from zograph.capture import Evaluation
from zograph.compiler import compile
from zograph.noise import noise
from zograph.pipeline import Pipeline, default_passes
from zograph.step import Direction, StepRecord, ZOStep

__version__ = "0.1.0"

__all__ = [
    "Direction",
    "Evaluation",
    "Pipeline",
    "StepRecord",
    "ZOStep",
    "compile",
    "default_passes",
    "errors",
    "noise",
    "passes",
]
