"""Budget of an organization for language models in a calendar month (UTC)."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final, TypeAlias

import msgspec

MONTH_BUDGET_EXCEEDED: Final = "month-budget-exceeded"
"""Code of a call that the budget of the organization doesn't admit."""
DECEMBER: Final = 12
Dollars: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[0-9]{1,9}([.][0-9]{1,9})?$",
        description="US dollars as a decimal text such as `250` or `0.5`",
    ),
]
BudgetTokens: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000_000_000)]


class MonthLimitAction(StrEnum):
    """Consequence for a call that the budget of a month doesn't admit."""

    FAIL = "fail"
    WAIT = "wait"
    """The run waits, without a slot, for the next month."""


class MonthBudget(
    msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True
):
    """Limits of the costs of all calls of an organization in a month; None: no limit."""

    max_cost: Dollars | None = None
    """US dollars as a decimal text such as `250`; models without a price are then refused."""
    max_tokens: BudgetTokens | None = None
    """Input and output together."""
    on_limit: MonthLimitAction = MonthLimitAction.FAIL


class MonthSpending(msgspec.Struct, frozen=True):
    """Costs of an organization in a month in nano-dollars, and tokens of input and output together."""

    spent_cost: int
    spent_tokens: int
    reserved_cost: int
    """Of calls that are being made, or whose answer was lost."""
    reserved_tokens: int


def month_number(at: datetime) -> int:
    """Return year and month of a time in UTC as one number, such as 202611."""
    return at.year * 100 + at.month


def find_next_month(at: datetime) -> datetime:
    """Return the beginning, in UTC, of the calendar month after that of a time in UTC."""
    if at.month == DECEMBER:
        return datetime(at.year + 1, 1, 1, tzinfo=UTC)
    return datetime(at.year, at.month + 1, 1, tzinfo=UTC)
