"""Plan of a replay: which results of an ended run are reused, which nodes run again, and why.

`engine.replay_planner` makes the plan from the facts and options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from msgspec import Struct, field

from engine import values
from engine.node_api import NodeEffect

if TYPE_CHECKING:
    from datetime import datetime

    from engine.agents.agent_steps import StepReuse
    from engine.graph import ParsedGraph
    from engine.program import WorkflowProgram
    from engine.run_clock import RunClock
    from engine.run_records import NodeSpan
    from engine.services import RunCaller
    from engine.values import Json


class ReplayDecision(StrEnum):
    """Decision about one node of a replay."""

    REUSE = "reuse"
    """Its recorded result holds."""
    RERUN = "rerun"
    """It runs if it is reached."""
    MAYBE = "maybe"
    """It runs unless its input turns out to be the recorded one."""
    ASK = "ask"
    """It is a write that would be repeated: it runs only if it is confirmed."""
    SKIP = "skip"
    """It does not run: it is a write that is left out and has no result, or only such nodes lead to it."""


class ReplayReasonCode(StrEnum):
    """Reason for a decision."""

    UNCHANGED = "unchanged"
    FORCED = "forced"
    NO_RESULT = "no-result"
    FAILED = "failed"
    CONFIG_CHANGED = "config-changed"
    MAPPING_CHANGED = "mapping-changed"
    TYPE_VERSION_CHANGED = "type-version-changed"
    IMPLEMENTATION_CHANGED = "implementation-changed"
    INPUT_CHANGED = "input-changed"
    SOURCE_CHANGED = "source-changed"
    REFRESHED = "refreshed"
    RESULT_EXPIRED = "result-expired"
    NEW_NODE = "new-node"
    REMOVED_NODE = "removed-node"
    UPSTREAM_MAYBE = "upstream-maybe"
    WRITE_NEEDS_CONFIRM = "write-needs-confirm"
    LEFT_OUT = "left-out"
    UPSTREAM_LEFT_OUT = "upstream-left-out"
    CONTENT_NOT_RECORDED = "content-not-recorded"
    """An agent asks its model again, since it keeps no answers, or has kept none."""


class ResultUse(StrEnum):
    """Use that a replay makes of the recorded span of a node."""

    NONE = "none"
    SETTLED = "settled"
    """The node starts as settled."""
    IN_FLIGHT = "in-flight"
    """The recorded request is repeated under its recorded idempotency key."""
    CANDIDATE = "candidate"
    """Used if the key turns out to be the same; the node runs otherwise."""
    UNCONFIRMED = "unconfirmed"
    """Used if the key turns out to be the same; the node fails otherwise."""
    LEFT_OUT = "left-out"
    """The node starts as skipped."""
    ITERATIONS = "turns"
    """The completed iterations of a loop are kept, and the failed ones run again."""


class ReplayReason(Struct, frozen=True):
    """Reason for a decision, with the places that it is about."""

    code: ReplayReasonCode
    paths: tuple[str, ...] = ()


class NodeReplay(Struct, frozen=True):
    """Decision about one node."""

    node_id: str
    decision: ReplayDecision
    effect: NodeEffect
    reasons: tuple[ReplayReason, ...]
    use: ResultUse = ResultUse.NONE
    failed_only: bool = False
    """Whether a loop runs its failed iterations alone."""
    confirmed: bool = False
    seconds: float = 0.0
    """Duration of its recorded run."""
    answers: int = 0
    """Recorded answers of an agent that are used again, as long as the requests to its model are the same."""
    answer_reuse: StepReuse | None = None
    """Use of these answers; None without any."""


class ReplayOptions(Struct, frozen=True):
    """Choices of the caller."""

    forced: frozenset[str] = frozenset()
    """Nodes that run again in any case; a node in a loop runs again with its loop."""
    refreshes_reads: bool = False
    """Whether nodes of the effect `read` run again."""
    refreshes_models: bool = False
    """Whether agents ask their models where a request isn't the recorded one."""
    confirmed: frozenset[str] = frozenset()
    """Writes that may be repeated."""
    left_out: frozenset[str] = frozenset()
    """Writes outside of loops, and loops that write, that do not run: their results are reused, and without one they
    are skipped.
    """
    failed_only: bool = False
    """Whether loops keep completed iterations although their bodies have changed."""


class RecordedAnswers(Struct, frozen=True):
    """Number of recorded answers of an agent, in all iterations."""

    total: int
    unfinished: int
    """Answers of it where it has no result."""
    has_unrecorded_contents: bool = False
    """Whether it has given answers whose contents are not recorded, which are not counted."""


class ReplayFacts(Struct, frozen=True):
    """Everything that a plan depends on."""

    caller: RunCaller
    """Identity of the recorded run."""
    started_at: datetime
    clock: RunClock
    original: ParsedGraph
    """Definition of the recorded run, without models and tools of agents."""
    program: WorkflowProgram
    """Definition to run."""
    trigger: Json
    """Output of the trigger node, new or recorded."""
    has_new_input: bool
    spans: Sequence[NodeSpan]
    """Recorded spans outside of loops; outputs may be missing unless `has_outputs`."""
    has_outputs: bool = False
    written_in_loops: frozenset[str] = frozenset()
    """Nodes in loops with a completed span, or a write with an unknown end, in any iteration."""
    written_in_failed_iterations: frozenset[str] = frozenset()
    """The same nodes, in iterations that have not completed."""
    written_in_earlier_loops: frozenset[str] = frozenset()
    """Those of them that have written in iterations of which the recorded run has no spans: it has reused or skipped
    their loops.
    """
    revisions: Mapping[str, int] = field(default_factory=dict)
    """Current revisions of the data sources that recorded nodes have used; deleted ones are absent."""
    expired: frozenset[str] = frozenset()
    """Nodes whose recorded output is no longer kept."""
    rewired_agents: frozenset[str] = frozenset()
    """Agents whose models or tools are not those of the recorded run."""
    answers: Mapping[str, RecordedAnswers] = field(default_factory=dict)
    """Recorded answers of agents."""


class ReplayPlan(Struct, frozen=True):
    """Plan of a replay."""

    nodes: tuple[NodeReplay, ...]
    """In the order of the graph; nodes on branches that are not taken are omitted."""
    removed: tuple[str, ...]
    """Recorded nodes that the definition to run lacks."""

    @property
    def predicted_seconds(self) -> float:
        """Sum of the recorded durations, in seconds, of the nodes that run or may run."""
        return sum(
            node.seconds
            for node in self.nodes
            if node.decision not in {ReplayDecision.REUSE, ReplayDecision.SKIP}
        )

    @property
    def unconfirmed(self) -> tuple[str, ...]:
        """Ids of the writes that need a confirmation before the replay may start, and have none yet."""
        return tuple(node.node_id for node in self.nodes if node.decision is ReplayDecision.ASK)

    def digest(self, *context: Json) -> str:
        """Return the hash of the plan, as if nothing were confirmed, and of `context`; equal plans have equal hashes.

        It lets a client confirm the very plan that it was shown.
        """
        nodes: list[Json] = [
            [
                node.node_id,
                (ReplayDecision.ASK if node.confirmed else node.decision).value,
                [[reason.code.value, *reason.paths] for reason in node.reasons],
                node.failed_only,
                *([] if node.answer_reuse is None else [node.answers, node.answer_reuse.value]),
            ]
            for node in self.nodes
        ]
        return values.fingerprint([list(context), nodes, list(self.removed)])
