"""Workflows as they are stored, the states they may be in, and who may see them."""

from __future__ import annotations

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
    false,
    or_,
    select,
)
from sqlmodel import Field, SQLModel, col

from models.access import Caller
from models.columns import Instant, JsonText


class WorkflowStatus(StrEnum):
    """What its owner wants of a workflow."""

    DRAFT = "draft"
    ACTIVE = "active"
    PAUSED = "paused"
    ARCHIVED = "archived"


DEFAULT_SETTINGS: dict[str, Any] = {"timeout": 3600, "retryOnFailure": False, "maxRetries": 3}


class Workflow(SQLModel, table=True):
    """What lists and checks need of a workflow; its graph stands apart."""

    __table_args__ = (
        Index("ix_workflow_organization_created", "organization_id", "created_at"),
        Index("ix_workflow_organization_name", "organization_id", "name"),
        Index("ix_workflow_organization_updated", "organization_id", "updated_at"),
    )

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    lane: int = Field(sa_type=SmallInteger)
    owner_id: str = Field(foreign_key="user_account.id")
    name: str
    description: str = ""
    status: str = WorkflowStatus.DRAFT
    version: int = 1
    revision: int = 1
    """Goes up with every change of the workflow, its graph or who may see it."""
    tags: list[str] = Field(sa_column=Column(JsonText, nullable=False))
    settings: dict[str, Any] = Field(sa_column=Column(JsonText, nullable=False))
    config: dict[str, Any] = Field(sa_column=Column(JsonText, nullable=False))
    scopes: list[str] = Field(sa_column=Column(JsonText, nullable=False))
    is_public: bool = False
    is_template: bool = False
    created_at: datetime = Field(sa_column=Column(Instant, nullable=False))
    updated_at: datetime = Field(sa_column=Column(Instant, nullable=False))
    deleted_at: datetime | None = Field(default=None, sa_column=Column(Instant))


class WorkflowGraph(SQLModel, table=True):
    """A workflow's nodes and connections, in the stored form."""

    __tablename__ = "workflow_graph"

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    lane: int = Field(sa_type=SmallInteger)
    nodes: list[dict[str, Any]] = Field(sa_column=Column(JsonText, nullable=False))
    connections: list[dict[str, Any]] = Field(sa_column=Column(JsonText, nullable=False))


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
    shared_at: datetime = Field(sa_column=Column(Instant, nullable=False))


class WorkflowVersion(SQLModel, table=True):
    """A snapshot that never changes."""

    __tablename__ = "workflow_version"
    __table_args__ = (UniqueConstraint("workflow_id", "version_tag", name="uq_workflow_version_tag"),)

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    version: int = Field(primary_key=True)
    lane: int = Field(sa_type=SmallInteger)
    version_tag: str
    description: str = ""
    snapshot: dict[str, Any] = Field(sa_column=Column(JsonText, nullable=False))
    created_by: str
    created_at: datetime = Field(sa_column=Column(Instant, nullable=False))


class Definition(SQLModel, table=True):
    """What a run pins: nodes, connections and settings, addressed by their content."""

    organization_id: str = Field(primary_key=True)
    hash: str = Field(primary_key=True)
    lane: int = Field(sa_type=SmallInteger)
    body: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=Column(Instant, nullable=False))


def readable_by(caller: Caller) -> ColumnElement[bool]:
    """Return the condition under which a caller may read and execute a workflow."""
    own_organization = and_(
        col(Workflow.organization_id) == caller.organization_id, col(Workflow.deleted_at).is_(None)
    )
    if caller.is_admin:
        return own_organization
    shared = select(col(WorkflowShare.workflow_id)).where(col(WorkflowShare.user_id) == caller.user_id)
    return and_(
        own_organization,
        or_(
            col(Workflow.owner_id) == caller.user_id,
            col(Workflow.is_public),
            col(Workflow.id).in_(shared),
        ),
    )


def writable_by(caller: Caller) -> ColumnElement[bool]:
    """Return the condition under which a caller may change, share and delete a workflow."""
    return and_(
        readable_by(caller), or_(col(Workflow.owner_id) == caller.user_id, _always(when=caller.is_admin))
    )


def _always(*, when: bool) -> ColumnElement[bool]:
    return ~false() if when else false()
