"""The race verifier: proves a schedule from its stream orders and events alone.

It shares no code with the scheduler. Three steps are unrolled, and for each task a bit mask tells
which tasks have certainly ended when it starts; every rule below is a question about these masks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from zograph.errors import VerifyError
from zograph.schedule.proof import LAST, STEPS, Proof, units_of, users_of
from zograph.schedule.result import Schedule

HELP = {
    "order": "Each stream's order must hold the stream's tasks of a step, each once.",
    "event": "An event names two tasks of the dag; its lag is 0 or 1.",
    "deadlock": "These tasks wait for each other; drop or turn an event or swap two tasks.",
    "edge": "Add an event, or swap the two if they share a stream.",
    "fill": "A unit must be filled before it is used: add an event from the fill.",
    "write": "A rewrite in place must not meet another use: add an event in the dag's order.",
    "room": "Move the unit, or raise the capacity.",
    "memory": "A fill must wait for all who use the bytes that it takes: add an event, or move "
    "the unit.",
    "cell": "Loads and stores of a cell must run as in the dag, step after step: add an event.",
}
"""The rules, and what to do about a fault."""


@dataclass(frozen=True)
class Race:
    """One fault.

    Attributes
    ----------
    rule
        A key of :data:`HELP`.
    before, after
        Two tasks that should run in this order and might not; a lone task or unit stands in
        `after`.
    lag
        How many steps `before` belongs behind `after`.
    what
        The unit, cell or edge at stake, in words.
    """

    rule: str
    before: str
    after: str
    lag: int
    what: str

    def __str__(self) -> str:
        if not self.before:
            return f"{self.rule}: {self.after}: {self.what}"
        of = ("", " of the step before", " of two steps before")[self.lag]
        return f"{self.rule}: {self.after!r} may start before {self.before!r}{of} ends: {self.what}"


def check(schedule: Schedule) -> None:
    """Raise if a schedule has a race.

    Raises
    ------
    VerifyError
        With the rule, the two tasks, what is at stake, what to do, and what is around them.
    """
    found = races(schedule)
    if not found:
        return
    race = found[0]
    lines = [f"the schedule has {len(found)} fault{'s' * (len(found) > 1)}; the first is"]
    lines += [f"  {race}", f"  {HELP[race.rule]}"]
    for name in dict.fromkeys(n for n in (race.before, race.after) if n in schedule.dag):
        lines += [f"  {line}" for line in around(schedule, name)]
    raise VerifyError("\n".join(lines))


def around(schedule: Schedule, name: str) -> Iterator[str]:
    """Yield what a task waits for, for a message."""
    for stream, names in schedule.order.items():
        if name in names:
            at = names.index(name)
            near = " ".join(repr(n) for n in names[max(0, at - 2) : at + 3])
            yield f"{name!r} is number {at} on {stream}, among {near}"
    for event in schedule.events:
        if event.after == name:
            yield f"{name!r} waits for {event.before!r}, {event.lag} steps ago"


def races(schedule: Schedule) -> list[Race]:
    """Return everything that could go wrong if tasks take longer or shorter than predicted.

    Nothing is assumed but that each stream runs its tasks in order, step after step, and that
    events hold.
    """
    found = list(_well_formed(schedule))
    if found:
        return found
    proof = Proof(schedule)
    if proof.stuck:
        names = ", ".join(repr(name) for name in proof.stuck[:6])
        return [Race("deadlock", "", proof.stuck[0], 0, f"never starts, nor do {names}")]
    rules = (_edges, _units, _memory, _cells)
    return [race for rule in rules for race in rule(schedule, proof)]


def _well_formed(schedule: Schedule) -> Iterator[Race]:
    """Check what the proof builds upon."""
    seen: dict[str, int] = defaultdict(int)
    for stream, names in schedule.order.items():
        for name in names:
            seen[name] += 1
            if name not in schedule.dag:
                yield Race("order", "", name, 0, f"is on {stream} but not in the dag")
            elif schedule.dag.nodes[name]["task"].stream != stream:
                yield Race("order", "", name, 0, f"is on {stream}, not on its own stream")
    for name in schedule.dag:
        if seen[name] != 1:
            yield Race("order", "", name, 0, f"runs {seen[name]} times a step")
    for event in schedule.events:
        if not {event.before, event.after} <= seen.keys() or event.lag not in (0, 1):
            yield Race("event", "", event.after, event.lag, f"waits for {event.before!r}")
    fills = Counter(data["task"].fills for _, data in schedule.dag.nodes(data=True))
    for name, data in schedule.dag.nodes(data=True):
        for unit in units_of(data["task"]):
            if fills[unit] != 1:
                yield Race("fill", "", name, 0, f"{unit} is filled {fills[unit]} times a step")
    for filled in fills:
        if filled is None:
            continue
        if filled not in schedule.offsets or filled not in schedule.units:
            yield Race("room", "", filled, 0, "has no place in memory")
            continue
        start, memory = schedule.offsets[filled], schedule.units[filled]
        capacity = schedule.capacity.get(memory.arena, 0)
        if start < 0 or start + memory.bytes > capacity:
            what = f"{memory.bytes} bytes at {start} exceed the {capacity} of {memory.arena}"
            yield Race("room", "", filled, 0, what)


def _edges(schedule: Schedule, proof: Proof) -> Iterator[Race]:
    """Every dependency of the dag holds."""
    for before, after in schedule.dag.edges:
        mask = proof.mask([proof.number[before]], LAST)
        if not proof.follows(proof.number[after], LAST, mask):
            yield Race("edge", before, after, 0, "the dag has this edge")


def _units(schedule: Schedule, proof: Proof) -> Iterator[Race]:
    """Units are filled before use, and no rewrite in place meets another use."""
    for name, users in users_of(proof).items():
        written = [proof.tasks[i].fills == name or name in proof.tasks[i].writes for i in users]
        filler = next(i for i in users if proof.tasks[i].fills == name)
        for at, after in enumerate(users):
            for before, before_writes in zip(users[:at], written, strict=False):
                if not (before_writes or written[at]):
                    continue
                if not proof.follows(after, LAST, proof.mask([before], LAST)):
                    rule = "fill" if before == filler else "write"
                    yield Race(rule, proof.names[before], proof.names[after], 0, f"unit {name}")


def _memory(schedule: Schedule, proof: Proof) -> Iterator[Race]:
    """Of two lives in the same bytes, one ends before the other begins, in any two steps."""
    users = users_of(proof)
    filler = {task.fills: i for i, task in enumerate(proof.tasks) if task.fills}
    masks = {(n, s): proof.mask(own, s) for n, own in users.items() for s in range(STEPS)}
    for name, others in _neighbours(schedule, users).items():
        fill = filler[name]
        for other in others:
            for step in range(STEPS):
                if step == LAST and filler[other] >= fill:
                    continue  # itself, or judged from the other side
                if proof.follows(fill, LAST, masks[other, step]) or (
                    step == LAST and proof.follows(filler[other], LAST, masks[name, LAST])
                ):
                    continue
                late = [
                    i for i in users[other] if not proof.follows(fill, LAST, proof.mask([i], step))
                ]
                what = f"unit {name} takes the memory of unit {other}"
                names = proof.names[late[-1]], proof.names[fill]
                yield Race("memory", *names, LAST - step, what)


def _neighbours(schedule: Schedule, names: Collection[str]) -> dict[str, list[str]]:
    """Return for each unit those that share bytes with it, itself among them."""
    found: dict[str, list[str]] = {}
    live: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name in sorted(names, key=lambda n: schedule.offsets[n]):
        unit, start = schedule.units[name], schedule.offsets[name]
        own = [entry for entry in live[unit.arena] if entry[1] > start]
        found[name] = [name, *(other for _, _, other in own)]
        for _, _, other in own:
            found[other].append(name)
        live[unit.arena] = [*own, (start, start + unit.bytes, name)]
    return found


def _cells(schedule: Schedule, proof: Proof) -> Iterator[Race]:
    """Loads and stores of a cell keep the order that one worker would give them."""
    accesses: dict[str, list[tuple[int, bool]]] = defaultdict(list)
    for i, task in enumerate(proof.tasks):
        for cell in dict.fromkeys((*task.loads, *task.stores)):
            accesses[cell].append((i, cell in task.stores))
    alike: dict[tuple[tuple[int, bool], ...], str] = {}
    for cell, own in accesses.items():
        alike.setdefault(tuple(own), cell)
    for own_accesses, cell in alike.items():
        for after, stores in own_accesses:
            for before, other_stores in own_accesses:
                if not (stores or other_stores):
                    continue
                lag = 0 if before < after else 1
                if not proof.follows(after, LAST, proof.mask([before], LAST - lag)):
                    names = proof.names[before], proof.names[after]
                    yield Race("cell", *names, lag, f"weight {cell!r}")
