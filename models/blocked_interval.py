"""Intervals in which runs were blocked: a record of where their time went."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index, SmallInteger, text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class BlockedInterval(SQLModel, table=True):
    """Interval in which a run was blocked for one reason."""

    __tablename__ = "blocked_interval"
    __table_args__ = (
        Index(
            "ix_blocked_interval_open",
            "organization_id",
            "code",
            postgresql_where=text("ended_at IS NULL"),
            sqlite_where=text("ended_at IS NULL"),
        ),
        Index(
            "ix_blocked_interval_waking",
            "started_at",
            postgresql_where=text("code = 'waking'"),
            sqlite_where=text("code = 'waking'"),
        ),
        Index(
            "ix_blocked_interval_lost",
            *("organization_id", "ended_at"),
            postgresql_where=text("code = 'worker-lost'"),
            sqlite_where=text("code = 'worker-lost'"),
        ),
    )

    execution_id: str = Field(primary_key=True)
    started_at: datetime = Field(sa_column=Column(TimestampColumn, primary_key=True, autoincrement=False))
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    code: str
    """Code of the blocker, as in `journal.explanations.blockers.BlockerCode`."""
    node_id: str | None = None
    """Node that waited, if the run had started."""
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time from which the run could be claimed; None while it is blocked."""
    resumed_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time at which an executor claimed it again; until then it was queued."""
    pod_started_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Start of the pod's process that claimed the run after a wake; None for other reasons, and before 0.3."""
