"""Where a run is: walks through sections of its graph, nodes on their way, loops in progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING

import msgspec

from engine.node_api import CONTINUE, ERROR, NodeResult
from engine.readiness import ReadinessChange, ReadinessTracker

if TYPE_CHECKING:
    from engine.program import NodeProgram
    from engine.run_records import NodeSpan, RunError
    from engine.sections import GraphSection
    from engine.values import Json


class SectionFrame:
    """One walk through a section: the run's own, or one turn of a loop."""

    iteration = ""
    loop: LoopProgress | None = None
    index = 0
    """The place of the item, in a turn."""
    open = 0
    """Nodes that are ready, at work or asleep."""
    failure: RunError | None = None
    """Of the first of its nodes that has failed for good."""
    is_broken_off = False
    """Nothing in it is begun any more, and its end is awaited."""
    share = 0.0
    """The part of the run that each of its nodes counts for, once it has settled."""
    counted = 0.0
    """The part of the run that was counted in it so far, in a turn."""

    def __init__(
        self,
        section: GraphSection,
        given: Json,
        roots: Mapping[str, Json],
        recorded: Mapping[str, NodeSpan],
        started_at: datetime,
    ) -> None:
        self.section = section
        self.plan = ReadinessTracker(section.graph, section.first, section.eager)
        self.given = given
        """What its first nodes are given: the trigger's data, or an item."""
        self.recorded = recorded
        """The newest span of each node in it, of earlier attempts."""
        self.started_at = started_at
        self.outputs: dict[str, Json] = {}
        """Of its own nodes."""
        self.nodes = self.outputs
        """What expressions see as `nodes`: in a turn, what had settled outside of it too when it began."""
        self.roots = {**roots, "nodes": self.nodes}
        """The roots of expressions, but for `data`."""
        self.skipped: set[str] = set()
        """Its nodes that are not run."""
        self.digests: dict[str, bytes] = {}
        self.texts: dict[str, bytes] = {}
        """Small outputs as JSON, for the nodes that hand on what they were given."""
        self.loops: set[LoopProgress] = set()
        """Those of its loops that are in progress."""

    @classmethod
    def for_turn(
        cls, loop: LoopProgress, index: int, recorded: Mapping[str, NodeSpan], started_at: datetime
    ) -> SectionFrame:
        """Return a turn of a loop, from its beginning."""
        outer, loop_id, item = loop.visit.frame, loop.visit.node_id, loop.items[index]
        frame = cls(loop.body, item, outer.roots, recorded, started_at)
        frame.iteration, frame.loop, frame.index = loop.iteration(index), loop, index
        frame.share = loop.turn_share / (1 + loop.body.size)
        frame.nodes = {**outer.nodes, loop_id: {"item": item, "index": index}}
        frame.roots |= {"nodes": frame.nodes, "item": item, "index": index}
        return frame

    def current_roots(self) -> Mapping[str, Json]:
        """Return the roots as they are, whatever comes."""
        return {**self.roots, "nodes": self.nodes.copy()}

    def start(self) -> ReadinessChange:
        """Return what is ready at first."""
        return self.plan.start() if self.loop is None else self.plan.settle(self.loop.visit.node_id, CONTINUE)

    def result(self) -> Json:
        """Return what has come of a turn: the output of the last node reached, of several each under its node's id."""
        found = {node_id: self.outputs[node_id] for node_id in self.section.last if node_id in self.outputs}
        return next(iter(found.values()), None) if len(found) <= 1 else found

    def share_of(self, node_id: str) -> float:
        """Return the part of the run that one of its nodes counts for; a loop, with all the nodes of its body."""
        body = self.section.bodies.get(node_id)
        return self.share if body is None else self.share * (1 + body.size)

    def is_skipped(self, node_id: str) -> bool:
        """Tell whether a node, of this or what is around it, is not run."""
        frame = self
        while node_id not in frame.skipped:
            if frame.loop is None:
                return False
            frame = frame.loop.visit.frame
        return True

    def with_inner_turns(self) -> Iterator[SectionFrame]:
        """Return this and every turn in progress inside it."""
        yield self
        for loop in self.loops:
            for turn in loop.turns.values():
                yield from turn.with_inner_turns()

    def is_fatal(self) -> bool:
        """Tell whether no loop around it takes up a failure that is left to it."""
        frame = self
        while frame.loop is not None:
            if frame.loop.continues_on_error or frame.loop.visit.has_error_edge:
                return False
            frame = frame.loop.visit.frame
        return True


