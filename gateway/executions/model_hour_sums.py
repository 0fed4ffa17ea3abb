"""Hourly sums of the answered calls of language models, beside the counts of runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, select
from sqlmodel import col

from engine.model_prices import show_cost
from engine.month_budget import month_number
from gateway.executions.model_usage import ModelSumsShape
from journal.run_hours import HOUR
from models.ai_model import AiModel
from models.model_hour import ModelHour
from models.model_spending import ModelCost

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller

_SUMS: Final = ("calls", "unpriced_calls", "input_tokens", "output_tokens", "cost")


async def read_hours(
    connection: AsyncConnection, caller: ApiCaller, since: datetime, now: datetime
) -> Mapping[datetime, Row[*tuple[Any, ...]]]:
    """Return the sums of the answered calls of models in each hour since `since`, by the begin of the hour.

    For an admin, all models of the organization count, deleted ones too; for others, their own. Hours without calls are
    absent.
    """
    rows = await connection.execute(hours_statement(caller, since, now))
    return {row.starts_at: row for row in rows}


def hours_statement(caller: ApiCaller, since: datetime, now: datetime) -> Select[*tuple[Any, ...]]:
    """Return the statement that sums the answered calls of models by hour, from `since` to the present hour, in which
    `now` is.

    An admin's models are those with costs in the months of these hours, deleted ones among them; others have their own.
    By the ids of the models, the database reads their hours from an index.
    """
    # A call counts in the month of its reservation, which may be over when it ends.
    months = {month_number(since - HOUR), month_number(now)}
    models = (
        select(col(ModelCost.model_id)).where(
            col(ModelCost.organization_id) == caller.organization_id,
            col(ModelCost.month).in_(sorted(months)),
        )
        if caller.is_admin
        else select(col(AiModel.id)).where(
            col(AiModel.organization_id) == caller.organization_id, col(AiModel.owner_id) == caller.user_id
        )
    )
    starts_at = col(ModelHour.starts_at)
    sums = (func.sum(col(getattr(ModelHour, name))).label(name) for name in _SUMS)
    return (
        select(starts_at, *sums)
        .where(
            col(ModelHour.organization_id) == caller.organization_id,
            col(ModelHour.model_id).in_(models),
            starts_at >= since,
            col(ModelHour.error) == "",
        )
        .group_by(starts_at)
    )


def sum_rows(rows: Iterable[Row[*tuple[Any, ...]]]) -> ModelSumsShape:
    """Return the total of the sums of several hours; zeros for none."""
    found = list(rows)
    total = {name: sum(int(getattr(row, name)) for row in found) for name in _SUMS}
    return ModelSumsShape(
        calls=total["calls"],
        unpriced_calls=total["unpriced_calls"],
        input_tokens=total["input_tokens"],
        output_tokens=total["output_tokens"],
        cost=show_cost(total["cost"]) or "0",
    )
