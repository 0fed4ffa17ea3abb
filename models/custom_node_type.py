"""Custom node types of organizations: immutable documents by type and version."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, SmallInteger, Text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class CustomNodeType(SQLModel, table=True):
    """One version of a node type that workers of an organization perform."""

    __tablename__ = "custom_node_type"

    organization_id: str = Field(primary_key=True)
    type: str = Field(primary_key=True)
    """Namespace and name: `acme/resize`."""
    version: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    hash: str
    """SHA-256 of the document, in hexadecimal."""
    document: str = Field(sa_column=Column(Text, nullable=False))
    """Canonical JSON."""
    is_deprecated: bool = False
    created_by: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
