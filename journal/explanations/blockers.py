"""Blockers: codes with their meaning and remedy, and the parts of an explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field

from engine.node_api import AnswerSource
from engine.run_records import SpanStatus

if TYPE_CHECKING:
    from engine.values import Json


class BlockerCode(StrEnum):
    """Reason why a run, a node or a deployment does not move."""

    QUEUED_BEHIND = "queued-behind"
    WAITING_FOR_SLOT = "waiting-for-slot"
    NO_WORKER = "no-worker"
    WAKING = "waking"
    DRAINING = "draining"
    WINDOW_CLOSED = "window-closed"
    STOPPED_MANUALLY = "stopped-manually"
    WORKFLOW_PAUSED = "workflow-paused"
    DEPLOYMENT_FAILED = "deployment-failed"
    RETRY_AT = "retry-at"
    TIMER = "timer"
    AWAITING_EVENT = "awaiting-event"
    AWAITING_INPUT = "awaiting-input"
    AWAITING_TASK = "awaiting-task"
    AWAITING_CALLBACK = "awaiting-callback"
    AWAITING_SIGNAL = "awaiting-signal"
    WORKER_LOST = "worker-lost"
    NODE_RUNNING = "node-running"
    CANCEL_REQUESTED = "cancel-requested"
    BROKER_DOWN = "broker-down"
    NONE = "none"
    PARENTS = "parents"
    BRANCH_NOT_TAKEN = "branch-not-taken"
    PARALLELISM = "parallelism"


class BlockerKind(StrEnum):
    """Kind of remedy."""

    WAIT = "wait"
    """It ends by itself."""
    CHANGE = "change"
    """A user can end it."""
    ESCALATE = "escalate"
    """An operator of the server can end it."""


class BlockerRule(Struct, frozen=True):
    """Kind, meaning and remedy of a code, for answers and documentation."""

    kind: BlockerKind
    meaning: str
    remedy: str


BLOCKER_RULES: Final[Mapping[BlockerCode, BlockerRule]] = {
    BlockerCode.QUEUED_BEHIND: BlockerRule(
        BlockerKind.WAIT,
        "Other runs of the workflow are claimed first, or all workers are full. `position` is its place.",
        "Wait, raise the priority of urgent runs, or start more workers.",
    ),
    BlockerCode.WAITING_FOR_SLOT: BlockerRule(
        BlockerKind.WAIT,
        "The concurrency limit of the workflow is reached. `by` lists the runs that hold the slots.",
        "Wait, cancel a run in `by`, or raise `settings.concurrency`.",
    ),
    BlockerCode.NO_WORKER: BlockerRule(
        BlockerKind.ESCALATE,
        "No worker has reported for 15 seconds. `lastSeen` is the last report of any worker.",
        "Start `pilotflame worker`, or look at the logs of the workers.",
    ),
    BlockerCode.WAKING: BlockerRule(
        BlockerKind.WAIT,
        "The pods of the workflow start. `phase` is `decide`, `schedule` or `start`; `podReason` says why they can't."
        " The start fails at `deadline` unless they make progress; null before one is scheduled.",
        "Wait. With `podReason` `unschedulable`, `quota` or `node-not-ready`, give the cluster more capacity.",
    ),
    BlockerCode.DRAINING: BlockerRule(
        BlockerKind.WAIT,
        "The deployment stops or moves, and claims no further runs.",
        "Wait until the stop is over, or start the workflow.",
    ),
    BlockerCode.WINDOW_CLOSED: BlockerRule(
        BlockerKind.WAIT,
        "The lifecycle policy keeps the workflow stopped until `opensAt`.",
        "Wait, start the workflow by hand, or change its lifecycle policy.",
    ),
    BlockerCode.STOPPED_MANUALLY: BlockerRule(
        BlockerKind.CHANGE, "A user has stopped the deployment.", "Start the workflow."
    ),
    BlockerCode.WORKFLOW_PAUSED: BlockerRule(
        BlockerKind.CHANGE,
        "The workflow is paused. Its runs are kept until it is active again.",
        "Set the status of the workflow to `active`.",
    ),
    BlockerCode.DEPLOYMENT_FAILED: BlockerRule(
        BlockerKind.CHANGE,
        "The pods of the workflow can't start. `podReason` and the message say why.",
        "Correct the reason, then start or deploy the workflow. Otherwise it is started again at `next.at`.",
    ),
    BlockerCode.RETRY_AT: BlockerRule(
        BlockerKind.WAIT, "A node has failed and is tried again at `until`.", "Wait, or stop the run."
    ),
    BlockerCode.TIMER: BlockerRule(
        BlockerKind.WAIT, "The run, or a node of it, waits for the time in `until`.", "Wait."
    ),
    BlockerCode.AWAITING_EVENT: BlockerRule(
        BlockerKind.WAIT,
        "A node waits for an event of the type in `eventType`.",
        "Send the event, or wait until the node times out at `until`.",
    ),
    BlockerCode.AWAITING_INPUT: BlockerRule(
        BlockerKind.CHANGE,
        "A node waits for the answer of a person.",
        "Answer it; the action in `actions` shows the request.",
    ),
    BlockerCode.AWAITING_TASK: BlockerRule(
        BlockerKind.WAIT,
        "A node waits for a worker of its custom type: to begin its task, or to end it. `task` and `state` are those"
        " of the task; `by` is the worker that holds it. The message says if no worker performs such tasks.",
        "Start a worker of the type, with this version or a newer one of its major version, for the pool of the task.",
    ),
    BlockerCode.AWAITING_CALLBACK: BlockerRule(
        BlockerKind.WAIT,
        "A node waits for a request to the callback URL that it has sent. `method` and `url` are those of its request.",
        "Look at the system that got the request, or wait until the node fails at `until`.",
    ),
    BlockerCode.AWAITING_SIGNAL: BlockerRule(
        BlockerKind.WAIT,
        "A node waits for a signal with the name in `signal`.",
        "Send the signal, or wait until the node times out at `until`.",
    ),
    BlockerCode.WORKER_LOST: BlockerRule(
        BlockerKind.WAIT,
        "The process that executes the run no longer renews its lease. Another one continues at `reclaimAt`.",
        "Wait a few seconds.",
    ),
    BlockerCode.NODE_RUNNING: BlockerRule(
        BlockerKind.WAIT,
        "A node is at work. `p95` is the time that 95 % of its recent executions took; `by` lists sub-workflow runs,"
        " and `steps` the model or the tools that an agent waits for.",
        "Wait. If it takes much longer than `p95`, look at the logs of the run.",
    ),
    BlockerCode.CANCEL_REQUESTED: BlockerRule(
        BlockerKind.WAIT,
        "A stop or cancellation is requested. The run ends at the next possible moment, at `hardAt` at the latest.",
        "Wait, or cancel a run that was only stopped.",
    ),
    BlockerCode.BROKER_DOWN: BlockerRule(
        BlockerKind.ESCALATE,
        "Redis does not answer, so workers learn of the run from their next sweep, every two seconds.",
        "Restore Redis. Runs are delayed, not lost.",
    ),
    BlockerCode.NONE: BlockerRule(
        BlockerKind.WAIT, "Nothing blocks it: the next claim takes it, or it has ended.", "Nothing to do."
    ),
    BlockerCode.PARENTS: BlockerRule(
        BlockerKind.WAIT, "Nodes before it have not ended: those in `ids`.", "See why these nodes wait."
    ),
    BlockerCode.BRANCH_NOT_TAKEN: BlockerRule(
        BlockerKind.CHANGE,
        "The node `router` left by another port than `port`, so this node is skipped.",
        "Compare the condition of the router with its input.",
    ),
    BlockerCode.PARALLELISM: BlockerRule(
        BlockerKind.WAIT,
        "As many nodes run as `settings.parallelism` allows.",
        "Wait, or raise `settings.parallelism`.",
    ),
}
"""Every code with its rule."""


def code_of_wait(status: SpanStatus, kind: str | None) -> BlockerCode:
    """Return the code for a node that waits or retries; `kind` is the source of the answer for which it waits, None for
    a timer.

    A retry has `retry-at`. A source without a code of its own, such as a sub-workflow, gives `node-running`.
    """
    if status is SpanStatus.RETRYING:
        return BlockerCode.RETRY_AT
    match kind:
        case None:
            return BlockerCode.TIMER
        case AnswerSource.INPUT:
            return BlockerCode.AWAITING_INPUT
        case AnswerSource.EVENT:
            return BlockerCode.AWAITING_EVENT
        case AnswerSource.TASK:
            return BlockerCode.AWAITING_TASK
        case AnswerSource.CALLBACK:
            return BlockerCode.AWAITING_CALLBACK
        case AnswerSource.SIGNAL:
            return BlockerCode.AWAITING_SIGNAL
        case _:
            return BlockerCode.NODE_RUNNING


class BlockerHolder(Struct, frozen=True):
    """Run, worker or user that holds the thing for which a run waits."""

    type: str
    """`execution`, `worker` or `user`."""
    id: str | None
    """None if the caller may not see it."""
    since: datetime | None


class EndEstimate(Struct, frozen=True):
    """Estimated end of a blocker, and its basis."""

    at: datetime
    basis: str


class SuggestedRequest(Struct, frozen=True):
    """Request of the API that ends or shortens a blocker, with the scope that it needs."""

    method: str
    path: str
    scope: str


class Blocker(Struct, frozen=True):
    """One reason why something does not move."""

    code: BlockerCode
    message: str
    since: datetime | None
    until: datetime | None = None
    """Time at which it ends by itself; None if that is unknown."""
    by: Sequence[BlockerHolder] = ()
    position: int | None = None
    estimate: EndEstimate | None = None
    kind: BlockerKind | None = None
    """None: the kind of the code."""
    actions: Sequence[SuggestedRequest] = ()
    details: Mapping[str, Json] = field(default_factory=dict)
    """Fields of this code, as JSON."""

    @property
    def effective_kind(self) -> BlockerKind:
        """The kind of this blocker if it has its own, else that of its code."""
        return self.kind or BLOCKER_RULES[self.code].kind


class NextEvent(Struct, frozen=True):
    """Next event that moves the run without a request."""

    event: str
    at: datetime


class Explanation(Struct, frozen=True):
    """Explanation of a run or a node at one moment."""

    since: datetime | None
    """Time since which the primary reason holds."""
    is_progressing: bool
    blockers: Sequence[Blocker] = ()
    next: NextEvent | None = None
    checked: Sequence[str] = ()
    unknown: Sequence[str] = ()

    @property
    def primary(self) -> BlockerCode:
        """Code of the first blocker, the one to act on first, or `none`."""
        return self.blockers[0].code if self.blockers else BlockerCode.NONE
