"""Tasks of custom nodes, and the workers that perform them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, SmallInteger, Text, text
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn
from models.task_states import HELD_CONDITION, TaskState

READY_CONDITION: Final = "state = 'ready'"
LIMITED_CONDITION: Final = "state = 'limited'"
PLACED_CONDITION: Final = "concurrency_key IS NOT NULL AND state IN ('ready', 'leased', 'cancel_requested')"
CANCELLING_CONDITION: Final = "state = 'cancel_requested'"


def _partial_index(name: str, *columns: str, where: str) -> Index:
    """Return an index of the rows that meet a condition, which PostgreSQL and SQLite support."""
    return Index(name, *columns, postgresql_where=text(where), sqlite_where=text(where))


class Task(SQLModel, table=True):
    """Unit of work for a worker of an organization: one run of one custom node, with all of its attempts."""

    __table_args__ = (
        Index("uq_task_node", "execution_id", "node_id", "iteration", unique=True),
        Index("ix_task_organization", "organization_id", "created_at", "id"),
        _partial_index(
            "ix_task_ready",
            *("organization_id", "queue", "queue_turn", "is_fresh", "rank"),
            where=READY_CONDITION,
        ),
        _partial_index("ix_task_open", "execution_id", where="ended_at IS NULL"),
        _partial_index("ix_task_check", "check_at", where="check_at IS NOT NULL"),
        _partial_index("ix_task_worker", "organization_id", "worker_id", where=HELD_CONDITION),
        _partial_index("ix_task_cancelling", "organization_id", where=CANCELLING_CONDITION),
        _partial_index(
            "ix_task_limited", "concurrency_key", "is_fresh", "rank", "id", where=LIMITED_CONDITION
        ),
        _partial_index("ix_task_placed", "concurrency_key", where=PLACED_CONDITION),
    )

    id: str = Field(primary_key=True)
    execution_id: str
    node_id: str
    iteration: str = ""
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    workflow_id: str
    type: str
    version: str
    content_hash: str
    """Hash of the document of the node type."""
    pool: str
    queue: str
    """Type, version and pool: `acme/resize@1.2.0#default`."""
    queue_turn: int = Field(sa_column=Column(SmallInteger, nullable=False))
    """Turn of the workflow: within a queue, workflows are served in turn."""
    rank: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Rank of the run: smaller ranks are claimed first."""
    is_fresh: bool = Field(default=True, sa_column=Column(Boolean, nullable=False))
    """Whether it was never claimed."""
    is_write: bool = Field(sa_column=Column(Boolean, nullable=False))
    is_at_most_once: bool = Field(sa_column=Column(Boolean, nullable=False))
    key: str
    """Idempotency key of the node."""
    config: str = Field(sa_column=Column(Text, nullable=False))
    """JSON text of the rendered config."""
    input: str | None = Field(default=None, sa_column=Column(Text))
    """JSON text; None if it is too large for a claim."""
    input_bytes: int = Field(sa_column=Column(Integer, nullable=False))
    timeout_microseconds: int = Field(sa_column=Column(BigInteger, nullable=False))
    lease_microseconds: int = Field(sa_column=Column(BigInteger, nullable=False))
    max_attempts: int = Field(sa_column=Column(SmallInteger, nullable=False))
    first_delay_microseconds: int = Field(sa_column=Column(BigInteger, nullable=False))
    max_delay_microseconds: int = Field(sa_column=Column(BigInteger, nullable=False))
    delay_grows: bool = Field(sa_column=Column(Boolean, nullable=False))
    concurrency_key: str | None = None
    """Organization, type and rendered key."""
    concurrency_limit: int | None = Field(default=None, sa_column=Column(Integer))
    state: str = TaskState.READY
    failures: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False))
    """Failed attempts."""
    losses: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False))
    """Attempts whose lease ended after the worker had reported them."""
    unacknowledged: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False))
    """Claims whose lease ended before any report."""
    fence: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Number of claims."""
    lease: str | None = None
    """Random token of the current or last claim."""
    worker_id: str | None = None
    claim_id: str | None = None
    """`requestId` of the claim."""
    claimed_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    is_acknowledged: bool = Field(default=False, sa_column=Column(Boolean, nullable=False))
    """Whether a report of its worker has named it."""
    lease_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    deadline_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """End of the time of the current attempt."""
    due_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of the next attempt, while it is delayed."""
    check_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time at which a sweep moves it: end of lease, deadline, delay or start timeout."""
    checkpoint: str | None = Field(default=None, sa_column=Column(Text))
    """JSON text of the last checkpoint, for the next attempt."""
    progress: Any = Field(default=None, sa_column=Column(JsonTextColumn))
    output: str | None = Field(default=None, sa_column=Column(Text))
    """JSON text of a large output, between its upload and the report that completes the task."""
    output_lease: str | None = None
    """Lease under which `output` was uploaded."""
    pending_logs: str | None = Field(default=None, sa_column=Column(Text))
    """Log lines that wait until no process numbers those of the run, as JSON text."""
    log_lines: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    """Number of lines that its workers have sent."""
    error: Any = Field(default=None, sa_column=Column(JsonTextColumn))
    """Error of the last failed or lost attempt: `{code, message}`."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    started_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of the first claim."""
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class TaskWorker(SQLModel, table=True):
    """Process that performs tasks, as its claims describe it."""

    __tablename__ = "task_worker"
    __table_args__ = (Index("ix_task_worker_seen", "organization_id", "last_seen_at"),)

    organization_id: str = Field(primary_key=True)
    id: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    name: str
    sdk: str
    types: list[dict[str, Any]] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    """Type and version of each node that it performs."""
    pools: list[str] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    key_id: str
    is_draining: bool = Field(default=False, sa_column=Column(Boolean, nullable=False))
    """Whether an operator has asked it to stop."""
    first_seen_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    last_seen_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """Updated at least every 30 seconds while it polls."""
    stopped_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time at which it said that it stops; then it gets no more tasks."""
