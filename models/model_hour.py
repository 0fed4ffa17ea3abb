"""Hourly counts of the calls of language models."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Column, Index, SmallInteger
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class ModelHour(SQLModel, table=True):
    """Calls of one model that ended within one hour, with one outcome and about one duration."""

    __tablename__ = "model_hour"
    __table_args__ = (Index("ix_model_hour_starts_at", "starts_at"),)

    organization_id: str = Field(primary_key=True)
    model_id: str = Field(primary_key=True)
    starts_at: datetime = Field(sa_column=Column(TimestampColumn, primary_key=True, autoincrement=False))
    """Begin of the hour, in UTC."""
    error: str = Field(primary_key=True)
    """Code of the failure; empty for answered calls."""
    bucket: int = Field(sa_column=Column(SmallInteger, primary_key=True, autoincrement=False))
    """Duration of an answered call, as `models.duration_histogram` has it; 0 for failed ones."""
    calls: int = Field(sa_column=Column(BigInteger, nullable=False))
    unpriced_calls: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Answered calls whose cost is unknown."""
    input_tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    output_tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    cost: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Nano-dollars of the calls with a known cost."""
