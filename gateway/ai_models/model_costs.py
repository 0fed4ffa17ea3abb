"""Costs of language models by workflow, model and calendar month."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, select, true
from sqlmodel import col

from engine.model_prices import show_cost
from engine.month_budget import MonthLimitAction, month_number
from gateway.http import limits
from gateway.http.errors import invalid_query
from gateway.http.parameters import TextParameter
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from models.model_spending import ModelCost
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.request import GatewayRequest

MONTH: Final = TextParameter("month", "Calendar month (UTC), such as `2026-11`; without it the present one.")
WORKFLOW: Final = TextParameter("workflow_id", "Only the costs of this workflow.")
_MONTH: Final = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")


class ModelCostShape(WireStruct):
    """Answered calls of one model by one workflow in a month."""

    workflow_id: str
    workflow_name: str | None
    """Null if the workflow doesn't exist any more."""
    model_id: str
    calls: int
    unpriced_calls: int
    """Calls of a model without a price, which `cost` doesn't contain."""
    input_tokens: int
    output_tokens: int
    cost: str
    """US dollars as a decimal text."""


class MonthBudgetUse(WireStruct):
    """Use of the organization's budget in the present month; costs in US dollars as decimal texts."""

    max_cost: str | None
    max_tokens: int | None
    on_limit: MonthLimitAction
    spent_cost: str
    """Of all answered calls of the organization with a price, also of workflows that you may not read."""
    reserved_cost: str
    """Of calls that are being made, and of those whose answer was lost."""
    spent_tokens: int
    reserved_tokens: int


class ModelCostList(WireStruct):
    """Costs of a month, the highest first."""

    month: str
    cost: str
    """Sum of the listed costs in US dollars, as a decimal text."""
    costs: Sequence[ModelCostShape]
    budget: MonthBudgetUse | None
    """Null without a budget, and for other months than the present one."""


async def index(request: GatewayRequest) -> JsonResponse:
    """List the costs of language models in a month by workflow and model: those of the workflows that you may read.

    Admins get all of the organization, also of deleted workflows; at most 1,000 rows.
    """
    now, given = request.gateway.clock(), request.query[MONTH]
    found = _MONTH.fullmatch(given or f"{now:%Y-%m}")
    if found is None:
        raise invalid_query("month", "invalid-value", "month is a year and a month, such as 2026-11")
    workflow_id = request.query[WORKFLOW]
    is_wanted = true() if workflow_id is None else col(ModelCost.workflow_id) == workflow_id
    caller, month = request.caller, int(found[1] + found[2])
    is_readable = true() if caller.is_admin else and_(col(Workflow.id).is_not(None), is_readable_by(caller))
    statement: Select[*tuple[Any, ...]] = (
        select(ModelCost, col(Workflow.name).label("name"))
        .join(Workflow, col(Workflow.id) == col(ModelCost.workflow_id), isouter=True)
        .where(
            col(ModelCost.organization_id) == caller.organization_id,
            col(ModelCost.month) == month,
            is_readable,
            is_wanted,
        )
        .order_by(col(ModelCost.cost).desc(), col(ModelCost.workflow_id), col(ModelCost.model_id))
        .limit(limits.MODEL_COSTS)
    )
    async with request.gateway.database.read() as connection:
        rows = (await connection.execute(statement)).all()
        is_present = month == month_number(now)
        budget = await _find_budget(connection, caller.organization_id, month) if is_present else None
    return JsonResponse(
        ModelCostList(
            month=found[0],
            cost=show_cost(sum(row.cost for row in rows)) or "0",
            costs=[
                ModelCostShape(
                    workflow_id=row.workflow_id,
                    workflow_name=row.name,
                    model_id=row.model_id,
                    calls=row.calls,
                    unpriced_calls=row.unpriced_calls,
                    input_tokens=row.input_tokens,
                    output_tokens=row.output_tokens,
                    cost=show_cost(row.cost) or "0",
                )
                for row in rows
            ],
            budget=budget,
        )
    )


async def _find_budget(
    connection: AsyncConnection, organization_id: str, month: int
) -> MonthBudgetUse | None:
    """Return the budget of an organization with its use in a month, such as 202611; None without a budget."""
    from execution import organization_budgets  # noqa: PLC0415 - loaded with the first request

    budget = await organization_budgets.find(connection, organization_id)
    if budget is None:
        return None
    spending = await organization_budgets.read_spending(connection, organization_id, month)
    return MonthBudgetUse(
        max_cost=budget.max_cost,
        max_tokens=budget.max_tokens,
        on_limit=budget.on_limit,
        spent_cost=show_cost(spending.spent_cost) or "0",
        reserved_cost=show_cost(spending.reserved_cost) or "0",
        spent_tokens=spending.spent_tokens,
        reserved_tokens=spending.reserved_tokens,
    )
