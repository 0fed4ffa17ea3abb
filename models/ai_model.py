"""Language models of organizations with access conditions, and the settings of organizations for them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Column, ColumnElement, Index, SmallInteger, UniqueConstraint, and_, or_, select, true
from sqlmodel import Field, SQLModel, col

from models.access import ApiCaller, User, UserRole
from models.column_types import JsonTextColumn, TimestampColumn


class AiModel(SQLModel, table=True):
    """Language model of a provider; address and key are those of its data source."""

    __tablename__ = "ai_model"
    __table_args__ = (
        UniqueConstraint("organization_id", "name", name="uq_ai_model_name"),
        Index("ix_ai_model_organization", "organization_id", "created_at", "id"),
        Index("ix_ai_model_data_source", "data_source_id"),
    )

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_type=SmallInteger)
    owner_id: str = Field(foreign_key="user_account.id")
    name: str
    type: str
    """`third-party` or `self-hosted`."""
    provider: str
    vendor_model_id: str
    """Name of the model at its provider."""
    data_source_id: str
    """Data source of the type `ai-provider`; runs use it with the rights of the model's owner."""
    context_length: int | None = None
    max_output_tokens: int | None = None
    price: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Prices in US dollars per million tokens, as decimal texts; None if they are unknown."""
    limits: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Limits that the organization sets for all calls, as `engine.model_limits` has them; None without limits."""
    capabilities: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Abilities that the last test has seen; None before the first test."""
    tested_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    blocked_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time until which its provider accepts no calls, as it has said; None if it never has."""
    last_test: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Result of the last test, whether it answered or not: time, success, message, duration; None before the first."""
    revision: int = 1
    """Number that increases with every change."""
    is_shared: bool = False
    """Whether the whole organization may use it."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class AiModelShare(SQLModel, table=True):
    """Permission of another user to see and use a model."""

    __tablename__ = "ai_model_share"
    __table_args__ = (Index("ix_ai_model_share_user", "user_id"),)

    model_id: str = Field(primary_key=True, foreign_key="ai_model.id")
    user_id: str = Field(primary_key=True, foreign_key="user_account.id")
    shared_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class AiSettings(SQLModel, table=True):
    """Settings of an organization for language models; without a row, all have their defaults."""

    __tablename__ = "ai_settings"

    organization_id: str = Field(primary_key=True, foreign_key="organization.id")
    shard: int = Field(sa_type=SmallInteger)
    month_budget: dict[str, Any] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Budget of all calls in a month, as `engine.month_budget.MonthBudget` has it; None without one."""
    default_model_id: str | None = None
    """Model that `default` in a config means, `echo` among them; None without one."""
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


def is_readable_by(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for models that a caller may see and use: own or shared; for an admin, all of the
    organization.

    Models are shared with single users, or by `is_shared` with the whole organization.
    """
    own = true() if caller.is_admin else _is_open_to(caller.user_id)
    return and_(col(AiModel.organization_id) == caller.organization_id, own)


def is_usable_by(organization_id: str, user_id: str) -> ColumnElement[bool]:
    """Return the SQL condition for models that the user of a run may use: own or shared; for a user who is an admin
    when the statement is executed, all of the organization.
    """
    is_admin = (
        select(col(User.id))
        .where(
            col(User.id) == user_id,
            col(User.organization_id) == organization_id,
            col(User.role) == UserRole.ADMIN,
        )
        .exists()
    )
    return and_(col(AiModel.organization_id) == organization_id, or_(is_admin, _is_open_to(user_id)))


def _is_open_to(user_id: str) -> ColumnElement[bool]:
    shared = select(col(AiModelShare.model_id)).where(col(AiModelShare.user_id) == user_id)
    return or_(col(AiModel.owner_id) == user_id, col(AiModel.is_shared), col(AiModel.id).in_(shared))