class NodeVisit(msgspec.Struct, eq=False):
    """One node on its way through a frame."""

    frame: SectionFrame
    program: NodeProgram
    data: Json
    input_node: str | None
    input: bytes | None
    input_digest: bytes
    started_at: datetime
    attempt: int = 1
    config: Mapping[str, Json] = {}
    resolved_config: bytes | None = None
    hashes: bytes | None = None
    unresolved: list[str] = []
    written: tuple[Json, bytes, bytes] | None = None
    """Its output, as others see it and as it is kept, and the digest of that."""
    begun_at: datetime | None = None
    """When the attempt under way has begun; None between two attempts."""
    lost: NodeSpan | None = None
    """What an earlier stretch of work recorded of an attempt whose end nobody knows, until that is told."""
    told_attempt: int = 0
    """The attempt that was recorded last as a span of its own."""
    counted: float = 0.0
    """The part of the run that was counted for the turns of a loop so far."""

    @property
    def node_id(self) -> str:
        return self.program.node.id

    @property
    def is_write(self) -> bool:
        return self.program.is_write

    @property
    def is_at_most_once(self) -> bool:
        return self.program.node.at_most_once and self.is_write

    @property
    def has_error_edge(self) -> bool:
        """Whether something is connected that takes up its failure."""
        edges = self.frame.section.graph.outbound[self.program.node.id]
        return any(edge.source_port == ERROR for edge in edges)


class WakeAction(Enum):
    """What becomes of a node when it wakes by the clock."""

    DONE = "done"
    TRIED_AGAIN = "tried again"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class SleepingNode:
    """A node that goes on at a set time, or when it is answered."""

    visit: NodeVisit
    wakes_at: float | None
    """By `time.monotonic`, in seconds; None: only an answer wakes it."""
    then: WakeAction
    output: bytes | None = None
    """What a wait ends with."""
    expired: NodeResult | None = None
    """What the node gives when nobody has answered; None: it fails."""


@dataclass(slots=True, eq=False)
class LoopProgress:
    """A loop in progress."""

    visit: NodeVisit
    body: GraphSection
    items: Sequence[Json]
    concurrency: int
    continues_on_error: bool
    """Whether an item whose turn fails is listed with its error, and the loop goes on."""
    turns: dict[int, SectionFrame] = field(default_factory=dict)
    """Those in progress."""
    next_index: int = 0
    results: list[Json] = field(default_factory=list)
    errors: dict[int, RunError] = field(default_factory=dict)
    result_bytes: int = 0
    failure: RunError | None = None
    is_broken_off: bool = False

    turn_share: float = 0.0
    """The part of the run that one turn counts for."""

    def __post_init__(self) -> None:
        self.results = [None] * len(self.items)
        self.turn_share = self.visit.frame.share_of(self.visit.node_id) / len(self.items)

    @property
    def can_start_turn(self) -> bool:
        return (
            self.failure is None
            and not self.is_broken_off
            and self.next_index < len(self.items)
            and len(self.turns) < self.concurrency
        )

    def iteration(self, index: int) -> str:
        """Return what a turn is called: its number, behind those of the loops around it."""
        outer = self.visit.frame.iteration
        return f"{outer}.{index}" if outer else str(index)

    def output(self) -> Json:
        """Return what leaves by `done`."""
        errors: list[Json] = [
            {"index": index, "error": error.as_json()} for index, error in sorted(self.errors.items())
        ]
        return {"results": self.results, "count": len(self.items), "errors": errors}
