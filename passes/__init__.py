"""The passes, in the order in which they run.

normalize -> chunk -> partition -> hoist -> dual_perturbation -> materialize -> anderson ->
outline -> gather -> offload -> schedule -> lower; trial ahead of partition where fixed points are
measured.
"""

from zograph.passes.anderson import Anderson
from zograph.passes.base import Contract, Pass, PassContext, PassResult
from zograph.passes.chunk import Chunk
from zograph.passes.dual_perturbation import DualPerturbation
from zograph.passes.gather import Gather
from zograph.passes.hoist import Hoist
from zograph.passes.lower import Lower
from zograph.passes.materialize import Materialize
from zograph.passes.normalize import Normalize
from zograph.passes.offload import Offload
from zograph.passes.outline import Outline
from zograph.passes.partition import Partition
from zograph.passes.schedule import Schedule
from zograph.passes.trial import Trial

__all__ = [
    "Anderson",
    "Chunk",
    "Contract",
    "DualPerturbation",
    "Gather",
    "Hoist",
    "Lower",
    "Materialize",
    "Normalize",
    "Offload",
    "Outline",
    "Partition",
    "Pass",
    "PassContext",
    "PassResult",
    "Schedule",
    "Trial",
]
