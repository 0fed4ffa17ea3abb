"""Database operations on the path of a run: a few batched statements, each one transaction.

Two implementations, `journal.sqlite.sqlite_store` and `journal.postgresql.postgresql_store`, give the same guarantees
and pass the same tests. Times are the database's own. Every change of an execution names the status and the token that
it leaves; the returned rows say which changes were made. A batch is sorted by the key that can conflict, so that
concurrent batches can't deadlock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Annotated, NamedTuple, Protocol

import msgspec

from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunError, RunStatus
from models.database_clock import DatabaseClock
from models.execution_status import MAX_PERCENT_UNDER_WAY, ExecutionStatus
from models.loss_limits import MAX_ISOLATION_LOSSES


class ExecutionKey(NamedTuple):
    """Where a run's rows are."""

    execution_id: str
    shard: int


class DefinitionKey(NamedTuple):
    """Where a definition is."""

    organization_id: str
    hash: str
    shard: int


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A client's promise that two requests are one."""

    scope: str
    key: str
    fingerprint: str
    lifetime_seconds: int = 86_400


class RunAcceptance(msgspec.Struct, frozen=True):
    """A run to be accepted: one row, and what comes with it."""

    execution_id: str
    shard: int
    organization_id: str
    workflow_id: str
    workflow_revision: int
    """The revision that was checked; the row is refused when the workflow has moved on."""
    user_id: str
    trigger_type: str
    trigger: str
    """JSON text."""
    config: str
    """JSON text."""
    definition_hash: str
    definition: str | None
    """The definition's text where it may not be stored yet; None where it is known to be."""
    timeout_seconds: float
    total_nodes: int
    channel: str = ""
    """Whom to tell of its end."""
    priority: int = 0
    idempotency: IdempotencyKey | None = None
    parent_id: str | None = None
    """The execution that starts it, the first of those that started one another, and how many they are."""
    root_id: str | None = None
    depth: int = 0
    concurrency_key: str | None = None
    """Where it has one, it waits for a place among the `concurrency_limit` of its key."""
    concurrency_limit: int | None = None
    may_wait: bool = True
    """Where it may not, it is refused unless a place is free."""
    follow_up: str | None = None
    """JSON text: what is to be done about its end."""
    assigned_deployment_id: str | None = None
    """The deployment whose pods are to run it; None: any worker."""
    is_private: bool = False
    """Only its user and those who may change the workflow see it."""


class IngestedRun(RunAcceptance, frozen=True):
    """A run that a sender's request has brought."""

    delay_until: datetime | None = None
    """Not before then."""
    is_read: bool = True
    """What it was brought in is read already; if not, its row is kept from those who run it until that is done."""


class EmittedEvent(msgspec.Struct, frozen=True):
    """Something that has happened, as a sender told it."""

    event_id: str
    event_type: str
    source: str
    data: str
    """JSON text."""


class IngestWrite(msgspec.Struct, frozen=True):
    """A sender's request, and everything that it has brought: all of it is taken in, or nothing."""

    delivery_id: str
    shard: int
    organization_id: str
    workflow_id: str | None
    user_id: str
    route: str
    sender: str
    content_hash: str
    content_bytes: int
    outcome: str
    status: int
    runs: Sequence[IngestedRun]
    event: EmittedEvent | None = None
    answer: str | None = None
    """JSON text: what has come of an event. Without one, the ids of several runs that were taken in are kept."""
    idempotency: IdempotencyKey | None = None
    """Of all of it; runs may have keys of their own, and those that were taken in before are not taken in again."""
    redriven_from: str | None = None


class IngestResult(msgspec.Struct, frozen=True):
    """The answer to an arrival."""

    verdict: AcceptanceVerdict
    """ACCEPTED, though some of its runs may not be; REPEATED and MISMATCH by its own key; STALE where one of its
    workflows has changed: nothing was taken in then.
    """
    delivery_id: str
    """Of the first one with its key, where that was used before."""
    runs: Sequence[AcceptanceResult] = ()
    """In their order; empty unless it was accepted."""


