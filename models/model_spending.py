"""Spending on language models: one row for each call of a run, and sums by month."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Column, Index, SmallInteger, func, select, text
from sqlmodel import Field, SQLModel, col

from models.column_types import TimestampColumn

if TYPE_CHECKING:
    from sqlalchemy import Select


class ModelCharge(SQLModel, table=True):
    """Call of a language model: reserved before it, settled after it.

    A charge that stays reserved belongs to a call whose answer was lost, and that its provider may have billed.
    """

    __tablename__ = "model_charge"
    __table_args__ = (
        Index("ix_model_charge_root", "root_id"),
        Index(
            "ix_model_charge_reserved",
            "organization_id",
            "month",
            postgresql_where=text("NOT is_settled"),
            sqlite_where=text("NOT is_settled"),
        ),
    )

    execution_id: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    """Idempotency key of the call."""
    shard: int = Field(sa_type=SmallInteger)
    root_id: str
    """Execution at the root of the sub-workflows, whose budget counts the call."""
    node: str
    """Node and iteration, whose budget counts the call."""
    tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Input and output together."""
    cost: int | None = Field(default=None, sa_column=Column(BigInteger))
    """Nano-dollars; None if the price is unknown."""
    is_settled: bool
    organization_id: str | None = None
    """None for charges of earlier versions."""
    month: int | None = None
    """Year and month of the reservation as one number, such as 202611, whose budget counts it; None as above."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class ModelCost(SQLModel, table=True):
    """Answered calls of one model by one workflow in one calendar month (UTC)."""

    __tablename__ = "model_cost"

    organization_id: str = Field(primary_key=True)
    month: int = Field(primary_key=True)
    """Year and month as one number, such as 202611."""
    workflow_id: str = Field(primary_key=True)
    model_id: str = Field(primary_key=True)
    shard: int = Field(sa_type=SmallInteger)
    calls: int = Field(sa_column=Column(BigInteger, nullable=False))
    unpriced_calls: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Calls whose cost is unknown."""
    input_tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    output_tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    cost: int = Field(sa_column=Column(BigInteger, nullable=False))
    """Nano-dollars of the calls with a known cost."""


def month_sums_statement(organization_id: str, month: int) -> Select[*tuple[Any, ...]]:
    """Return the statement for the spent and reserved amounts of an organization in a month, such as 202611.

    Its row has `spent_cost` and `reserved_cost` in nano-dollars, `spent_tokens` and `reserved_tokens`; 0 without calls.
    A single statement sees a call either reserved or settled, never as both or as neither.
    """
    costs = (col(ModelCost.organization_id) == organization_id, col(ModelCost.month) == month)
    charges = (
        col(ModelCharge.organization_id) == organization_id,
        col(ModelCharge.month) == month,
        col(ModelCharge.is_settled).is_(False),
    )
    spent_tokens = func.sum(col(ModelCost.input_tokens) + col(ModelCost.output_tokens))
    sums = {
        "spent_cost": select(func.sum(col(ModelCost.cost))).where(*costs),
        "spent_tokens": select(spent_tokens).where(*costs),
        "reserved_cost": select(func.sum(col(ModelCharge.cost))).where(*charges),
        "reserved_tokens": select(func.sum(col(ModelCharge.tokens))).where(*charges),
    }
    return select(*(func.coalesce(each.scalar_subquery(), 0).label(name) for name, each in sums.items()))
