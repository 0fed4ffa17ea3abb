"""Presence of workers: the last time at which each worker process was known to claim runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Column, Integer, text
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn


class WorkerPresence(SQLModel, table=True):
    """Worker process that claims runs of any workflow without a deployment."""

    __tablename__ = "worker_presence"

    owner: str = Field(primary_key=True)
    """Name of the process in its leases."""
    concurrency: int
    """Number of runs that it holds at most."""
    held_runs: int = 0
    started_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    seen_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of an orderly end; None for a process that runs, or died."""
    version: str | None = None
    """Version of the program; None for one of before 0.2."""
    host: str | None = None
    """Name of its machine or container; None for a worker of before 0.2."""
    loop_lag_ms: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default=text("0")))
    """Longest delay of a timer of its event loop in the ten seconds before its last report."""
    activity: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Activity before its last report, as `telemetry.process_activity` measures it; None before 0.3."""
