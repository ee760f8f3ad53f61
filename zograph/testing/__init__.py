"""For people who write passes: build graphs, compare them, pin their text.

The pytest plugin :mod:`zograph.testing.plugin` adds the `golden` fixture and the option
``--update-golden``.
"""

from zograph.printer import summary as count_nodes
from zograph.testing.builders import GraphBuilder, capture_function, random_inputs
from zograph.testing.equivalence import (
    assert_equivalent,
    assert_idempotent,
    assert_node_delta,
    assert_rejects,
    run_graph,
)
from zograph.testing.golden import Golden

__all__ = [
    "Golden",
    "GraphBuilder",
    "assert_equivalent",
    "assert_idempotent",
    "assert_node_delta",
    "assert_rejects",
    "capture_function",
    "count_nodes",
    "random_inputs",
    "run_graph",
]
