"""Presence of gateways, schedulers and deployers: the last time at which each process was known to run."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Column, Integer, text
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn


class ProcessPresence(SQLModel, table=True):
    """Process of the server that claims no runs; workers have `WorkerPresence`."""

    __tablename__ = "process_presence"

    owner: str = Field(primary_key=True)
    """Unique name of the process, which begins with its role."""
    role: str
    """Command that it runs: `gateway`, `scheduler` or `deployer`."""
    version: str
    """Version of the program."""
    host: str | None = None
    """Name of its machine or container; None for a process of before 0.2."""
    loop_lag_ms: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default=text("0")))
    """Longest delay of a timer of its event loop in the ten seconds before its last report."""
    started_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of its first report; None for a process of before 0.2."""
    seen_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    activity: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Activity before its last report, as `telemetry.process_activity` measures it; None before 0.3."""
