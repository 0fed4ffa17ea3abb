"""Database operations on the path of a run: a few batched statements, each one transaction.

Two implementations, `journal.sqlite.sqlite_store` and `journal.postgresql.postgresql_store`, give the same guarantees
and pass the same tests. Times are the database's own. Every change of an execution names the status and the token that
it leaves; the returned rows say which changes were made. A batch is sorted by the key that can conflict, so that
concurrent batches can't deadlock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Final, NamedTuple, Protocol

import msgspec
from msgspec import Struct, field

from engine.agents.agent_steps import AgentStep
from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunError, RunStatus
from journal.explanations.blockers import BlockerCode
from models.execution_status import MAX_PERCENT_UNDER_WAY, ExecutionStatus
from models.loss_limits import MAX_ISOLATION_LOSSES
from models.timestamps import DatabaseClock

DIRECT_LEASE_SECONDS: Final = 5.0
"""First lease of a run that is assigned to a worker; a run whose message is lost costs this time."""
DIRECT_TOKEN: Final = 1
"""Fencing token of an assigned run, as after a first claim."""


class ExecutionKey(NamedTuple):
    """Key of a run's rows."""

    execution_id: str
    shard: int


class DefinitionKey(NamedTuple):
    """Key of a definition's row."""

    organization_id: str
    hash: str
    shard: int


class IdempotencyKey(Struct, frozen=True):
    """Key under which a repeated request is recognized, with the fingerprint of the request."""

    scope: str
    key: str
    fingerprint: str
    lifetime_seconds: int = 86_400


class RunAcceptance(msgspec.Struct, frozen=True):
    """Run to accept, with its row and its data."""

    execution_id: str
    shard: int
    organization_id: str
    workflow_id: str
    workflow_revision: int
    """The revision that was checked; the run is refused if the workflow has changed since."""
    user_id: str
    trigger_type: str
    trigger: str
    """JSON text."""
    config: str
    """JSON text."""
    definition_hash: str
    definition: str | None
    """Text of the definition if it may not be stored yet; None if it is known to be stored."""
    timeout_seconds: float
    total_nodes: int
    channel: str = ""
    """Channel to notify of the end of the run."""
    priority: int = 0
    idempotency: IdempotencyKey | None = None
    parent_id: str | None = None
    """Execution that starts this run. `root_id` is the first of its ancestors, and `depth` is their number.
    """
    root_id: str | None = None
    depth: int = 0
    concurrency_key: str | None = None
    """Key under which at most `concurrency_limit` runs have a slot; None without a limit."""
    concurrency_limit: int | None = None
    may_wait: bool = True
    """Whether the run may wait for a slot; otherwise it is refused unless a slot is free."""
    completion_action: str | None = None
    """Completion actions as JSON text."""
    assigned_deployment_id: str | None = None
    """Deployment whose pods run it; None: any worker."""
    is_private: bool = False
    """Visible only to its user and to users who may change the workflow."""
    is_tainted: bool = False
    """Whether the run that starts it may have put text of outsiders into its input."""
    labels: Sequence[tuple[str, str]] = ()
    """Tags and metadata, as in `journal.run_labels`."""
    trace_origin: str | None = None
    """Request and span that start the run, as in `telemetry.run_origin`; None without both."""
    worker: str = ""
    """Worker that the run is assigned to: it is inserted as if claimed. Empty: it is pending."""


class IngestedRun(RunAcceptance, frozen=True):
    """Run to accept for an inbound request."""

    delay_until: datetime | None = None
    """Earliest time of its start."""
    is_read: bool = True
    """Whether its mail is parsed. An unparsed run can't be claimed by executors until its mail is parsed."""


class EmittedEvent(msgspec.Struct, frozen=True):
    """Event as its sender reported it."""

    event_id: str
    event_type: str
    source: str
    data: str
    """JSON text."""


