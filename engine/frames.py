"""Position of a run in its graph: section frames, node visits, loops in progress, ready nodes and the work list.

Readiness is decided without a clock or I/O; each step costs time linear in its edges.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum
from heapq import heapify, heappush
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, cast

import msgspec
from msgspec import Struct, field

from engine import approval_links
from engine.node_api import CONTINUE, ERROR, NodeResult
from engine.run_records import SETTLED_STATUSES

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.graph import GraphEdge, GraphSection, ParsedGraph
    from engine.model_calls import ModelCallRecord
    from engine.node_api import StepWait
    from engine.program import NodeProgram
    from engine.run_records import NodeSpan, RunError
    from engine.values import Json


NO_PORT: Final = ""
"""Port by which a node leaves that is left out: none of its edges is taken."""


class SectionFrame:
    """Execution of one section: the whole run, or one iteration of a loop."""

    iteration = ""
    loop: LoopProgress | None = None
    index = 0
    """Position of the item, in an iteration."""
    open = 0
    """Number of nodes that are ready, running or asleep."""
    failure: RunError | None = None
    """Error of the first node that has failed permanently."""
    is_broken_off = False
    """Whether the frame begins no more nodes and only waits for its end."""
    share = 0.0
    """Share of the run's progress for each of its nodes, once it has settled."""
    counted = 0.0
    """Share of the run's progress counted so far, in an iteration."""
    candidates: Mapping[str, NodeSpan] = MappingProxyType({})
    """Results of an earlier run that a replay may reuse, outside of loops."""

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
        """Input of its first nodes: the trigger's data, or an item."""
        self.recorded = recorded
        """Latest span of each of its nodes in earlier attempts."""
        self.started_at = started_at
        self.outputs: dict[str, Json] = {}
        """Outputs of its own nodes."""
        self.nodes = self.outputs
        """Value of the root `nodes`; in an iteration also the outer nodes that had settled at its start."""
        self.roots = {**roots, "nodes": self.nodes}
        """Roots of expressions, except `data`."""
        self.skipped: set[str] = set()
        """Its nodes that are not run."""
        self.digests: dict[str, bytes] = {}
        self.texts: dict[str, bytes] = {}
        """Small outputs as JSON, for nodes that pass on their input."""
        self.loops: set[LoopProgress] = set()
        """Its loops in progress."""

    @classmethod
    def for_iteration(
        cls, loop: LoopProgress, index: int, recorded: Mapping[str, NodeSpan], started_at: datetime
    ) -> SectionFrame:
        """Return a new frame for iteration `index` of a loop; the roots of its expressions add `item`,
        `index` and the outer nodes.

        `recorded` are the spans of an earlier attempt at this iteration, by node id.
        """
        outer, loop_id, item = loop.visit.frame, loop.visit.node_id, loop.items[index]
        frame = cls(loop.body, item, outer.roots, recorded, started_at)
        frame.iteration, frame.loop, frame.index = loop.name_iteration(index), loop, index
        frame.share = loop.iteration_share / (1 + loop.body.size)
        frame.nodes = {**outer.nodes, loop_id: {"item": item, "index": index}}
        frame.roots |= {"nodes": frame.nodes, "item": item, "index": index}
        if outer.roots.get("approval"):
            inner = approval_links.build_root(loop.body.inner_nodes(), frame.iteration)
            frame.roots["approval"] = {**cast("dict[str, Json]", outer.roots["approval"]), **inner}
        return frame

    def current_roots(self) -> Mapping[str, Json]:
        """Return the roots of expressions with a copy of the outputs of the nodes that have completed so far.

        A thread can use them while other nodes complete.
        """
        return {**self.roots, "nodes": self.nodes.copy()}

    def start(self) -> ReadinessChange:
        """Decide which nodes are ready at the start: triggers, or (in an iteration) the successors of the loop.

        Return them, and the nodes that can't be reached as skipped. Call it once.
        """
        return self.plan.start() if self.loop is None else self.plan.settle(self.loop.visit.node_id, CONTINUE)

    def result(self) -> Json:
        """Return the result of an iteration: the output of its last node (one without successors), null without one.

        If several last nodes have an output, it is an object of these by node id.
        """
        found = {node_id: self.outputs[node_id] for node_id in self.section.last if node_id in self.outputs}
        return next(iter(found.values()), None) if len(found) <= 1 else found

    def share_of(self, node_id: str) -> float:
        """Return the share, from 0 to 1, of the run's progress for a node; a loop includes the nodes of its body."""
        body = self.section.bodies.get(node_id)
        return self.share if body is None else self.share * (1 + body.size)

    def is_skipped(self, node_id: str) -> bool:
        """Return whether a node of this frame or of an enclosing one was skipped."""
        frame = self
        while node_id not in frame.skipped:
            if frame.loop is None:
                return False
            frame = frame.loop.visit.frame
        return True

    def with_inner_iterations(self) -> Iterator[SectionFrame]:
        """Yield this frame and the frames of all iterations in progress inside it, outer ones first."""
        yield self
        for loop in self.loops:
            for iteration_frame in loop.iterations.values():
                yield from iteration_frame.with_inner_iterations()

    def is_fatal(self) -> bool:
        """Return whether a failure of this frame fails the run: no enclosing loop continues on errors or has
        an error edge.
        """
        frame = self
        while frame.loop is not None:
            if frame.loop.continues_on_error or frame.loop.visit.has_error_edge:
                return False
            frame = frame.loop.visit.frame
        return True


