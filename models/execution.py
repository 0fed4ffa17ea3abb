"""Executions: tables of runs, spans, answers and logs. The row of a pending run is its place in the queue.

A pending run is executed even if all messages about it are lost.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    false,
    text,
)
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn
from models.execution_status import (
    ExecutionStatus,
)

SHARED_TARGET = "shared"
"""Target of runs that any worker may claim."""
WORKERS_QUEUE = "workers"
"""Name of the queue of these runs."""
LIMITED_TARGET = "limited"
"""Target of runs that wait for a concurrency slot."""
DELAYED_TARGET = "delayed"
"""Target of runs that may not start before a time, when they get another target.

Ids of workflows sort after all these words.
"""
UNPARSED_TARGET = "intake"
"""Target of runs with unparsed mail."""
ISOLATED_TARGET = "isolated"
"""Target of suspects that any worker may claim, one at a time and in isolation."""
ISOLATED_UNPARSED_TARGET = "isolated-intake"
"""Target of suspects with unparsed mail."""
ISOLATION_TARGETS = {SHARED_TARGET: ISOLATED_TARGET, UNPARSED_TARGET: ISOLATED_UNPARSED_TARGET}
"""Targets with a separate target for their suspects.

Suspects of a deployment keep its target, and are recognized by their losses.
"""
LIVE_CONDITION = "status IN ('pending', 'running', 'waiting')"
UNSUCCESSFUL_CONDITION = "status IN ('failed', 'stopped', 'cancelled')"
UNSETTLED_CONDITION = "status = 'failed' AND settled_at IS NULL"
INTAKE_CONDITION = "trigger_type IN ('queue', 'email', 'event', 'webhook', 'schedule')"
"""Conditions of the indexes of lists by status. SQLite uses them only for queries that repeat the condition.

Completed runs, the most, have no such index: a list finds them by time alone.
"""
LIVE_PRIVATE_CONDITION = "is_private AND ended_at IS NULL"
"""Condition of the index of private runs that have not ended, of which there are few."""
AWAITS_INPUT_CONDITION = 'awaits LIKE \'%"kind":"input"%\''
"""Condition of the index of nodes that wait for input of a person.