class AcceptanceVerdict(StrEnum):
    """What became of an acceptance."""

    ACCEPTED = "accepted"
    REPEATED = "repeated"
    """The key was used before: `execution_id` is the first one's."""
    MISMATCH = "mismatch"
    """The key was used before, with another body."""
    STALE = "stale"
    """The workflow has changed, or is gone."""
    FULL = "full"
    """As many runs of its key as may go on at once do, and it may not wait."""


class AcceptanceResult(msgspec.Struct, frozen=True):
    """The answer to an acceptance."""

    verdict: AcceptanceVerdict
    execution_id: str


@dataclass(frozen=True, slots=True)
class ClaimQuery:
    """What a worker asks for."""

    owner: str
    lease_seconds: float
    limit: int
    after_organization: str = ""
    """Organisations are served in turn: the one that was served last."""
    turns: Mapping[str, int] = field(default_factory=dict)
    """Within an organisation, workflows are served in turn: where to begin in each, which is 0 where it isn't said."""
    target: str = "shared"
    others_than: Sequence[str] = ()
    """Organisations that are to be passed over."""
    is_trial: bool = False
    """Take suspects, and put them on trial; without it, only runs that are none are taken."""
    max_isolation_losses: int = MAX_ISOLATION_LOSSES
    """Suspects that have lost more workers on trial are passed over."""


class ClaimedRun(msgspec.Struct, frozen=True):
    """A run that is now this worker's, until its lease ends."""

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
    """Whom to tell of its end."""
    user_id: str
    """For whom it runs."""
    wait_answer_count: int
    """Answers that its waiting nodes have been given so far."""
    concurrency_key: str | None
    """Where it has one, its place is another's when it leaves."""
    follow_up: str | None
    """JSON text: what is to be done about its end."""
    may_have_more: bool
    """Its workflow's share of the claim was used up: more may wait behind it."""
    claimed_at: datetime | None = None
    """By the database's clock; None from a gateway of an earlier version."""


@dataclass(frozen=True, slots=True)
class LeaseRenewal:
    """A lease to be renewed."""

    execution_id: str
    shard: int
    token: int


class RunWrite(msgspec.Struct):
    """What one run wants written; nothing is, unless it still holds its token."""

    execution_id: str
    shard: int
    token: int
    spans: list[NodeSpan] = []
    """In the order in which they were recorded; the last one of a node counts."""
    logs: list[LogLine] = []
    completed_nodes: int = 0
    """Settled so far, in all."""
    progress: Annotated[int, msgspec.Meta(ge=0, le=MAX_PERCENT_UNDER_WAY)] = 0
    """Percent of the run that is done; what is stored never goes down."""
    has_new_result: bool = False
    """A node was settled: attempts lost before this don't count against the run any more."""
    has_passed: bool = False
    """It has been on trial for long enough: should its worker die, the loss doesn't count as one on trial."""
    end: RunStatus | None = None
    """None: it goes on."""
    channel: str = ""
    """Whom to tell besides those that watch the run."""
    error: RunError | None = None
    due_at: datetime | None = None
    wait_answer_count: int = 0
    """Answers that it has seen: a run that waits, and was given more, goes on at once."""
    attempts: list[AttemptSpan] = []
    """Each beside a span of its node; the last one of an attempt counts."""


@dataclass(frozen=True, slots=True)
class RenewalResult:
    """A lease that was renewed, and what a client asked of the run meanwhile."""

    execution_id: str
    request: str | None
    is_locked: bool = False
    """The lease was neither renewed nor lost: another transaction has the row."""


class RunProgressReport(msgspec.Struct, frozen=True):
    """What a poll shows."""

    execution_id: str
    status: ExecutionStatus
    completed_nodes: int
    total_nodes: int
    error: str | None
    """JSON text."""
    outputs: Sequence[tuple[str, str]]
    """Node id and JSON text, of nodes that have one."""
    percent: int = 0
    """Of the run that is done, while it goes on."""
    references: Sequence[str] = ()
    """Ids of the nodes whose text is the reference to a blob."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep found."""

    requeued: int
    """Leases that had ended: back in the queue."""
    ended: Mapping[str, str]
    """Executions that the sweep itself brought to an end, crashed, stopped or cancelled, and the channel of each."""
    due: int
    """Waits that are over: back in the queue."""
    has_pending: bool
    """There is work that nobody has claimed."""


