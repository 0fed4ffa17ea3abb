"""Audit trail: append-only rows for every change and its author."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Column, Index, SmallInteger, text
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn


class AuditAction(StrEnum):
    """Kind of change."""

    WORKFLOW_CREATED = "workflow.created"
    WORKFLOW_UPDATED = "workflow.updated"
    WORKFLOW_STATUS_SET = "workflow.status-set"
    WORKFLOW_LIFECYCLE_SET = "workflow.lifecycle-set"
    WORKFLOW_KEPT_AWAKE = "workflow.kept-awake"
    WORKFLOW_HOLD_ENDED = "workflow.hold-ended"
    WORKFLOW_DEPLOYED = "workflow.deployed"
    WORKFLOW_UNDEPLOYED = "workflow.undeployed"
    WORKFLOW_STOPPED = "workflow.stopped"
    WORKFLOW_STARTED = "workflow.started"
    WORKFLOW_DELETED = "workflow.deleted"
    WORKFLOW_DUPLICATED = "workflow.duplicated"
    WORKFLOW_BUILT = "workflow.built"
    WORKFLOW_IMPORTED = "workflow.imported"
    WORKFLOW_VISIBILITY_SET = "workflow.visibility-set"
    WORKFLOW_LOG_LEVEL_SET = "workflow.log-level-set"
    WORKFLOW_LAID_OUT = "workflow.laid-out"
    WORKFLOW_SCOPES_COMPUTED = "workflow.scopes-computed"
    NODE_ADDED = "node.added"
    NODE_CONFIGURED = "node.configured"
    NODE_REMOVED = "node.removed"
    CONNECTION_ADDED = "connection.added"
    CONNECTION_REMOVED = "connection.removed"
    VERSION_CREATED = "version.created"
    VERSION_RESTORED = "version.restored"
    SHARE_ADDED = "share.added"
    SHARE_REMOVED = "share.removed"
    TEMPLATE_SAVED = "template.saved"
    TEMPLATE_USED = "template.used"
    KEY_CREATED = "key.created"
    KEY_REVOKED = "key.revoked"
    USER_CREATED = "user.created"
    IDENTITY_CONNECTED = "identity.connected"
    INVITATION_CREATED = "invitation.created"
    INVITATION_ACCEPTED = "invitation.accepted"
    INVITATION_REVOKED = "invitation.revoked"
    SESSION_CREATED = "session.created"
    SESSION_ENDED = "session.ended"
    SIGN_IN_REFUSED = "sign-in.refused"
    EVENT_TOKEN_CREATED = "event-token.created"  # noqa: S105 - the name of an action
    EVENT_TOKEN_REVOKED = "event-token.revoked"  # noqa: S105 - the name of an action
    TRIGGER_TOKEN_SET = "trigger-token.set"  # noqa: S105 - the name of an action
    DEAD_LETTERS_PURGED = "dead-letters.purged"
    DEAD_LETTERS_REDRIVEN = "dead-letters.redriven"
    DEAD_LETTERS_MUTED = "dead-letters.muted"
    DEAD_LETTERS_UNMUTED = "dead-letters.unmuted"
    DEAD_LETTERS_REPLAYED = "dead-letters.replayed"
    DELIVERIES_REDRIVEN = "deliveries.redriven"
    TRIGGER_TOKEN_REVOKED = "trigger-token.revoked"  # noqa: S105 - the name of an action
    SIGNING_SECRET_SET = "signing-secret.set"  # noqa: S105 - the name of an action
    EXECUTIONS_CANCELLED = "executions.cancelled"
    EXECUTIONS_RETRIED = "executions.retried"
    EXECUTIONS_REPLAYED = "executions.replayed"
    EXECUTIONS_DELETED = "executions.deleted"
    INPUT_ANSWERED = "input.answered"
    INPUT_REASSIGNED = "input.reassigned"
    TASK_RETRIED = "task.retried"
    TASK_CANCELLED = "task.cancelled"
    DATA_SOURCE_CREATED = "data-source.created"
    DATA_SOURCE_UPDATED = "data-source.updated"
    DATA_SOURCE_VISIBILITY_SET = "data-source.visibility-set"
    DATA_SOURCE_DELETED = "data-source.deleted"
    TOOLS_REFRESHED = "tools.refreshed"
    TOOLS_ACCEPTED = "tools.accepted"
    MODEL_CREATED = "model.created"
    MODEL_UPDATED = "model.updated"
    MODEL_DELETED = "model.deleted"
    AI_SETTINGS_UPDATED = "ai-settings.updated"
    NODE_TYPE_ADDED = "node-type.added"
    NODE_TYPE_DEPRECATED = "node-type.deprecated"
    NODE_TYPE_DELETED = "node-type.deleted"
    DRIFT_FIXED = "drift.fixed"
    DEPLOYMENT_STARTED = "deployment.started"
    """This and the following are decisions of the system, kept as `LifecycleDecision`."""
    DEPLOYMENT_WOKEN = "deployment.woken"
    DEPLOYMENT_DRAINED = "deployment.drained"
    DEPLOYMENT_STOPPED = "deployment.stopped"
    DELIVERY_DEFERRED = "delivery.deferred"
    """Decision of the system to start the run of a delivery later; the delivery itself is its record."""
    EXECUTIONS_PRUNED = "executions.pruned"
    """Decision of the system to delete old executions, kept as `SystemDecision`."""
    EXECUTION_RECLAIMED = "execution.reclaimed"
    """Decision of the system to take an execution back from a lost worker, kept as its `BlockedInterval`."""


class AuditEntry(SQLModel, table=True):
    """One change of one object."""

    __tablename__ = "audit_entry"
    __table_args__ = (
        Index("ix_audit_entry_organization", "organization_id", "created_at"),
        Index("ix_audit_entry_object", "organization_id", "object_id", "created_at"),
        Index("ix_audit_entry_action", "organization_id", "action", "created_at"),
        Index("ix_audit_entry_user", "organization_id", "user_id", "created_at"),
        Index("ix_audit_entry_key", "organization_id", "key_id", "created_at"),
        Index("ix_audit_entry_request", "organization_id", "request_id", "created_at"),
        Index("ix_audit_entry_address", "organization_id", "address_hash", "created_at"),
        Index("ix_audit_entry_chain", "organization_id", "sequence", unique=True),
        Index(
            "ix_audit_entry_unchained",
            "organization_id",
            postgresql_where=text("chain_hash IS NULL"),
            sqlite_where=text("chain_hash IS NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_type=SmallInteger)
    user_id: str
    key_id: str
    """Id of the API key; it is `operator`, as is `user_id`, for changes by the operator of the server."""
    action: str
    object_id: str
    """Id of the changed workflow, data source, key or user; for executions, of their workflow or
    organization.
    """
    before_hash: str | None = None
    """SHA-256 of the object before the change, in hexadecimal; null for a new object."""
    after_hash: str | None = None
    """SHA-256 of the object after the change; null for a deleted object."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    request_id: str | None = None
    """Request that made the change; None for changes by the operator of the server, and in old entries."""
    address_hash: str | None = None
    """Keyed hash of the address that the request came from."""
    changes: list[dict[str, Any]] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """First changes by path, with values of harmless fields; None where they are not recorded."""
    sequence: int | None = Field(default=None, sa_column=Column(BigInteger))
    """Place in the chain of its organization, from 1; None until it joins the chain."""
    chain_hash: str | None = None
    """SHA-256 of its content and of the chain hash before it, in hexadecimal; see `journal.audit_chain`."""


class SystemDecision(SQLModel, table=True):
    """Decision of the system about objects of a workflow; those about its pods are `LifecycleDecision`."""

    __tablename__ = "system_decision"
    __table_args__ = (
        Index("ix_system_decision_organization", "organization_id", "at"),
        Index("ix_system_decision_workflow", "organization_id", "workflow_id", "at"),
        Index("ix_system_decision_action", "organization_id", "action", "at"),
    )

    id: str = Field(primary_key=True)
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    workflow_id: str
    at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    action: str
    """Name of the action in the audit trail."""
    reason: str
    inputs: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
