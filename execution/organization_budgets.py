"""Budget of an organization for language models: the rest of a month for a call."""

from __future__ import annotations

from decimal import Decimal
from random import random
from typing import TYPE_CHECKING, Final

import msgspec
from sqlalchemy import select
from sqlmodel import col

from engine.model_prices import show_cost
from engine.month_budget import (
    MONTH_BUDGET_EXCEEDED,
    MonthBudget,
    MonthLimitAction,
    MonthSpending,
    find_next_month,
    month_number,
)
from engine.run_errors import NodeError
from models.ai_model import AiSettings
from models.model_spending import ModelCharge, month_sums_statement

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.model_calls import ModelReservation

LONGEST_WAIT_SECONDS: Final = 172_800.0
"""Time after which a waiting run notices a higher budget. A node waits twenty times, so it reaches the next month."""
SPREAD_SECONDS: Final = 60.0
"""Time at the beginning of a month within which waiting runs continue, lest all do at once."""


async def find(
    connection: AsyncConnection, organization_id: str, *, is_locking: bool = False
) -> MonthBudget | None:
    """Return the monthly budget of an organization; None if it has none.

    With `is_locking`, its row in PostgreSQL stays locked until the end of the transaction.
    """
    statement = select(col(AiSettings.month_budget)).where(col(AiSettings.organization_id) == organization_id)
    stored = await connection.scalar(statement.with_for_update() if is_locking else statement)
    return None if stored is None else msgspec.convert(stored, MonthBudget)


async def read_spending(connection: AsyncConnection, organization_id: str, month: int) -> MonthSpending:
    """Return the spent and reserved amounts of an organization in a month, such as 202611."""
    sums = (await connection.execute(month_sums_statement(organization_id, month))).one()
    return MonthSpending(**{name: int(amount) for name, amount in sums._asdict().items()})


async def require_rest(
    connection: AsyncConnection, organization_id: str, reservation: ModelReservation, now: datetime
) -> None:
    """Raise a `NodeError` unless the rest of an organization's budget for the month of `now` suffices for a call;
    without a budget, every call passes.

    Calls are checked one after another: in PostgreSQL by the locked row of the budget, in SQLite by its write lock. The
    error may be retried, after a time, if the budget says to wait; not `model-price-unknown`, for a model without a
    price under a limit of cost. A call that is reserved already passes, as after a commit without an answer.
    """
    budget = await find(connection, organization_id, is_locking=True)
    if budget is None:
        return
    if budget.max_cost is not None and reservation.cost is None:
        message = f"{reservation.model_id}: the budget of the organization needs the price of the model"
        raise NodeError(message, code="model-price-unknown")
    spending = await read_spending(connection, organization_id, month_number(now))
    problem = find_problem(budget, spending, reservation)
    if not problem or await _is_reserved(connection, reservation.key):
        return
    seconds = None
    if budget.on_limit is MonthLimitAction.WAIT:
        until_next = (find_next_month(now) - now).total_seconds()
        seconds = min(until_next + random() * SPREAD_SECONDS, LONGEST_WAIT_SECONDS)  # noqa: S311 - jitter
    message = (
        f"The budget of the organization for {now:%Y-%m} doesn't suffice: {problem} are spent or reserved"
    )
    raise NodeError(
        message, code=MONTH_BUDGET_EXCEEDED, retryable=seconds is not None, retry_after_seconds=seconds
    )


async def _is_reserved(connection: AsyncConnection, key: str) -> bool:
    """Return whether the call with this key has a charge, reserved or settled."""
    charge = select(col(ModelCharge.key)).where(col(ModelCharge.key) == key)
    return await connection.scalar(charge) is not None


def find_problem(budget: MonthBudget, spending: MonthSpending, reservation: ModelReservation) -> str:
    """Return why a budget doesn't suffice for a call, as part of a sentence; empty if it does."""
    tokens = spending.spent_tokens + spending.reserved_tokens
    if budget.max_tokens is not None and tokens + reservation.tokens > budget.max_tokens:
        return f"the call may need {reservation.tokens:,} tokens, and {tokens:,} of {budget.max_tokens:,}"
    if budget.max_cost is not None and reservation.cost is not None:
        cost = spending.spent_cost + spending.reserved_cost
        if cost + reservation.cost > int(Decimal(budget.max_cost).scaleb(9)):
            may, spent = show_cost(reservation.cost), show_cost(cost)
            return f"the call may cost ${may}, and ${spent} of ${budget.max_cost}"
    return ""