class InboundRequest(msgspec.Struct, kw_only=True):
    """Inbound request with its sender, content and outcome, and with all its runs once they are planned.

    A store writes it completely or not at all, as a delivery.
    """

    delivery_id: str
    route: str
    shard: int
    organization_id: str
    user_id: str
    sender: str
    """Label of the sender: `api-key:`, `trigger-token:` or `event-token:` with an id, or the name of a provider."""
    content_hash: str
    """SHA-256 of the body, in hexadecimal."""
    content_bytes: int
    workflow_id: str | None = None
    """None: an event, which goes to all its subscribers."""
    payload: str | None = None
    """Input of a run as JSON, once it is known; stored with a refusal, so that the request can be redriven.
    """
    deduplication_key: IdempotencyKey | None = None
    """Key derived from the sender's own id; a redrive uses up the same key as a repetition."""
    redriven_from: str | None = None
    runs: Sequence[IngestedRun] = ()
    status: int = 201
    """HTTP status of the response."""
    outcome: str = "accepted"
    reason: str | None = None
    """Reason of a deferral: `code: message`."""
    not_before: datetime | None = None
    """Earliest start of its runs, if it is known."""
    event: EmittedEvent | None = None
    answer: str | None = None
    """Result of an event, as JSON text. Without it, the ids of accepted runs are stored if there are several.
    """
    idempotency: IdempotencyKey | None = None
    """Key of the whole request.

    Runs may have their own keys; a run that was accepted before is not accepted again.
    """


class IngestResult(msgspec.Struct, frozen=True):
    """Result of an inbound request."""

    verdict: AcceptanceVerdict
    """Verdict on the whole request.

    ACCEPTED even if some of its runs are not; REPEATED and MISMATCH by its own key; STALE if one of its
    workflows has changed, and then nothing is stored.
    """
    delivery_id: str
    """Id of the first delivery with its key, if the key was used before."""
    runs: Sequence[AcceptanceResult] = ()
    """Results of its runs, in their order; empty unless the request was accepted."""


class AcceptanceVerdict(StrEnum):
    """Verdict on an acceptance."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    """The key was used before; `execution_id` is that of the first run."""
    MISMATCH = "mismatch"
    """The key was used before with another body."""
    STALE = "stale"
    """The workflow has changed or was deleted."""
    FULL = "full"
    """No slot of its concurrency key is free, and the run may not wait."""


class AcceptanceResult(msgspec.Struct, frozen=True):
    """Result of an acceptance."""

    verdict: AcceptanceVerdict
    execution_id: str
    started_at: datetime | None = None
    """Start of a run that is assigned to a worker, by the database's clock; None if its answer was lost."""


class ClaimQuery(Struct, frozen=True):
    """Query of a worker for runs to claim."""

    owner: str
    lease_seconds: float
    limit: int
    after_organization: str = ""
    """Organization that was served last; organizations are served in turn."""
    turns: Mapping[str, int] = field(default_factory=dict)
    """First queue turn to serve in each organization, by its id, since workflows are served in turn; default
    0.
    """
    target: str = "shared"
    excluded_organizations: Sequence[str] = ()
    """Organizations to skip."""
    is_trial: bool = False
    """Claim suspects for a trial in isolation; otherwise only runs that aren't suspects are claimed."""
    max_isolation_losses: int = MAX_ISOLATION_LOSSES
    """Limit of workers lost in trials; suspects above it are skipped."""