class NodeVisit(msgspec.Struct, eq=False):
    """Progress of one node through a frame."""

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
    rendered_config: bytes | None = None
    """Config as rendered, if it has expressions and is not recorded as `resolved_config`."""
    hashes: bytes | None = None
    sources: set[tuple[str, int]] | None = None
    """Data sources used so far, by id and revision; for a loop those of its body."""
    unresolved: list[str] = []
    written: tuple[Json, bytes, bytes] | None = None
    """Output as seen by other nodes, its stored form, and the digest of that."""
    begun_at: datetime | None = None
    """Start of the current attempt; None between two attempts."""
    candidate: NodeSpan | None = None
    """Recorded result of an earlier run, until the key of the node is known."""
    key_id: str | None = None
    """Execution id in the idempotency key, if it is not that of the run."""
    lost: NodeSpan | None = None
    """Span of an attempt with an unknown outcome, recorded by an earlier worker; None once it has been
    reported.
    """
    recorded_attempt: int = 0
    """Last attempt with a span of its own."""
    counted: float = 0.0
    """Share of the run's progress counted for the iterations of a loop so far."""
    model_calls: list[ModelCallRecord] = []
    """Calls of language models so far, in all attempts."""
    steps: list[AgentStep] = []
    """Steps of an agent, of all attempts."""
    nested_steps: dict[tuple[str, str], list[AgentStep]] = {}
    """Steps of the agents that do its tool calls, by node id and iteration."""
    candidate_steps: Mapping[tuple[str, str], Mapping[int, AgentStep]] = {}
    """Steps of the replayed run that may be taken over, of the agent and of those inside, by their numbers."""
    has_fresh_answers: bool = False
    """Whether the answers to an agent were read after the time of its wait."""
    call_waits: dict[tuple[str, str], StepWait] = {}
    """Waits of the tool calls of an agent that this worker has recorded, by node id and iteration."""
    task: bytes | None = None
    """JSON of the task that the record of its wait creates."""

    @property
    def node_id(self) -> str:
        return self.program.node.id

    @property
    def is_write(self) -> bool:
        return self.program.is_write

    @property
    def is_at_most_once(self) -> bool:
        """Whether an attempt with an unknown outcome fails the node instead of being repeated: for a write with
        `atMostOnce`, but not for an agent, which fails the tool call alone.
        """
        return self.program.node.at_most_once and self.is_write and self.program.agent is None

    def note_sources_in_loops(self) -> None:
        """Add the data sources that the node has used to those of all enclosing loops, whose keys depend on them."""
        loop = self.frame.loop
        while loop is not None:
            loop.visit.sources = (loop.visit.sources or set()) | (self.sources or set())
            loop = loop.visit.frame.loop

    @property
    def has_error_edge(self) -> bool:
        """Whether a connection leaves the node's port `error`, so that its failure does not fail the run."""
        edges = self.frame.section.graph.outbound[self.program.node.id]
        return any(edge.source_port == ERROR for edge in edges)


class WakeAction(Enum):
    """Action on a sleeping node when it wakes."""

    DONE = "done"
    TRIED_AGAIN = "tried again"
    EXPIRED = "expired"
    ASKED = "asked"
    """An agent is called again, with the answers to the questions of its steps."""

    @property
    def awaits_answer(self) -> bool:
        return self in {WakeAction.EXPIRED, WakeAction.ASKED}


