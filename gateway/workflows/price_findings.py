"""Findings about limits of costs that can't be kept: the price of a model that nodes name is unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlmodel import col

from engine import model_references
from engine.findings import FindingType, GraphFinding
from execution import organization_budgets
from models.ai_model import AiModel, is_readable_by

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.graph import ParsedGraph
    from engine.node_lookup import NodeTypeLookup
    from engine.values import Json
    from models.access import ApiCaller

SUGGESTION = "Set the price of the model, or remove maxCost. Calls fail with model-price-unknown until then."


async def find_unpriced_models(
    connection: AsyncConnection,
    caller: ApiCaller,
    settings: Mapping[str, Json],
    graph: ParsedGraph,
    catalog: NodeTypeLookup,
) -> list[GraphFinding]:
    """Return a warning for each node under a budget with `maxCost` and each model without a price that it names.

    The budget is that of the node, of an agent that it serves, of the runs of the workflow, or of the month. Models
    that the caller can't see, and names that are expressions, are left out.
    """
    budget = settings.get("aiBudget")
    month = await organization_budgets.find(connection, caller.organization_id)
    limits_runs = isinstance(budget, dict) and budget.get("maxCost") is not None
    limits_runs |= month is not None and month.max_cost is not None
    uses = model_references.list_limited_models(graph, catalog, limits_runs=limits_runs)
    if not uses:
        return []
    rows = await connection.scalars(
        select(col(AiModel.id)).where(
            col(AiModel.id).in_({model_id for _, model_id in uses}),
            col(AiModel.price).is_(None),
            is_readable_by(caller),
        )
    )
    unpriced = set(rows)
    return [
        GraphFinding(
            FindingType.MODEL_PRICE_UNKNOWN,
            f'Node "{node.label}" ({node.type}): a budget with maxCost needs the price of the model {model_id}',
            SUGGESTION,
            node.id,
        )
        for node, model_id in uses
        if model_id in unpriced
    ]