class ClaimedRun(msgspec.Struct, frozen=True):
    """Run that this worker holds until its lease ends."""

    execution_id: str
    shard: int
    organization_id: str
    workflow_id: str
    definition_hash: str
    token: int
    attempt: int
    key_id: str
    has_journal: bool
    trigger: str
    started_at: datetime
    deadline_at: datetime
    request: str | None
    channel: str
    """Channel to notify of the end of the run."""
    user_id: str
    """User on whose behalf it runs."""
    wait_answer_count: int
    """Number of answers that its waiting nodes have got so far."""
    concurrency_key: str | None
    """Concurrency key; its slot is free for another run when this run ends or waits. None without a limit."""
    completion_action: str | None = msgspec.field(name="follow_up")
    """Completion actions as JSON text."""
    may_have_more: bool
    """Whether its workflow's share of the claim was used up, so that more of its runs may wait."""
    claimed_at: datetime | None = None
    """Time by the database's clock; None from a gateway of an earlier version."""
    write_key_id: str = ""
    """Execution id in idempotency keys; empty: `key_id`."""
    log_level: str | None = None
    """Log level of its workflow, which the gateway tells pods."""
    trace_origin: str | None = None
    """Request and span that started it, as in `telemetry.run_origin`; None without both."""
    is_tainted: bool = False
    """Whether the run that started it may have put text of outsiders into its input."""


class LeaseRenewal(Struct, frozen=True):
    """Lease to renew."""

    execution_id: str
    shard: int
    token: int


STATUS_AFTER: Final = {
    RunStatus.COMPLETED: ExecutionStatus.COMPLETED,
    RunStatus.FAILED: ExecutionStatus.FAILED,
    RunStatus.STOPPED: ExecutionStatus.STOPPED,
    RunStatus.CANCELLED: ExecutionStatus.CANCELLED,
    RunStatus.WAITING: ExecutionStatus.WAITING,
    RunStatus.RELEASED: ExecutionStatus.PENDING,
}
"""Status of an execution after a write with this end."""


class RunWrite(msgspec.Struct):
    """Records of one run to write; nothing is written unless the run still holds its token."""

    execution_id: str
    shard: int
    token: int
    spans: list[NodeSpan] = []
    """Spans in the order of their recording; the last span of a node counts."""
    logs: list[LogLine] = []
    completed_nodes: int = 0
    """Total number of settled nodes."""
    progress: Annotated[int, msgspec.Meta(ge=0, le=MAX_PERCENT_UNDER_WAY)] = 0
    """Completed share of the run in percent; the stored value never decreases."""
    has_new_result: bool = False
    """Whether a node was settled: then earlier lost attempts no longer count against the run."""
    has_passed: bool = False
    """Whether it has passed its trial: then the death of its worker doesn't count as a loss on trial."""
    end: RunStatus | None = None
    """Outcome of this claim; None: the run continues."""
    channel: str = ""
    """Channel to notify besides the watchers of the run."""
    error: RunError | None = None
    due_at: datetime | None = None
    wait_answer_count: int = 0
    """Number of answers that it has seen; a waiting run with more answers continues at once."""
    keeps_place: bool = False
    """Whether it keeps the slot of its concurrency key while it waits or is released, since it has an open task."""
    blocked_by: BlockerCode | None = None
    """Reason for a wait, which opens a blocked interval."""
    blocked_node: str | None = None
    metadata: dict[str, str] = {}
    """Metadata that its nodes have set, by key; a new value replaces that of its key."""
    cancelled_tasks: list[tuple[str, str]] = []
    """Node and iteration of each task that the run has no use for."""
    organization_id: str = ""
    """Organization whose task workers are notified; empty if it has no new or cancelled tasks."""
    attempts: list[AttemptSpan] = []
    """Attempts, each with a span of its node; the last record of an attempt counts."""
    steps: list[AgentStep] = []
    """Steps of agents; the last record of a step counts."""
    clock_moved: int | None = None
    """`HOST_TIME.moved` when its deadlines were computed in this process; None: they follow no clock."""

    def follow_clock(self, moved: int) -> None:
        """Move the deadlines in this write by as much as the clock was moved since they were computed; `moved` is
        `HOST_TIME.moved`, in microseconds. A second call with the same value changes nothing.

        Stored deadlines were moved with the clock, in one transaction, which this write was not part of.
        """
        if self.clock_moved is None or self.clock_moved == moved:
            return
        step = timedelta(microseconds=moved - self.clock_moved)
        self.clock_moved = moved
        self.spans = [
            span if span.wake_at is None else msgspec.structs.replace(span, wake_at=span.wake_at + step)
            for span in self.spans
        ]
        if self.due_at is not None:
            self.due_at += step


