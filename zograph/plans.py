"""What a step will take: memory by item, bytes moved, predicted time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from zograph.ir import info, meta
from zograph.layout import Layout
from zograph.schedule import Schedule, Stream
from zograph.stores.base import padded
from zograph.transfers import FETCH, WRITEBACK


@dataclass(frozen=True)
class Plan:
    """The plan of one step for one set of sizes. All figures are predictions.

    Attributes
    ----------
    device_bytes
        Memory of the device at its highest: the sum of `items`. Not counted are the CUDA context,
        workspaces of libraries and code.
    host_bytes
        Host memory beside the device: the stored weights, or buffers on the way to a disk.
    disk_bytes
        The work file's two copies of each weight that is trainable or has a format; 0 where
        weights stay in memory.
    step_seconds
        From step to step, in the steady state.
    overlap
        The share of transfer time that is hidden under compute, 0 to 1.
    bytes_moved
        Bytes a step on each transfer stream.
    busy
        Seconds a step for which each stream works.
    forward_seconds
        What of the compute time grows with the batch: operators, not noise and folds.
    limiting
        The stream with the most to do.
    items
        What the device's memory is for.
    """

    device: str
    tier: str
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    step_seconds: float
    overlap: float
    bytes_moved: dict[str, int]
    busy: dict[str, float]
    forward_seconds: float
    limiting: str
    items: dict[str, int]
    stages: int
    cut: int | None
    """Most bytes of weights a stage may hold; None: whole blocks."""
    resident: int
    """Parameters that stay on the device."""
    parameters: int

    @property
    def transfer_seconds(self) -> float:
        """The longest that a transfer stream works in a step."""
        return max((s for n, s in self.busy.items() if n != Stream.COMPUTE), default=0.0)

    @property
    def bound_seconds(self) -> float:
        """The physical limit of a step: the busiest stream's time."""
        return max(self.busy.values(), default=0.0)

    @property
    def balance(self) -> float:
        """How many times the directions would make compute as long as transfer."""
        compute = self.busy.get(Stream.COMPUTE, 0.0)
        return self.transfer_seconds / compute if compute else 1.0

    @property
    def batch_balance(self) -> float:
        """How many times the batch would; 0 where noise and folds alone take as long."""
        rest = self.busy.get(Stream.COMPUTE, 0.0) - self.forward_seconds
        room = max(0.0, self.transfer_seconds - rest)
        return room / self.forward_seconds if self.forward_seconds else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields and derived figures as values that ``json`` can write."""
        derived = ("bound_seconds", "transfer_seconds", "balance", "batch_balance")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def plan_of(gm: fx.GraphModule) -> Plan:
    """Return the plan of a scheduled graph."""
    record = info(gm)
    assert record.layout is not None
    assert record.schedule is not None
    return describe(gm, record.layout, record.schedule)


def describe(gm: fx.GraphModule, layout: Layout, schedule: Schedule) -> Plan:
    """Return the plan of an offloaded graph under a layout and its schedule."""
    params = info(gm).params
    weights = sum(padded(p.stored_bytes) for p in params.values())
    written = [p for p in params.values() if p.trainable or p.format is not None]
    trainable = sum(padded(p.stored_bytes) for p in written)
    staging = schedule.capacity.get("staging", 0)
    host = layout.tier == "host" and (layout.spec.kind == "cuda" or bool(layout.slots))
    top = max(layout.uses, key=lambda u: u.peak)
    scratch = layout.copies or top.cost.scratch_at_peak
    items = {
        "resident weights": layout.held,
        "slots": layout.slots,
        **({"decoded weights": layout.decoded} if layout.decoded else {}),
        "perturbed copies": scratch,
        "activations": layout.peak - scratch,
        "batch, buffers and keys": layout.fixed,
    }
    return Plan(
        device=layout.spec.name,
        tier=layout.tier,
        device_bytes=sum(items.values()),
        host_bytes=weights if host else staging,
        disk_bytes=2 * trainable if layout.tier == "disk" else 0,
        step_seconds=schedule.seconds,
        overlap=schedule.overlap,
        bytes_moved=moved(gm, layout, schedule),
        busy={str(s): seconds for s, seconds in schedule.busy.items()},
        forward_seconds=sum(layout.spec.seconds(u.cost.work) for u in layout.uses),
        limiting=str(schedule.limiting),
        items=items,
        stages=len(layout.uses),
        cut=layout.cut,
        resident=len(layout.resident),
        parameters=len(params),
    )


def moved(gm: fx.GraphModule, layout: Layout, schedule: Schedule) -> dict[str, int]:
    """Return the bytes that each transfer stream moves in a step with pending updates.

    Of weights that are not written in every step, the mean.
    """
    params = info(gm).params
    streams: dict[Any, list[Stream]] = {
        FETCH: [s for s in (Stream.READ, Stream.TO_DEVICE) if s in schedule.order],
        WRITEBACK: [s for s in (Stream.TO_HOST, Stream.WRITE) if s in schedule.order],
    }
    total: dict[str, int] = {}
    for node in gm.graph.nodes:
        for stream in streams.get(node.target, ()):
            nbytes = sum(params[str(meta(n).name)].stored_bytes for n in weights_in(node))
            nbytes //= layout.fold_every if node.target is WRITEBACK else 1
            total[str(stream)] = total.get(str(stream), 0) + nbytes
    return total


def weights_in(node: fx.Node) -> list[fx.Node]:
    """Return the list of weights that a transfer is called with."""
    found = node.args[0]
    assert isinstance(found, (list, tuple))
    return [n for n in found if isinstance(n, fx.Node)]
