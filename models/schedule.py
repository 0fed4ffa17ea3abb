"""State of the schedules of active workflows: one row each, advanced with the runs that it starts."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index, SmallInteger, Text, text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class Schedule(SQLModel, table=True):
    """Schedule of a workflow with a schedule trigger that is or was active."""

    __table_args__ = (
        Index(
            "ix_schedule_due",
            "due_at",
            postgresql_where=text("due_at IS NOT NULL"),
            sqlite_where=text("due_at IS NOT NULL"),
        ),
    )

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    node_id: str
    timing_hash: str
    """Hash of the timing in its config: a change of it starts the schedule anew, and no other edit does."""
    anchor_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """Time from which its intervals count."""
    planned_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """Time at which its next instant was computed."""
    next_run_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """First instant without a decision; None while the schedule is inactive."""
    due_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of the next run or look: later than the instant by the jitter, or by a delay after a problem."""
    last_run_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Instant of its last run."""
    last_execution_id: str | None = None
    skipped_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Last skipped instant; `skipped_reason` is the reason."""
    skipped_reason: str | None = None
    problem: str | None = Field(default=None, sa_column=Column(Text))
    """Problem that keeps it from running, as text for its owner."""