class RenewalResult(Struct, frozen=True):
    """Result of the renewal of a lease, with the request of a client for the run."""

    execution_id: str
    request: str | None
    is_locked: bool = False
    """Whether the lease was neither renewed nor lost, since another transaction has locked the row."""


class RunProgressReport(msgspec.Struct, frozen=True):
    """Progress of a run as a poll shows it."""

    execution_id: str
    status: ExecutionStatus
    completed_nodes: int
    total_nodes: int
    error: str | None
    """JSON text."""
    outputs: Sequence[tuple[str, str]]
    """Node id and JSON text of each node with an output."""
    percent: int = 0
    """Completed share of the run in percent, while it is in progress."""
    references: Sequence[str] = ()
    """Ids of the nodes whose text is the reference to a blob."""


class SweepResult(Struct, frozen=True):
    """Result of a sweep."""

    requeued: int
    """Number of runs with an expired lease that are pending again."""
    ended: Mapping[str, str]
    """Channels of the executions that the sweep itself ended as crashed, stopped or cancelled, by execution
    id.
    """
    due: int
    """Number of runs with an ended wait that are pending again."""
    has_pending: bool
    """Whether there are runs that nobody has claimed."""


class EndRequestOutcome(Struct, frozen=True):
    """Result of a stop or cancel request."""

    status: ExecutionStatus
    lease_owner: str | None
    """Worker to notify, if it holds the run."""
    channel: str = ""
    """Channel to notify, if the request ended the run."""
    organization_id: str = ""
    """Organization whose task workers are notified of cancelled tasks."""


class RunStore(Protocol):
    """Operations of executors on a database, or on a gateway where executors have no database.

    Every method raises `DatabaseUnavailable` when it can't be reached.
    """

    clock: DatabaseClock
    """Clock that learns the database's time at least from answers to claims and renewals."""

    async def claim(self, claim: ClaimQuery) -> Sequence[ClaimedRun]:
        """Claim up to `claim.limit` pending runs of a target: set lease and fencing token, and count the attempt.

        Organizations are served in turn, and so are the workflows of each; the answers are in that order. A
        claim for trial takes suspects instead.
        """

    async def has_suspects(self, max_isolation_losses: int, target: str = "shared") -> bool:
        """Return whether suspects of a target (runs that lost several workers) wait for a trial.

        Those that lost more than `max_isolation_losses` workers in trials don't count.
        """

    async def record(self, batch: Sequence[RunWrite], *, owner: str = "") -> frozenset[str]:
        """Write the records of runs; return the ids of runs that still held their fencing token.

        Other runs write nothing. A batch has at most one write per run. With an `owner`, only runs that it
        has leased are written. Raises `PartialCommit` if other transactions had locked some of the rows; the
        rest was written then.
        """

    async def renew(
        self, held: Sequence[LeaseRenewal], lease_seconds: float, *, owner: str = ""
    ) -> Sequence[RenewalResult]:
        """Extend leases to `lease_seconds` from now, only those of `owner` if it is given; return a result for each
        lease that is still held.

        A lease without a result is lost. One with `is_locked` is still held, but was not extended. A result has a
        client's request to stop or cancel the run.
        """

    async def definitions(self, keys: Sequence[DefinitionKey]) -> dict[DefinitionKey, str]:
        """Return the JSON texts of definition snapshots by their keys; missing ones are left out."""

    async def spans(self, keys: Sequence[ExecutionKey]) -> dict[str, list[NodeSpan]]:
        """Return the recorded spans of runs by execution id, ordered by sequence number; an empty list for a
        run without.
        """

    async def steps(self, keys: Sequence[ExecutionKey]) -> dict[str, list[AgentStep]]:
        """Return the recorded steps, ended ones too, of those agents that have not ended, by execution id, in the order
        of their numbers.

        Runs without such steps are left out.
        """

    async def last_log_lines(self, keys: Sequence[ExecutionKey]) -> dict[str, int]:
        """Return the highest sequence number of each run's log, by execution id.

        Runs without a log are left out.
        """

    async def promote_due(self) -> int:
        """Make waiting runs pending whose timer, retry, delay or deferral is due; return their number.

        Locked rows are left to a later call.
        """

    async def sweep(self, limit: int) -> SweepResult:
        """Make up to `limit` runs of dead workers pending, or end them; promote due runs; check for pending runs.

        A run ends that was asked to stop or cancel, or lost too many workers. Locked rows are left to the next sweep.
        """

    async def release(self, owner: str, held: Sequence[str]) -> int:
        """Make the running runs of a process pending, except those with ids in `held`; return their number.

        Runs with a request to stop or cancel end instead, and count too. The claims do not count as attempts. Locked
        rows keep their leases until these end.
        """

    async def for_thread(self) -> RunStore:
        """Return a store on the same database for the event loop of another thread: this store itself, or another one,
        which the caller closes.
        """

    async def close(self) -> None:
        """Close connections and threads after their work in progress; the store is unusable then."""


