"""Presence of gateways, schedulers and deployers: the last time at which each process was known to run."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class ProcessPresence(SQLModel, table=True):
    """Process of the server that claims no runs; workers have `WorkerPresence`."""

    __tablename__ = "process_presence"

    owner: str = Field(primary_key=True)
    """Unique name of the process, which begins with its role."""
    role: str
    """Command that it runs: `gateway`, `scheduler` or `deployer`."""
    version: str
    """Version of the program."""
    seen_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
