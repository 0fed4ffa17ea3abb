"""What arrives: deliveries, the events among them, and the tokens of senders that can't carry an API key."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Column, Index, Integer, LargeBinary, SmallInteger, Text, UniqueConstraint, text
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn


class IngestRoute(StrEnum):
    """Where something has arrived."""

    ENQUEUE = "enqueue"
    ENQUEUE_BATCH = "enqueue-batch"
    EMAIL = "email-trigger"
    EVENTS = "events"
    HOOK = "hook"


class DeliveryOutcome(StrEnum):
    """What became of what has arrived."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    """It had arrived before, and was answered as it was then."""
    DEFERRED = "deferred"
    """It was accepted, and runs when its workflow may."""
    REJECTED = "rejected"
    SHED = "shed"
    """There was too much of it: the sender was asked to come again."""


class SenderTokenKind(StrEnum):
    """What a token of a sender is good for."""

    TRIGGER = "trigger"
    """What arrives for one workflow."""
    EVENT = "event"
    """Events of one organisation."""


TOKEN_PREFIXES: Final[Mapping[SenderTokenKind, str]] = {
    SenderTokenKind.TRIGGER: "tt-",
    SenderTokenKind.EVENT: "et-",
}


class Delivery(SQLModel, table=True):
    """One authenticated request of a sender, committed with what it has brought."""

    __tablename__ = "delivery"
    __table_args__ = (
        Index("ix_delivery_workflow", "workflow_id", "created_at"),
        Index("ix_delivery_organization", "organization_id", "created_at"),
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
    """None: an event, which is nobody's own."""
    user_id: str
    """For whom it runs."""
    route: str
    sender: str
    """Who has sent it: `api-key:`, `trigger-token:` or `event-token:` and the id of that, or a provider that signed."""
    content_hash: str
    """SHA-256 of the body, in hexadecimal."""
    content_bytes: int = Field(sa_column=Column(Integer, nullable=False))
    outcome: str
    status: int = Field(sa_column=Column(SmallInteger, nullable=False))
    """Of the answer."""
    reason: str | None = None
    """Why it was refused: `code: message`; never has a secret."""
    execution_id: str | None = None
    """Of the only run that it has brought, or brought the first time."""
    event_id: str | None = None
    answer: str | None = Field(default=None, sa_column=Column(Text))
    """JSON: the ids of the runs of a batch that brought several; or what has come of an event,
    `[[workflow id, name, execution id, error]]`, where an error beside an execution is true if there is no such one.
    """
    payload: str | None = Field(default=None, sa_column=Column(Text))
    """JSON: what the run would have been given, of what was refused and may be tried again."""
    deduplication_key: str | None = Field(default=None, sa_column=Column(Text))
    """JSON of what was refused: the idempotency key that a repetition by its sender has, and that a redrive uses up."""
    redriven_from: str | None = None
    """The delivery that this one repeats."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class EventRecord(SQLModel, table=True):
    """Something that has happened, as it was told; kept for a while, so that it can be replayed."""

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
    """JSON: what runs are given, with the type and the source in it."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    delivered_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Since then, all nodes have it that waited for it."""


class SenderToken(SQLModel, table=True):
    """A token for the URL of a sender that can't set a header; only a hash of it is stored."""

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
    """None: a token for events."""
    user_id: str = Field(foreign_key="user_account.id")
    """Who has made it, and for whom events run that come by it."""
    name: str = ""
    hash: str
    hint: str
    """Its last characters."""
    providers: str = ""
    """Whose signatures it takes, between commas."""
    encrypted: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    """JSON: what providers sign with, by provider."""
    secret_id: str | None = None
    """Of the server's secret that seals it."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    expires_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """After a rotation the old one is good for a while; None: until it is revoked."""
    revoked_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    last_used_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))


class RejectedRequestSample(SQLModel, table=True):
    """One of the last requests that were not let in, so that somebody can see why; a flood replaces its own."""

    __tablename__ = "intake_sample"

    route: str = Field(primary_key=True)
    slot: int = Field(sa_column=Column(SmallInteger, primary_key=True))
    """Requests of a route take turns at so many places."""
    organization_id: str | None = None
    """Of the workflow or token that was named, where there is one: who may look at it."""
    workflow_id: str | None = None
    reason: str
    content_bytes: int = Field(sa_column=Column(Integer, nullable=False))
    shape: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    """What it looked like: the names of its headers, its content type, its sender's address."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
