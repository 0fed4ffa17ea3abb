"""Workflows that were applied from files: the set that each belongs to, and its content at that time."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class AppliedWorkflow(SQLModel, table=True):
    """Last application of one workflow."""

    __tablename__ = "applied_workflow"
    __table_args__ = (Index("ix_applied_workflow_set", "organization_id", "set_name"),)

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    organization_id: str
    set_name: str
    """Empty if it was applied without a set."""
    content_hash: str
    """SHA-256 of the content that files describe, in hexadecimal; another hash tells an edit by hand."""
    status: str | None = None
    """Status that the file demanded; None if it had none."""
    applied_by: str
    applied_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
