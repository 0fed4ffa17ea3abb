"""Approvals: requests with mails to send, links that answer without an account, and votes towards a decision."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, Index, SmallInteger, Text, text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class ApprovalRequest(SQLModel, table=True):
    """Question that assignees are told about by mail, committed together with the wait of its run."""

    __tablename__ = "approval_request"
    __table_args__ = (
        Index(
            "ix_approval_request_due",
            "due_at",
            postgresql_where=text("due_at IS NOT NULL"),
            sqlite_where=text("due_at IS NOT NULL"),
        ),
    )

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    round: int = 0
    """Number of rounds of mails that were sent: the question, then reminders."""
    attempts: int = 0
    """Failed attempts at the current round."""
    error: str | None = Field(default=None, sa_column=Column(Text))
    """Error of the last attempt, if it failed."""
    due_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of the next attempt or reminder, or the end of a worker's lease; None if no mail follows."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class ApprovalLink(SQLModel, table=True):
    """Link of one assignee to one question; only the hash of its token is stored."""

    __tablename__ = "approval_link"
    __table_args__ = (Index("ix_approval_link_execution", "execution_id"),)

    hash: str = Field(primary_key=True)
    """SHA-256 of the token, in hexadecimal."""
    execution_id: str
    node_id: str
    iteration: str = ""
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    organization_id: str
    assignee: str
    """Mail address, or the id of a user: recorded as the author of the answer."""
    round: int = 0
    """Round of mails in which it was sent last; 0 before the first one."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    used_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))


class ApprovalVote(SQLModel, table=True):
    """Answer of one person to a question, which needs one or several."""

    __tablename__ = "approval_vote"
    __table_args__ = (Index("ix_approval_vote_organization", "organization_id", "created_at", "id"),)

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    voter: str = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    id: str | None = None
    """Id in lists; None, as organization and title, for answers before lists of answers."""
    organization_id: str | None = None
    title: str | None = Field(default=None, sa_column=Column(Text))
    """Title of the question as it was asked."""
    choice: str | None = None
    data: str = Field(sa_column=Column(Text, nullable=False))
    """JSON text."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
