"""Executions as they are stored. The row is the queue: what is pending here will run, whatever becomes of messages."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Column, Index, LargeBinary, SmallInteger, Text, text
from sqlmodel import Field, SQLModel

from models.columns import Instant, JsonText


class ExecutionStatus(StrEnum):
    """Where a run is."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"


TERMINAL = frozenset(
    {ExecutionStatus.COMPLETED, ExecutionStatus.FAILED, ExecutionStatus.STOPPED, ExecutionStatus.CANCELLED}
)

SHARED = "shared"
"""The target of what any worker may run."""
PRIORITY_MICROSECONDS = 60_000_000
"""How much earlier one step of priority makes a run count as accepted."""
MAX_LOST_ATTEMPTS = 3
"""So many workers may die on one run, with nothing new recorded in between, before it is given up as crashed."""


class Execution(SQLModel, table=True):
    """The part of a run that is read and written while it is live."""

    __table_args__ = (
        Index(
            "ix_execution_pending",
            "target",
            "organization_id",
            "turn",
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
            "ix_execution_waiting",
            "due_at",
            postgresql_where=text("status = 'waiting'"),
            sqlite_where=text("status = 'waiting'"),
        ),
    )

    id: str = Field(primary_key=True)
    lane: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    workflow_id: str
    user_id: str
    status: str = ExecutionStatus.PENDING
    target: str = SHARED
    trigger_type: str
    definition_hash: str
    rank: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Microseconds: accepted, less a minute for each step of priority; the smaller, the sooner."""
    turn: int = Field(sa_column=Column(SmallInteger, nullable=False))
    """A hash of the workflow's id: within an organisation, workflows are served in the order of their turns."""
    is_fresh: bool = True
    """Nobody has begun it; what was begun goes first."""
    due_at: datetime | None = Field(default=None, sa_column=Column(Instant))
    token: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Fencing: goes up with every claim and every release; a write that names an old one changes nothing."""
    attempt: int = 0
    """Claims since the last recorded node result or release; counted before any work."""
    lease_owner: str | None = None
    lease_until: datetime | None = Field(default=None, sa_column=Column(Instant))
    timeout_microseconds: int = Field(sa_column=Column(BigInteger, nullable=False))
    deadline_at: datetime | None = Field(default=None, sa_column=Column(Instant))
    request: str | None = None
    """`stop` or `cancel`: what a client asked of a run that somebody holds."""
    completed_nodes: int = 0
    total_nodes: int = 0
    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonText))
    key_id: str
    """The execution whose id stands in idempotency keys: its own, or that of the first it was resumed from."""
    resumed_from: str | None = None
    inbox: str
    """Of the gateway that accepted it, which is told of its end without asking."""
    has_journal: bool = False
    """Spans of an earlier attempt, or of the run it resumes, are to be read before it goes on."""
    created_at: datetime = Field(sa_column=Column(Instant, nullable=False))
    started_at: datetime | None = Field(default=None, sa_column=Column(Instant))
    ended_at: datetime | None = Field(default=None, sa_column=Column(Instant))
    updated_at: datetime = Field(sa_column=Column(Instant, nullable=False))


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
    lane: int = Field(sa_column=Column(SmallInteger, nullable=False))
    trigger: str = Field(sa_column=Column(Text, nullable=False))
    """JSON: what the trigger node gives out."""
    config: str = Field(sa_column=Column(Text, nullable=False))
    """JSON: the settings that the run was accepted under."""
    organization_id: str
    workflow_id: str
    created_at: datetime = Field(sa_column=Column(Instant, nullable=False))


class SpanRow(SQLModel, table=True):
    """One node in one run."""

    __tablename__ = "span"

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: int = Field(primary_key=True, default=0)
    lane: int = Field(sa_column=Column(SmallInteger, nullable=False))
    id: str
    sequence: int
    label: str
    type: str
    status: str
    port: str | None = None
    attempt: int = 1
    started_at: datetime | None = Field(default=None, sa_column=Column(Instant))
    ended_at: datetime | None = Field(default=None, sa_column=Column(Instant))
    wake_at: datetime | None = Field(default=None, sa_column=Column(Instant))
    input_node: str | None = None
    input: str | None = Field(default=None, sa_column=Column(Text))
    output: str | None = Field(default=None, sa_column=Column(Text))
    error: str | None = Field(default=None, sa_column=Column(Text))
    unresolved: str | None = Field(default=None, sa_column=Column(Text))
    resolved_config: str | None = Field(default=None, sa_column=Column(Text))
    hashes: bytes | None = Field(default=None, sa_column=Column(LargeBinary))


class LogRow(SQLModel, table=True):
    """One line of an execution's log."""

    __tablename__ = "log_line"

    execution_id: str = Field(primary_key=True)
    sequence: int = Field(primary_key=True)
    lane: int = Field(sa_column=Column(SmallInteger, nullable=False))
    id: str
    level: str
    message: str = Field(sa_column=Column(Text, nullable=False))
    node_id: str | None = None
    created_at: datetime = Field(sa_column=Column(Instant, nullable=False))


class Idempotency(SQLModel, table=True):
    """The answer that a repeated request gets again; committed with the row that the first one made."""

    lane: int = Field(sa_column=Column(SmallInteger, primary_key=True))
    scope: str = Field(primary_key=True)
    """A hash of the caller, the route and the workflow."""
    key: str = Field(primary_key=True)
    fingerprint: str
    resource_id: str
    expires_at: datetime = Field(sa_column=Column(Instant, nullable=False, index=True))


class Leadership(SQLModel, table=True):
    """Which of several processes does a duty that one must do."""

    name: str = Field(primary_key=True)
    owner: str
    epoch: int = Field(default=1, sa_column=Column(BigInteger, nullable=False))
    lease_until: datetime = Field(sa_column=Column(Instant, nullable=False))