class SleepingNode(Struct, frozen=True):
    """Node that continues at a set time, or with an answer."""

    visit: NodeVisit
    wakes_at: float | None
    """Time by `time.monotonic`, in seconds; None if only an answer wakes it."""
    then: WakeAction
    output: bytes | None = None
    """Output at the end of a timer wait."""
    expired: NodeResult | None = None
    """Result of the node without an answer; None if it fails then."""
    places: frozenset[tuple[str, str]] = frozenset()
    """Node id and iteration of each question of an agent."""
    held_until: float = 0.0
    """Time by `time.monotonic` until which the run may keep its worker for this node, whose answer may be near."""


class LoopProgress(Struct, eq=False):
    """Loop in progress."""

    visit: NodeVisit
    body: GraphSection
    items: Sequence[Json]
    concurrency: int
    continues_on_error: bool
    """Whether the loop lists an item whose iteration fails with its error, and continues."""
    iterations: dict[int, SectionFrame] = field(default_factory=dict)
    """Iterations in progress, by index."""
    next_index: int = 0
    results: list[Json] = field(default_factory=list)
    errors: dict[int, RunError] = field(default_factory=dict)
    result_bytes: int = 0
    failure: RunError | None = None
    is_broken_off: bool = False

    iteration_share: float = 0.0
    """Share of the run's progress for one iteration."""

    def __post_init__(self) -> None:
        self.results = [None] * len(self.items)
        self.iteration_share = self.visit.frame.share_of(self.visit.node_id) / len(self.items)

    @property
    def can_start_iteration(self) -> bool:
        return (
            self.failure is None
            and not self.is_broken_off
            and self.next_index < len(self.items)
            and len(self.iterations) < self.concurrency
        )

    def name_iteration(self, index: int) -> str:
        """Return the name of the iteration at an index: the indexes, from 0, of the enclosing iterations and its own.

        An example is `2.0`.
        """
        outer = self.visit.frame.iteration
        return f"{outer}.{index}" if outer else str(index)

    def output(self) -> Json:
        """Return the output of the loop at its port `done`: results by index, number of items, and errors
        with their index.
        """
        errors: list[Json] = [
            {"index": index, "error": error.as_json()} for index, error in sorted(self.errors.items())
        ]
        return {"results": self.results, "count": len(self.items), "errors": errors}


class ReadinessChange(Struct):
    """Nodes that may start after an event of a frame, such as the end of a node, and nodes that never will."""

    ready: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class ReadinessTracker:
    """Tracker of one run's readiness in its graph.

    A node is ready when every edge into it is decided and at least one was taken. If none was taken, the node
    is skipped, and so are its outgoing edges. The decision depends only on the settled nodes, not on their
    order. An eager node, however, is ready as soon as one edge into it was taken; later decisions change
    nothing for it.
    """

    def __init__(self, graph: ParsedGraph, triggers: Iterable[str], eager: Collection[str] = ()) -> None:
        self._inbound = graph.inbound
        self._outbound = graph.outbound
        self._undecided = dict(graph.inbound_counts)
        self._reached: set[str] = set()
        self._ports: dict[str, str] = {}
        self._triggers = frozenset(triggers)
        self._eager = eager
        self._first: dict[str, GraphEdge] = {}
        """Edge by which each eager node was reached."""

    def start(self) -> ReadinessChange:
        """Decide about the nodes without incoming edges; return triggers as ready, others and the nodes
        behind them as skipped.
        """
        change = ReadinessChange()
        roots = [node_id for node_id, count in self._undecided.items() if count == 0]
        change.ready = [node_id for node_id in roots if node_id in self._triggers]
        self._skip((node_id for node_id in roots if node_id not in self._triggers), change)
        return change

    def settle(self, node_id: str, port: str) -> ReadinessChange:
        """Record that a node has left by `port`; return the nodes that became ready or are skipped by that. Call it
        once for each node.

        Its edges at that port are taken, the others are not. A node is ready once all its incoming edges are decided
        and one is taken, an eager node at the first taken one.
        """
        change = ReadinessChange()
        unreachable: list[str] = []
        self._ports[node_id] = port
        for edge in self._outbound[node_id]:
            if edge.source_port == port:
                self._mark_reached(edge, change)
            self._decide(edge.target, change, unreachable)
        self._skip(unreachable, change)
        return change

    def taken_edges(self, node_id: str) -> Sequence[GraphEdge]:
        """Return the taken edges into a node, in graph order; only the first taken one for an eager node."""
        if node_id in self._first:
            return [self._first[node_id]]
        return [edge for edge in self._inbound[node_id] if self._ports.get(edge.source) == edge.source_port]

    def _mark_reached(self, edge: GraphEdge, change: ReadinessChange) -> None:
        target = edge.target
        if target in self._eager and target not in self._reached:
            self._first[target] = edge
            change.ready.append(target)
        self._reached.add(target)

    def _decide(self, target: str, change: ReadinessChange, unreachable: list[str]) -> None:
        """Count one more decided edge into a node; after its last edge, add it to `change.ready` or `unreachable`.

        A node is unreachable if none of its edges was taken. An eager node was added at the first taken edge.
        """
        self._undecided[target] -= 1
        if self._undecided[target] > 0:
            return
        if target not in self._reached:
            unreachable.append(target)
        elif target not in self._eager:
            change.ready.append(target)

    def _skip(self, node_ids: Iterable[str], change: ReadinessChange) -> None:
        """Add nodes to `change.skipped`, and those behind them that can't be reached any more.

        Nodes that become ready, since their last open edge is decided, are added to `change.ready`.
        """
        queue = deque(node_ids)
        while queue:
            node_id = queue.popleft()
            change.skipped.append(node_id)
            unreachable: list[str] = []
            for edge in self._outbound[node_id]:
                self._decide(edge.target, change, unreachable)
            queue.extend(unreachable)


