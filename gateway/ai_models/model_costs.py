"""Costs of language models by workflow, model and calendar month."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, select, true
from sqlmodel import col

from engine.model_prices import show_cost
from gateway.http import limits
from gateway.http.errors import invalid_query
from gateway.http.parameters import TextParameter
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from models.model_spending import ModelCost
from models.workflow import Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy import Select

    from gateway.http.request import GatewayRequest

MONTH: Final = TextParameter("month", "Calendar month (UTC), such as `2026-11`; without it the present one.")
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


class ModelCostList(WireStruct):
    """Costs of a month, the highest first."""

    month: str
    cost: str
    """Sum of the listed costs in US dollars, as a decimal text."""
    costs: Sequence[ModelCostShape]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the costs of language models in a month by workflow and model: those of the workflows that you may read.

    Admins get all of the organization, also of deleted workflows; at most 1,000 rows.
    """
    now, given = request.gateway.clock(), request.query[MONTH]
    found = _MONTH.fullmatch(given or f"{now:%Y-%m}")
    if found is None:
        raise invalid_query("month", "invalid-value", "month is a year and a month, such as 2026-11")
    caller = request.caller
    is_readable = true() if caller.is_admin else and_(col(Workflow.id).is_not(None), is_readable_by(caller))
    statement: Select[*tuple[Any, ...]] = (
        select(ModelCost, col(Workflow.name).label("name"))
        .join(Workflow, col(Workflow.id) == col(ModelCost.workflow_id), isouter=True)
        .where(
            col(ModelCost.organization_id) == caller.organization_id,
            col(ModelCost.month) == int(found[1] + found[2]),
            is_readable,
        )
        .order_by(col(ModelCost.cost).desc(), col(ModelCost.workflow_id), col(ModelCost.model_id))
        .limit(limits.MODEL_COSTS)
    )
    async with request.gateway.database.read() as connection:
        rows = (await connection.execute(statement)).all()
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
        )
    )