It leaves the status out, whose every change would otherwise write to all indexes of spans in PostgreSQL; a node
that ends no longer awaits anything.
"""
PRIORITY_MICROSECONDS = 60_000_000
"""Time by which one step of priority makes a run count as accepted earlier."""


class Execution(SQLModel, table=True):
    """Columns of a run that change while it is live."""

    __table_args__ = (
        Index(
            "ix_execution_pending",
            "target",
            "organization_id",
            "queue_turn",
            "is_fresh",
            "rank",
            postgresql_where=text("status = 'pending'"),
            sqlite_where=text("status = 'pending'"),
        ),
        Index(
            "ix_execution_running",
            "workflow_id",
            postgresql_where=text("status = 'running'"),
            sqlite_where=text("status = 'running'"),
        ),
        Index(
            "ix_execution_failed",
            "workflow_id",
            "ended_at",
            postgresql_where=text("status = 'failed'"),
            sqlite_where=text("status = 'failed'"),
        ),
        Index(
            "ix_execution_waiting",
            "due_at",
            postgresql_where=text("status = 'waiting'"),
            sqlite_where=text("status = 'waiting'"),
        ),
        Index(
            "ix_execution_deferred",
            "target",
            "organization_id",
            "workflow_id",
            postgresql_where=text("status = 'waiting' AND started_at IS NULL"),
            sqlite_where=text("status = 'waiting' AND started_at IS NULL"),
        ),
        Index(
            "ix_execution_children",
            "parent_id",
            postgresql_where=text("parent_id IS NOT NULL AND ended_at IS NULL"),
            sqlite_where=text("parent_id IS NOT NULL AND ended_at IS NULL"),
        ),
        Index(
            "ix_execution_root",
            "root_id",
            postgresql_where=text("root_id IS NOT NULL"),
            sqlite_where=text("root_id IS NOT NULL"),
        ),
        Index(
            "ix_execution_resumed",
            "key_id",
            postgresql_where=text("resumed_from IS NOT NULL"),
            sqlite_where=text("resumed_from IS NOT NULL"),
        ),
        Index(
            "ix_execution_replayed",
            "replay_of",
            postgresql_where=text("replay_of IS NOT NULL"),
            sqlite_where=text("replay_of IS NOT NULL"),
        ),
        Index(
            "ix_execution_line",
            "key_id",
            postgresql_where=text("replay_of IS NOT NULL"),
            sqlite_where=text("replay_of IS NOT NULL"),
        ),
        Index(
            "ix_execution_limited",
            "concurrency_key",
            "is_fresh",
            "rank",
            postgresql_where=text("target = 'limited' AND status = 'pending'"),
            sqlite_where=text("target = 'limited' AND status = 'pending'"),
        ),
        Index(
            "ix_execution_admitted",
            "concurrency_key",
            postgresql_where=text("concurrency_key IS NOT NULL AND target <> 'limited' AND ended_at IS NULL"),
            sqlite_where=text("concurrency_key IS NOT NULL AND target <> 'limited' AND ended_at IS NULL"),
        ),
        Index(
            "ix_execution_completion",
            "completion_due_at",
            "ended_at",
            postgresql_where=text("completion_action IS NOT NULL AND ended_at IS NOT NULL"),
            sqlite_where=text("completion_action IS NOT NULL AND ended_at IS NOT NULL"),
        ),
        Index(
            "ix_execution_unsettled",
            *("organization_id", "created_at", "id"),
            postgresql_where=text(UNSETTLED_CONDITION),
            sqlite_where=text(UNSETTLED_CONDITION),
        ),
        *(
            Index(
                f"ix_execution_dead_{name}",
                *("organization_id", column, "created_at", "id"),
                postgresql_where=text(f"{UNSETTLED_CONDITION} AND {INTAKE_CONDITION}"),
                sqlite_where=text(f"{UNSETTLED_CONDITION} AND {INTAKE_CONDITION}"),
            )
            for name, column in (("workflow", "workflow_id"), ("trigger", "trigger_type"))
        ),
        *(
            Index(
                f"ix_execution_{name}",
                *("organization_id", "status", "created_at", "id"),
                postgresql_where=text(condition),
                sqlite_where=text(condition),
            )
            for name, condition in (("live", LIVE_CONDITION), ("unsuccessful", UNSUCCESSFUL_CONDITION))
        ),
        Index(
            "ix_execution_private",
            "organization_id",
            postgresql_where=text(LIVE_PRIVATE_CONDITION),
            sqlite_where=text(LIVE_PRIVATE_CONDITION),
        ),
        Index(
            "ix_execution_deployed",
            "target",
            "ended_at",
            postgresql_where=text("target <> 'shared' AND target <> 'limited' AND ended_at IS NOT NULL"),
            sqlite_where=text("target <> 'shared' AND target <> 'limited' AND ended_at IS NOT NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    workflow_id: str
    user_id: str
    status: str = ExecutionStatus.PENDING
    target: str = SHARED_TARGET
    """Possible executors: any worker, the pods of the workflow with this id, or none while it waits for a slot."""
    assigned_deployment_id: str | None = None
    """Id of the workflow with the pods that run it, as its target unless that is special, such as `limited`.

    None: any worker may run it.
    """
    trigger_type: str
    definition_hash: str
    rank: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Time of acceptance in microseconds, less a minute for each step of priority.

    Smaller ranks are claimed first.
    """
    queue_turn: int = Field(sa_column=Column(SmallInteger, nullable=False))
    """Hash of the workflow's id: within an organization, workflows are served in the order of their turns."""
    is_fresh: bool = True
    """Whether it was never claimed; claimed runs continue before fresh ones."""
    due_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    token: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Fencing token: increases with every claim and release; writes with an older token change nothing."""
    attempt: int = 0
    """Number of claims since the last recorded node result or release, counted before any work.

    For a pending run, this is the number of workers that it has lost since.
    """
    isolated: bool = Field(
        default=False, sa_column=Column(Boolean, nullable=False, server_default=text("false"))
    )
    """Whether it is on trial as a suspect: then the death of its worker counts against it."""
    isolation_losses: int = Field(
        default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0"))
    )
    """Number of workers lost in trials since the last recorded node result or release."""
    lease_owner: str | None = None
    lease_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    timeout_microseconds: int = Field(sa_column=Column(BigInteger, nullable=False))
    deadline_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    request: str | None = None
    """Request of a client to a claimed run: `stop` or `cancel`."""
    completed_nodes: int = 0
    total_nodes: int = 0
    progress: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0")))
    """Completed share in percent, including iterations of loops; never decreases, and is at most 99."""
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    key_id: str
    """Execution id under which its blobs are stored: its own, or that of the first run of its chain.

    A chain consists of runs that were resumed from, or are replays of, one another.
    """
    resumed_from: str | None = None
    replay_of: str | None = None
    """Execution of which it is a replay, or of which the run that it resumes is one."""
    write_key_id: str | None = None
    """Execution id in idempotency keys; None: `key_id`. A replay has its own id, and its writes new keys."""
    channel: str
    """Channel of the gateway that accepted it, which is notified of its end."""
    parent_id: str | None = None
    """Execution that started it by one of its nodes."""
    root_id: str | None = None
    """First of its ancestors; None for a run that no other run started."""
    depth: int = 0
    """Number of its ancestors."""
    wait_answer_count: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    """Number of answers that its nodes have got: a run that has seen fewer may not start to wait."""
    concurrency_key: str | None = None
    """Key under which runs share `concurrency_limit` slots."""
    concurrency_limit: int | None = None
    completion_action: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Remaining completion actions; None for none, as in most runs."""
    completion_due_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Earliest time of the next attempt: the end of a worker's lease, or of a delay after a failure."""
    completion_outcome: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Progress of external completion actions, for display; None before the first attempt."""
    trace_origin: str | None = None
    """Request and span that started it, as in `telemetry.run_origin`; None without both."""
    is_private: bool = Field(
        default=False, sa_column=Column(Boolean, nullable=False, default=False, server_default=false())
    )
    """Whether it runs content of its user. Then only this user and writers of the workflow see it."""
    is_tainted: bool = Field(
        default=False, sa_column=Column(Boolean, nullable=False, default=False, server_default=false())
    )
    """Whether the run that started it may have put text of outsiders into its input."""
    has_journal: bool = False
    """Whether spans of an earlier attempt, or of the run that it resumes, must be read before it continues."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    started_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    settled_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time at which a list redrove or purged it, for a failed run; None for others.

    It follows the redrive key, which decides, and keeps lists of dead letters from reading settled runs.
    """


class ExecutionData(SQLModel, table=True):
    """Columns of a run that are written once: its input, and the columns by which lists are sorted.

    The indexes of lists are here, since every change of a row touches all indexes of its table.
    """

    __tablename__ = "execution_data"
    __table_args__ = (
        Index("ix_execution_data_organization", "organization_id", "created_at"),
        Index("ix_execution_data_workflow", "workflow_id", "created_at"),
    )

    execution_id: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    trigger: str = Field(sa_column=Column(Text, nullable=False))
    """Output of the trigger node as JSON text."""
    config: str = Field(sa_column=Column(Text, nullable=False))
    """Settings under which the run was accepted, as JSON text."""
    organization_id: str
    workflow_id: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class SpanRow(SQLModel, table=True):
    """Span of one node in one run."""

    __tablename__ = "span"
    __table_args__ = (
        Index(
            "ix_span_input",
            "shard",
            "execution_id",
            postgresql_where=text(AWAITS_INPUT_CONDITION),
            sqlite_where=text(AWAITS_INPUT_CONDITION),
        ),
    )

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    id: str
    sequence: int
    label: str
    type: str
    status: str
    port: str | None = None
    attempt: int = 1
    started_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    wake_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    input_node: str | None = None
    input: str | None = Field(default=None, sa_column=Column(Text))
    output: str | None = Field(default=None, sa_column=Column(Text))
    error: str | None = Field(default=None, sa_column=Column(Text))
    unresolved: str | None = Field(default=None, sa_column=Column(Text))
    awaits: str | None = Field(default=None, sa_column=Column(Text))
    resolved_config: str | None = Field(default=None, sa_column=Column(Text))
    hashes: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    input_blob: str | None = Field(default=None, sa_column=Column(Text))
    """JSON `{"$blob": {sha256, size, type, name}}`, in place of an input that is too large for a row."""
    output_blob: str | None = Field(default=None, sa_column=Column(Text))
    reused_from: str | None = None
    """Execution that ran the node, if a replay has reused its result."""
    key_id: str | None = None
    """Execution id in the node's idempotency key, if it is not that of its run."""
    rendered_config: str | None = Field(default=None, sa_column=Column(Text))
    """Config as rendered, for a node that records none before it starts: JSON, or the reference to a blob.

    None for a config without expressions: then the definition has it.
    """
    model_calls: str | None = Field(default=None, sa_column=Column(Text))
    """JSON list of the calls of language models that the node has made, in all attempts."""