class Worklist(Struct):
    """Remaining work in all frames of a run."""

    settled_before: list[tuple[int, str, SectionFrame]] = field(default_factory=list)
    """Heap of ready nodes that settled in an earlier attempt, in the order in which they settled."""
    ready: deque[tuple[SectionFrame, str]] = field(default_factory=deque)
    tasks: dict[asyncio.Task[None], NodeVisit] = field(default_factory=dict)
    sleeping: dict[NodeVisit, SleepingNode] = field(default_factory=dict)

    def add(self, frame: SectionFrame, node_ids: Sequence[str]) -> None:
        """Add ready nodes of a frame to the work, and count them as open.

        Nodes that settled in an earlier attempt are restored before others run, in their old order.
        """
        frame.open += len(node_ids)
        if not frame.recorded:
            for node_id in node_ids:
                self.ready.append((frame, node_id))
            return
        for node_id in node_ids:
            recorded = frame.recorded.get(node_id)
            if recorded is not None and recorded.status in SETTLED_STATUSES:
                heappush(self.settled_before, (recorded.sequence, node_id, frame))
            else:
                self.ready.append((frame, node_id))

    def drop_frames(self, frames: Collection[SectionFrame]) -> list[NodeVisit]:
        """Remove the ready and sleeping nodes of frames, such as those of a canceled iteration, and cancel their
        running nodes without side effects; return the visits that were sleeping, for the caller to record.

        Removed nodes are no longer counted as open. Running nodes with side effects (writes) continue; the others are
        not waited for.
        """
        dropped = [frame for frame, _ in self.ready if frame in frames]
        dropped += [frame for _, _, frame in self.settled_before if frame in frames]
        if dropped:
            self.ready = deque(entry for entry in self.ready if entry[0] not in frames)
            self.settled_before = [entry for entry in self.settled_before if entry[2] not in frames]
            heapify(self.settled_before)
        asleep = [visit for visit in self.sleeping if visit.frame in frames]
        for visit in asleep:
            del self.sleeping[visit]
        for frame in (*dropped, *(visit.frame for visit in asleep)):
            frame.open -= 1
        for task, visit in self.tasks.items():
            if visit.frame in frames and not visit.is_write:
                task.cancel()
        return asleep

    @property
    def has_write_at_work(self) -> bool:
        return any(visit.is_write for visit in self.tasks.values())

    @property
    def next_wake(self) -> float | None:
        """Earliest wake time of the sleeping nodes, in seconds of `time.monotonic`; None if none wakes by itself."""
        return min((one.wakes_at for one in self.sleeping.values() if one.wakes_at is not None), default=None)

    @property
    def held_until(self) -> float:
        """Time by `time.monotonic` until which the run may keep its worker while its nodes sleep."""
        return max((sleeper.held_until for sleeper in self.sleeping.values()), default=0.0)