class JournalStore(RunStore, Protocol):
    """Operations on runs in one database: those of executors, and those of gateways and schedulers."""

    async def accept(self, batch: Sequence[RunAcceptance]) -> Sequence[AcceptanceResult]:
        """Insert runs; answers are in the order of the batch. Runs that need a free slot at once may be inserted in
        transactions of their own.

        An answer tells whether the run is new, repeats an idempotency key, conflicts with it, is stale (its workflow
        has changed), or found no free slot. A run that an earlier call with a lost answer has inserted counts as new,
        and stays as it is.
        """

    async def return_direct(self, keys: Sequence[ExecutionKey]) -> int:
        """Make assigned runs pending that their worker has not received; return their number.

        An assigned run was inserted as claimed by a worker. The lost assignment doesn't count as an attempt.
        Locked rows are left to the end of their leases.
        """

    async def ingest(self, batch: Sequence[InboundRequest]) -> Sequence[IngestResult]:
        """Store inbound requests with deliveries and runs, each request in one transaction; answers are in the order of
        the batch.

        An answer tells whether the request is accepted, repeats an idempotency key, conflicts with it, or is stale (a
        workflow has changed, and nothing is stored). An accepted one has the answer of each run, as `accept` gives it.
        A request that an earlier call with a lost answer has stored is accepted again, and stays as it is.
        """

    async def progress(self, keys: Sequence[ExecutionKey]) -> Sequence[RunProgressReport]:
        """Return status, progress and error of runs, with the outputs of nodes of ended runs; unknown runs are left
        out.

        An output in a blob is its reference, and `references` has the ids of these nodes.
        """

    async def reclaim(self, owner_prefix: str, *, out_of_memory: bool = False) -> int:
        """Make all runs of dead processes pending, or end them, without waiting for their leases; return their number.

        A run ends that was asked to stop or cancel, or lost too many workers. The owners are those whose names begin
        with `owner_prefix`. If the process ran out of memory, all its runs become suspects with a loss that counts. If
        one of its runs was on trial, the loss counts for that run alone.
        """

    async def request_end(self, key: ExecutionKey, request: str) -> EndRequestOutcome | None:
        """Request a run to `stop` or `cancel`; return its status after that, its lease owner (None if no process holds
        it), channel and organization. None for an unknown run.

        A run that no process holds ends at once; another ends when its process sees the request. A request to cancel is
        never replaced, and an ended run stays as it is.
        """
