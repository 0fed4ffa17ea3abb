"""Hourly counts of runs, which the leading scheduler derives from their rows."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn

ALL_WORKFLOWS = ""
"""Workflow id of the row with the sums of an organization."""


class RunHour(SQLModel, table=True):
    """Runs of a workflow that were accepted within one hour, by their current status.

    Without a row, there are none. A second row for each hour and organization has the sums of all workflows.
    """

    __tablename__ = "run_hour"
    __table_args__ = (Index("ix_run_hour_starts_at", "starts_at"),)

    organization_id: str = Field(primary_key=True)
    workflow_id: str = Field(primary_key=True)
    starts_at: datetime = Field(sa_column=Column(TimestampColumn, primary_key=True, autoincrement=False))
    """Begin of the hour, in UTC."""
    accepted: int = 0
    completed: int = 0
    failed: int = 0
    stopped: int = 0
    cancelled: int = 0
    run_times: dict[str, int] = Field(default_factory=dict, sa_column=Column(JsonTextColumn, nullable=False))
    """Histogram of the time from start to end of completed and failed runs."""
    queue_times: dict[str, int] = Field(
        default_factory=dict, sa_column=Column(JsonTextColumn, nullable=False, server_default="{}")
    )
    """Histogram of the time from acceptance to start of runs that have started."""
    wake_times: dict[str, int] = Field(default_factory=dict, sa_column=Column(JsonTextColumn, nullable=False))
    """Histogram of the time for which runs have waited for pods to start; that of fast starts is left out."""
