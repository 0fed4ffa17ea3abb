"""Workflows: tables, statuses, and access conditions."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Index,
    SmallInteger,
    Text,
    UniqueConstraint,
    and_,
    column,
    or_,
    select,
    true,
)
from sqlmodel import Field, SQLModel, col

from models.access import ApiCaller
from models.column_types import JsonTextColumn, TimestampColumn

MOST_CALLERS: Final = 200
"""Callers whose conditions of access are kept. They take up to half a millisecond to build, longer than many of the
statements that contain them take to run.
"""


class WorkflowStatus(StrEnum):
    """Status of a workflow, set by its owner."""

    DRAFT = "draft"
    ACTIVE = "active"
    PAUSED = "paused"
    ARCHIVED = "archived"


DEFAULT_SETTINGS: dict[str, Any] = {
    "timeout": 3600,
    "retryOnFailure": False,
    "maxRetries": 3,
    "parallelism": 16,
}


def _list_index(field: str) -> Index:
    """Return the index of lists that are sorted by a field.

    Like lists, it leaves out templates and deleted workflows. It contains the columns that decide on read
    access, so that lists are sorted, paged and counted without reading rows. SQLite uses it only for queries
    that state the condition in the same words.
    """
    condition = and_(column("deleted_at").is_(None), column("is_template").is_(False))
    return Index(
        f"ix_workflow_listed_by_{field}",
        *("organization_id", field, "id", "owner_id", "is_public"),
        postgresql_where=condition,
        sqlite_where=condition,
    )


class Workflow(SQLModel, table=True):
    """Workflow without its graph, for lists and checks."""

    __table_args__ = (
        *map(_list_index, ("created_at", "updated_at", "name", "status", "version")),
        Index(
            "ix_workflow_template",
            *("organization_id", "created_at", "id"),
            postgresql_where=and_(column("deleted_at").is_(None), column("is_template").is_(True)),
            sqlite_where=and_(column("deleted_at").is_(None), column("is_template").is_(True)),
        ),
        Index(
            "ix_workflow_app",
            "organization_id",
            "app_id",
            postgresql_where=column("app_id").is_not(None),
            sqlite_where=column("app_id").is_not(None),
        ),
    )

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_type=SmallInteger)
    owner_id: str = Field(foreign_key="user_account.id")
    name: str
    description: str = ""
    status: str = WorkflowStatus.DRAFT
    version: int = 1
    revision: int = 1
    """Number that increases with every change of the workflow, its graph or its visibility."""
    tags: list[str] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    settings: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    config: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    app_id: str | None = None
    """Copy of `config.appId` for searches, written with every change of the row."""
    search_text: str = Field(default="", sa_type=Text)
    """Case-folded copy of name and description for searches, written with the row too."""
    scopes: list[str] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    lifecycle: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Lifecycle policy of its deployment; None for the default."""
    is_public: bool = False
    is_template: bool = False
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    deleted_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))


class WorkflowGraph(SQLModel, table=True):
    """Nodes and connections of a workflow, in the stored form."""

    __tablename__ = "workflow_graph"

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    shard: int = Field(sa_type=SmallInteger)
    nodes: list[dict[str, Any]] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    connections: list[dict[str, Any]] = Field(sa_column=Column(JsonTextColumn, nullable=False))


class WorkflowTag(SQLModel, table=True):
    """Copy of a workflow's tags for searches, one row per tag."""

    __tablename__ = "workflow_tag"

    organization_id: str = Field(primary_key=True)
    tag: str = Field(primary_key=True)
    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")


class WorkflowShare(SQLModel, table=True):
    """Permission of another user to read and execute a workflow."""

    __tablename__ = "workflow_share"
    __table_args__ = (Index("ix_workflow_share_user", "user_id"),)

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    user_id: str = Field(primary_key=True, foreign_key="user_account.id")
    shared_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class WorkflowLogLevel(SQLModel, table=True):
    """Log level of one workflow for a limited time. No part of its definition, so that it holds without a deploy.

    Expired rows are deleted with the next change of any level.
    """

    __tablename__ = "workflow_log_level"

    workflow_id: str = Field(primary_key=True)
    level: str
    """Lowest level of the lines that its runs log; `debug` adds lines about each node."""
    until: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class WorkflowVersion(SQLModel, table=True):
    """Immutable snapshot of a workflow."""

    __tablename__ = "workflow_version"
    __table_args__ = (
        UniqueConstraint("workflow_id", "version_tag", name="uq_workflow_version_tag"),
        # With all columns that are looked for: SQLite reads through a snapshot to those behind it.
        Index(
            "ix_workflow_version_definition",
            *("workflow_id", "definition_hash", "created_at", "version"),
        ),
    )

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    version: int = Field(primary_key=True)
    shard: int = Field(sa_type=SmallInteger)
    version_tag: str
    description: str = ""
    snapshot: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    created_by: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    definition_hash: str | None = None
    """Hash that a run of it had when it was stored, as `Definition.hash`; None for old versions."""


class Definition(SQLModel, table=True):
    """Definition snapshot of runs: nodes, connections and settings, addressed by their hash."""

    organization_id: str = Field(primary_key=True)
    hash: str = Field(primary_key=True)
    shard: int = Field(sa_type=SmallInteger)
    body: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


@lru_cache(MOST_CALLERS)
def is_readable_by(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for workflows that a caller may read and execute.

    Those are workflows of the organization, not deleted, that are templates, public, shared with the caller or their
    own; for an admin, all.
    """
    return and_(*_is_present(caller), or_(col(Workflow.is_template), is_open_to(caller)))


def is_listed_for(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for workflows that lists show to a caller: readable workflows that are no templates.

    Without the `or` for templates, indexes that leave them out can be used.
    """
    return and_(*_is_present(caller), col(Workflow.is_template).is_(False), is_open_to(caller))


def _is_present(caller: ApiCaller) -> Iterable[ColumnElement[bool]]:
    yield col(Workflow.organization_id) == caller.organization_id
    yield col(Workflow.deleted_at).is_(None)


@lru_cache(MOST_CALLERS)
def is_open_to(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition under which a workflow is open to a caller: public, own or shared; always true for an
    admin.

    Combine it with conditions for the caller's organization, and for workflows that are neither deleted nor templates:
    it has none of them. It uses only columns of the indexes of lists.
    """
    if caller.is_admin:
        return true()
    shared = select(col(WorkflowShare.workflow_id)).where(col(WorkflowShare.user_id) == caller.user_id)
    return or_(
        col(Workflow.owner_id) == caller.user_id, col(Workflow.is_public), col(Workflow.id).in_(shared)
    )


def is_writable_by(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for workflows that a caller may change, share and delete: the caller's own; for an
    admin, all of the organization; templates too, but no deleted ones.
    """
    return and_(*_is_present(caller), true() if caller.is_admin else col(Workflow.owner_id) == caller.user_id)
