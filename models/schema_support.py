"""Oldest revision of code that can use the tables, stored by the last migration."""

from __future__ import annotations

from sqlmodel import Field, SQLModel


class SchemaSupport(SQLModel, table=True):
    """Single row; a migration that renames or removes something replaces it, one that only adds does not."""

    __tablename__ = "schema_support"

    oldest_revision: str = Field(primary_key=True)
    """Newest revision that the code must know at least."""
