"""Counts of fixes by `pilotflame doctor`, which ends before its own metrics could be read."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column
from sqlmodel import Field, SQLModel


class DriftFixCount(SQLModel, table=True):
    """Number of findings of one class that were fixed so far."""

    __tablename__ = "drift_fix_count"

    drift_class: str = Field(primary_key=True)
    fixed: int = Field(sa_column=Column(BigInteger, nullable=False))
