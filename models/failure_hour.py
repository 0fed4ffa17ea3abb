"""Hourly groups of failed runs with one cause, which the leading scheduler derives from their rows."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn

OTHER_CAUSES = ""
"""Fingerprint of the row with the failed runs of an organization whose groups an hour does not keep."""


class FailureHour(SQLModel, table=True):
    """Failed runs with one cause that were accepted within one hour.

    No message: readers take that of the last run, which ends with the run.
    """

    __tablename__ = "failure_hour"
    __table_args__ = (Index("ix_failure_hour_starts_at", "starts_at"),)

    organization_id: str = Field(primary_key=True)
    fingerprint: str = Field(primary_key=True)
    """Hash of workflow, node, code and kind of message, as of dead letters; `OTHER_CAUSES` for further groups."""
    starts_at: datetime = Field(sa_column=Column(TimestampColumn, primary_key=True, autoincrement=False))
    """Begin of the hour, in UTC."""
    workflow_id: str
    node_id: str | None = None
    code: str
    runs: int
    first_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    """Time of the first failure."""
    last_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    execution_id: str
    """Run that failed last."""
