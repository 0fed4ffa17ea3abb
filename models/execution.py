"""Executions as they are stored. The row is the queue: what is pending here will run, whatever becomes of messages."""

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
"""The target of what any worker may run."""
LIMITED_TARGET = "limited"
"""The target of what waits for a place among the runs that its workflow allows at once."""
DELAYED_TARGET = "delayed"
"""The target of what may not run before its time; then it gets another. Ids of workflows come after all these words."""
UNPARSED_TARGET = "intake"
"""The target of what was brought by something that is still to be read."""
ISOLATED_TARGET = "isolated"
"""The target of suspects that any worker may run, one at a time and apart from others."""
ISOLATED_UNPARSED_TARGET = "isolated-intake"
"""The target of suspects that are still to be read."""
ISOLATION_TARGETS = {SHARED_TARGET: ISOLATED_TARGET, UNPARSED_TARGET: ISOLATED_UNPARSED_TARGET}
"""Targets whose suspects wait apart; those of a deployment stay with its other runs, and are told by their losses."""
PRIORITY_MICROSECONDS = 60_000_000
"""How much earlier one step of priority makes a run count as accepted."""


class Execution(SQLModel, table=True):
    """The part of a run that is read and written while it is live."""

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
            "ix_execution_follow_up",
            "follow_up_at",
            "ended_at",
            postgresql_where=text("follow_up IS NOT NULL AND ended_at IS NOT NULL"),
            sqlite_where=text("follow_up IS NOT NULL AND ended_at IS NOT NULL"),
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
    """Who may take it: any worker, the pods of the workflow whose id it is, or nobody while it waits for a place."""
    assigned_deployment_id: str | None = None
    """The target that it has otherwise, if that isn't `shared`."""
    trigger_type: str
    definition_hash: str
    rank: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Microseconds: accepted, less a minute for each step of priority; the smaller, the sooner."""
    queue_turn: int = Field(sa_column=Column(SmallInteger, nullable=False))
    """A hash of the workflow's id: within an organisation, workflows are served in the order of their turns."""
    is_fresh: bool = True
    """Nobody has begun it; what was begun goes first."""
    due_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    token: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Fencing: goes up with every claim and every release; a write that names an old one changes nothing."""
    attempt: int = 0
    """Claims since the last recorded node result or release; counted before any work.

    Of a pending run, this is the number of workers that it has lost since.
    """
    isolated: bool = Field(
        default=False, sa_column=Column(Boolean, nullable=False, server_default=text("false"))
    )
    """It was claimed as a suspect, and has not proved itself since: should its worker die, the loss counts."""
    isolation_losses: int = Field(
        default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0"))
    )
    """Workers that it has lost while on trial, since the last recorded node result or release."""
    lease_owner: str | None = None
    lease_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    timeout_microseconds: int = Field(sa_column=Column(BigInteger, nullable=False))
    deadline_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    request: str | None = None
    """`stop` or `cancel`: what a client asked of a run that somebody holds."""
    completed_nodes: int = 0
    total_nodes: int = 0
    progress: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0")))
    """Percent of it that is done, turns of loops included; never goes down, and is 99 at most."""
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    key_id: str
    """The execution whose id stands in idempotency keys: its own, or that of the first it was resumed from."""
    resumed_from: str | None = None
    channel: str
    """Of the gateway that accepted it, which is told of its end without asking."""
    parent_id: str | None = None
    """The execution that started it, by one of its nodes."""
    root_id: str | None = None
    """The first of the executions that started one another; None for one that nobody started so."""
    depth: int = 0
    """How many executions are above it."""
    wait_answer_count: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    """Answers that its waiting nodes were given, ever: one that has seen fewer may not go to sleep."""
    concurrency_key: str | None = None
    """Runs with the same key share `concurrency_limit` places."""
    concurrency_limit: int | None = None
    follow_up: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """What is still to be done about its end; None: nothing, as for most."""
    follow_up_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Not before then, since somebody is at it, or it was tried and failed."""
    follow_up_outcome: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """How its messages to the outside went so far, for whoever looks; None while there was none."""
    is_private: bool = Field(
        default=False, sa_column=Column(Boolean, nullable=False, default=False, server_default=false())
    )
    """It runs what its user has given, not the workflow alone: others than the workflow's writers don't see it."""
    has_journal: bool = False
    """Spans of an earlier attempt, or of the run it resumes, are to be read before it goes on."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    started_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class ExecutionData(SQLModel, table=True):
    """The part of a run that is written once: what it works on, and what lists go by.

    The indexes of lists stand here, since every change of a row touches all of its table's indexes.
    """

    __tablename__ = "execution_data"
    __table_args__ = (
        Index("ix_execution_data_organization", "organization_id", "created_at"),
        Index("ix_execution_data_workflow", "workflow_id", "created_at"),
    )

    execution_id: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    trigger: str = Field(sa_column=Column(Text, nullable=False))
    """JSON: what the trigger node gives out."""
    config: str = Field(sa_column=Column(Text, nullable=False))
    """JSON: the settings that the run was accepted under."""
    organization_id: str
    workflow_id: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class SpanRow(SQLModel, table=True):
    """One node in one run."""

    __tablename__ = "span"

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
    """JSON: `{"$blob": {sha256, size, type, name}}`, in the place of an input that is too large for a row."""
    output_blob: str | None = Field(default=None, sa_column=Column(Text))


class AttemptRow(SQLModel, table=True):
    """One attempt of a node that was tried more than once."""

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
    """When the next one was to begin, as it was said then."""
    error: str | None = Field(default=None, sa_column=Column(Text))


class WaitAnswer(SQLModel, table=True):
    """An answer to a node that waits for one; the first counts, and there is no second."""

    __tablename__ = "wait_answer"

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    payload: str = Field(sa_column=Column(Text, nullable=False))
    """JSON: `{"output": …, "port": "output"}` or `{"error": {code, message, cause?}}`."""
    user_id: str | None = None
    """Who has answered, if that was a person."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class ThrottleRow(SQLModel, table=True):
    """From when on the next of something that happens at a limited rate may pass."""

    __tablename__ = "throttle"

    organization_id: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    next_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False, index=True))


class LogRow(SQLModel, table=True):
    """One line of an execution's log."""

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
    """The answer that a repeated request gets again; committed with the row that the first one made."""

    shard: int = Field(sa_column=Column(SmallInteger, primary_key=True))
    scope: str = Field(primary_key=True)
    """A hash of the caller, the route and the workflow."""
    key: str = Field(primary_key=True)
    fingerprint: str
    resource_id: str
    expires_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False, index=True))


class Leadership(SQLModel, table=True):
    """Which of several processes does a duty that one must do."""

    name: str = Field(primary_key=True)
    owner: str
    epoch: int = Field(default=1, sa_column=Column(BigInteger, nullable=False))
    lease_until: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
