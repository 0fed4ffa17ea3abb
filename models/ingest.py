"""Ingest: tables of deliveries, events, and tokens for senders that can't send an API key."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Column, Index, Integer, LargeBinary, SmallInteger, Text, UniqueConstraint, text
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn

INTAKE_KINDS: Final = ("queue", "email", "event", "webhook", "schedule")
"""Triggers whose runs have no waiting caller: their failed runs are dead letters."""


class IngestRoute(StrEnum):
    """Route of an inbound request."""

    ENQUEUE = "enqueue"
    ENQUEUE_BATCH = "enqueue-batch"
    EMAIL = "email-trigger"
    EVENTS = "events"
    HOOK = "hook"


class DeliveryOutcome(StrEnum):
    """Outcome of an inbound request."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    """Repetition of an earlier request, with the same answer."""
    DEFERRED = "deferred"
    """Accepted; its run starts when the workflow may run."""
    REJECTED = "rejected"
    SHED = "shed"
    """Refused for lack of capacity; the sender should retry later."""


class SenderTokenKind(StrEnum):
    """Purpose of a sender token."""

    TRIGGER = "trigger"
    """Requests for one workflow."""
    EVENT = "event"
    """Events of one organization."""


TOKEN_PREFIXES: Final[Mapping[SenderTokenKind, str]] = {
    SenderTokenKind.TRIGGER: "tt-",
    SenderTokenKind.EVENT: "et-",
}


class Delivery(SQLModel, table=True):
    """Authenticated request of a sender, committed together with its runs."""

    __tablename__ = "delivery"
    __table_args__ = (
        Index("ix_delivery_workflow", "workflow_id", "created_at"),
        Index("ix_delivery_organization", "organization_id", "created_at"),
        Index(
            "ix_delivery_outcome",
            *("organization_id", "outcome", "created_at", "id"),
            postgresql_where=text("outcome <> 'accepted'"),
            sqlite_where=text("outcome <> 'accepted'"),
        ),
        Index(
            "ix_delivery_execution",
            "execution_id",
            postgresql_where=text("execution_id IS NOT NULL"),
            sqlite_where=text("execution_id IS NOT NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    workflow_id: str | None = None
    """Target workflow; None for an event, which has no single target."""
    user_id: str
    """User on whose behalf it runs."""
    route: str
    sender: str
    """Sender: `api-key:`, `trigger-token:` or `event-token:` with its id, or the provider that signed the
    request.
    """
    content_hash: str
    """SHA-256 of the body, in hexadecimal."""
    content_bytes: int = Field(sa_column=Column(Integer, nullable=False))
    outcome: str
    status: int = Field(sa_column=Column(SmallInteger, nullable=False))
    """HTTP status of the answer."""
    reason: str | None = None
    """Reason of a refusal or deferral: `code: message`, without secrets."""
    execution_id: str | None = None
    """Id of its run, if it has started exactly one; that of the first delivery for a duplicate."""
    event_id: str | None = None
    answer: str | None = Field(default=None, sa_column=Column(Text))
    """Result as JSON text.

    It is the run ids of a batch with several runs, or the results of an event, `[[workflow id, name,
    execution id, error]]`. An error beside an execution id is true if that execution doesn't exist.
    """
    payload: str | None = Field(default=None, sa_column=Column(Text))
    """Trigger input as JSON text, for a refused request that may be redriven."""
    deduplication_key: str | None = Field(default=None, sa_column=Column(Text))
    """Idempotency key of a refused request, as JSON text.

    A repetition by the sender has it, and a redrive consumes it.
    """
    redriven_from: str | None = None
    """Delivery that this one redrives."""
    not_before: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Earliest start of its run, as known at its arrival; None for a start at once, or at an unknown time."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class EventRecord(SQLModel, table=True):
    """Event as reported by its sender, stored for a while so that it can be replayed."""

    __tablename__ = "event"
    __table_args__ = (
        Index("ix_event_organization", "organization_id", "created_at"),
        Index("ix_event_type", "organization_id", "event_type", "created_at"),
        Index(
            "ix_event_undelivered",
            "created_at",
            postgresql_where=text("delivered_at IS NULL"),
            sqlite_where=text("delivered_at IS NULL"),
        ),
    )

    id: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    user_id: str
    event_type: str
    source: str
    data: str = Field(sa_column=Column(Text, nullable=False))
    """Trigger input as JSON text, including the type and the source."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    delivered_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time since which all nodes that waited for it have it."""


class SenderToken(SQLModel, table=True):
    """Token in the URL of a sender that can't set a header, stored as a hash only."""

    __tablename__ = "intake_token"
    __table_args__ = (
        UniqueConstraint("hash", name="uq_intake_token_hash"),
        Index("ix_intake_token_organization", "organization_id", "kind"),
        Index("ix_intake_token_workflow", "workflow_id"),
        Index("ix_intake_token_secret", "secret_id"),
    )

    id: str = Field(primary_key=True)
    kind: str
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    workflow_id: str | None = Field(default=None, foreign_key="workflow.id")
    """Workflow of a trigger token; None for an event token."""
    user_id: str = Field(foreign_key="user_account.id")
    """Author of the token; runs of its events act on behalf of this user."""
    name: str = ""
    hash: str
    hint: str
    """Last characters of the token."""
    providers: str = ""
    """Providers with accepted signatures, separated by commas."""
    encrypted: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    """Encrypted JSON object of signing keys by provider."""
    secret_id: str | None = None
    """Id of the server secret that decrypts them."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    expires_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """End of validity after a rotation; None: valid until it is revoked."""
    revoked_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    last_used_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))


class RejectedRequestSample(SQLModel, table=True):
    """Sample of recently rejected requests, for diagnosis; a flood of requests replaces only its own samples."""

    __tablename__ = "intake_sample"

    route: str = Field(primary_key=True)
    slot: int = Field(sa_column=Column(SmallInteger, primary_key=True))
    """Number of the slot; requests of a route fill a fixed number of slots in turn."""
    organization_id: str | None = None
    """Organization of the named workflow or token, if there is one; only its users may see the sample."""
    workflow_id: str | None = None
    reason: str
    content_bytes: int = Field(sa_column=Column(Integer, nullable=False))
    shape: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    """Outline of the request: names of its headers, its content type, the address of its sender."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