class AttemptRow(SQLModel, table=True):
    """Attempt of a node that was retried."""

    __tablename__ = "attempt_span"

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    attempt: int = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    id: str
    sequence: int
    label: str
    type: str
    status: str
    started_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    next_attempt_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Planned time of the next attempt."""
    error: str | None = Field(default=None, sa_column=Column(Text))


class WaitAnswer(SQLModel, table=True):
    """Answer of a waiting node; each node gets at most one."""

    __tablename__ = "wait_answer"

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    payload: str = Field(sa_column=Column(Text, nullable=False))
    """JSON: `{"output": …, "port": "output"}` or `{"error": {code, message, cause?}}`."""
    user_id: str | None = None
    """User who gave the answer, if it was a person."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class ThrottleRow(SQLModel, table=True):
    """Earliest time of the next action under a rate limit."""

    __tablename__ = "throttle"

    organization_id: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    next_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False, index=True))


class LogRow(SQLModel, table=True):
    """Line of an execution's log."""

    __tablename__ = "log_line"

    execution_id: str = Field(primary_key=True)
    sequence: int = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    id: str
    level: str
    message: str = Field(sa_column=Column(Text, nullable=False))
    node_id: str | None = None
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class Idempotency(SQLModel, table=True):
    """Idempotency key with the resource of the first request, committed in the same transaction."""

    shard: int = Field(sa_column=Column(SmallInteger, primary_key=True))
    scope: str = Field(primary_key=True)
    """Hash of the caller, the route and the workflow."""
    key: str = Field(primary_key=True)
    fingerprint: str
    resource_id: str
    expires_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False, index=True))


class Leadership(SQLModel, table=True):
    """Leader election: the process that performs a duty of which there must be only one."""

    name: str = Field(primary_key=True)
    owner: str
    epoch: int = Field(default=1, sa_column=Column(BigInteger, nullable=False))
    lease_until: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
