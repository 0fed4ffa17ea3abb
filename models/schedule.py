"""Where the schedules of active workflows are: a row each, whose next instant moves on with the runs that it starts."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index, SmallInteger, Text, text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class Schedule(SQLModel, table=True):
    """The schedule of a workflow that has, or had, a schedule trigger and was active."""

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
    """Of what its config says about when: it counts anew where that changes, and for no other edit."""
    anchor_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """When it began to count."""
    planned_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """When its next instant was worked out."""
    next_run_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """The first instant that nobody has decided about; None while it doesn't count."""
    due_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """When that is run, or looked at again: later by the jitter, or where something keeps it from being run."""
    last_run_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """The instant of its last run."""
    last_execution_id: str | None = None
    skipped_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """The last instant that was passed over, and why."""
    skipped_reason: str | None = None
    problem: str | None = Field(default=None, sa_column=Column(Text))
    """What keeps it from being run, in words for its owner."""
