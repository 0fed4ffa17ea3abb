"""Workflows as they are stored, the states they may be in, and who may see them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any

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


class WorkflowStatus(StrEnum):
    """What its owner wants of a workflow."""

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
    """Return the index of lists that are sorted by a field: it leaves out what they do, templates and deleted ones.

    It holds what decides who may read a workflow, so that workflows are sorted, passed over and counted without a look
    at their rows. SQLite uses it only where a query states that condition in the same words.
    """
    condition = and_(column("deleted_at").is_(None), column("is_template").is_(False))
    return Index(
        f"ix_workflow_listed_by_{field}",
        *("organization_id", field, "id", "owner_id", "is_public"),
        postgresql_where=condition,
        sqlite_where=condition,
    )


class Workflow(SQLModel, table=True):
    """What lists and checks need of a workflow; its graph stands apart."""

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
    """Goes up with every change of the workflow, its graph or who may see it."""
    tags: list[str] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    settings: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    config: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    app_id: str | None = None
    """`config.appId` once more, so that it can be searched by; written along with the row, whoever changes it."""
    search_text: str = Field(default="", sa_type=Text)
    """Name and description once more, alike in capitals and small letters; written along with the row too."""
    scopes: list[str] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    lifecycle: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """When it has compute of its own, once it is deployed; None: as most."""
    is_public: bool = False
    is_template: bool = False
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    deleted_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))


class WorkflowGraph(SQLModel, table=True):
    """A workflow's nodes and connections, in the stored form."""

    __tablename__ = "workflow_graph"

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    shard: int = Field(sa_type=SmallInteger)
    nodes: list[dict[str, Any]] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    connections: list[dict[str, Any]] = Field(sa_column=Column(JsonTextColumn, nullable=False))


class WorkflowTag(SQLModel, table=True):
    """A workflow's tags once more, one a row, so that they can be searched by."""

    __tablename__ = "workflow_tag"

    organization_id: str = Field(primary_key=True)
    tag: str = Field(primary_key=True)
    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")


class WorkflowShare(SQLModel, table=True):
    """A user who may read and execute a workflow of somebody else."""

    __tablename__ = "workflow_share"
    __table_args__ = (Index("ix_workflow_share_user", "user_id"),)

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    user_id: str = Field(primary_key=True, foreign_key="user_account.id")
    shared_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class WorkflowVersion(SQLModel, table=True):
    """A snapshot that never changes."""

    __tablename__ = "workflow_version"
    __table_args__ = (UniqueConstraint("workflow_id", "version_tag", name="uq_workflow_version_tag"),)

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    version: int = Field(primary_key=True)
    shard: int = Field(sa_type=SmallInteger)
    version_tag: str
    description: str = ""
    snapshot: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    created_by: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class Definition(SQLModel, table=True):
    """What a run pins: nodes, connections and settings, addressed by their content."""

    organization_id: str = Field(primary_key=True)
    hash: str = Field(primary_key=True)
    shard: int = Field(sa_type=SmallInteger)
    body: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


def is_readable_by(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the condition under which a caller may read and execute a workflow."""
    return and_(*_is_present(caller), or_(col(Workflow.is_template), _is_open_to(caller)))


def is_listed_for(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the condition under which a list shows a workflow to a caller: of what is readable, all but templates.

    Without the `or` of the two, indexes that leave templates out will do.
    """
    return and_(*_is_present(caller), col(Workflow.is_template).is_(False), _is_open_to(caller))


def _is_present(caller: ApiCaller) -> Iterable[ColumnElement[bool]]:
    yield col(Workflow.organization_id) == caller.organization_id
    yield col(Workflow.deleted_at).is_(None)


def _is_open_to(caller: ApiCaller) -> ColumnElement[bool]:
    if caller.is_admin:
        return true()
    shared = select(col(WorkflowShare.workflow_id)).where(col(WorkflowShare.user_id) == caller.user_id)
    return or_(
        col(Workflow.owner_id) == caller.user_id, col(Workflow.is_public), col(Workflow.id).in_(shared)
    )


def is_writable_by(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the condition under which a caller may change, share and delete a workflow."""
    return and_(*_is_present(caller), true() if caller.is_admin else col(Workflow.owner_id) == caller.user_id)