@dataclass(frozen=True, slots=True)
class EndRequestOutcome:
    """What became of a request to stop or cancel."""

    status: ExecutionStatus
    lease_owner: str | None
    """Whom to tell, where a worker holds the run."""
    channel: str = ""
    """Whom to tell, where it has ended by this."""


class RunStore(Protocol):
    """What whoever runs executions asks for: of a database, or of a gateway where none is at hand.

    Every method raises `DatabaseUnavailable` when it can't be reached.
    """

    clock: DatabaseClock
    """Learned from the answers to claims and renewals, if from nothing else."""

    async def claim(self, claim: ClaimQuery) -> Sequence[ClaimedRun]:
        """Take the best pending runs, counting the attempt; answers in the order of the turns."""

    async def has_suspects(self, max_isolation_losses: int, target: str = "shared") -> bool:
        """Tell whether suspects wait to be put on trial, which have lost no more workers so."""

    async def record(self, batch: Sequence[RunWrite], *, owner: str = "") -> frozenset[str]:
        """Write what runs have done, at most one write a run; returns the ids of those that still held their token.

        With an `owner`, nothing is written of runs that are leased by another. Raises `PartialCommit` where other
        transactions kept some of the rows locked; the rest was written then.
        """

    async def renew(
        self, held: Sequence[LeaseRenewal], lease_seconds: float, *, owner: str = ""
    ) -> Sequence[RenewalResult]:
        """Extend leases, of one `owner` alone where one is named; a lease that is not among the answers is lost."""

    async def definitions(self, keys: Sequence[DefinitionKey]) -> dict[DefinitionKey, str]:
        """Return the texts of definitions."""

    async def spans(self, keys: Sequence[ExecutionKey]) -> dict[str, list[NodeSpan]]:
        """Return what was recorded of runs, by execution id, in the order of their sequence numbers."""

    async def last_log_lines(self, keys: Sequence[ExecutionKey]) -> dict[str, int]:
        """Return the highest sequence number of each run's log, by execution id; those without a log are left out."""

    async def promote_due(self) -> int:
        """Put waits that are over back in the queue; returns how many. Rows that others have locked wait for later."""

    async def sweep(self, limit: int) -> SweepResult:
        """Take back what dead workers held, then promote what is due, and look whether work lies about.

        Rows that others have locked are left to the next sweep, as `release` and `reclaim` leave them.
        """

    async def release(self, owner: str, held: Sequence[str]) -> int:
        """Give back, uncounted, what its living owner never began: all but the `held` runs; returns how many."""

    async def for_thread(self) -> RunStore:
        """Return a store on the same database for the event loop of another thread."""

    async def close(self) -> None:
        """Let go of connections and threads, after what is under way."""


class JournalStore(RunStore, Protocol):
    """The run path's view of one database."""

    async def accept(self, batch: Sequence[RunAcceptance]) -> Sequence[AcceptanceResult]:
        """Insert runs, in one transaction; answers in the order of the batch."""

    async def ingest(self, batch: Sequence[IngestWrite]) -> Sequence[IngestResult]:
        """Keep what senders have brought, each in one transaction; answers in the order of the batch."""

    async def progress(self, keys: Sequence[ExecutionKey]) -> Sequence[RunProgressReport]:
        """Return where runs are; outputs of those only that have ended."""

    async def reclaim(self, owner_prefix: str, *, out_of_memory: bool = False) -> int:
        """Take back, at once, the leases of owners that are known to be dead; returns how many.

        Of a process that ran out of memory, all that it held are suspects from then on, with a loss that counts; or the
        one alone that was on trial.
        """

    async def request_end(self, key: ExecutionKey, request: str) -> EndRequestOutcome | None:
        """Ask a run to `stop` or `cancel`: ends it at once where nobody holds it; None where there is no such run."""
