"""Endpoint of the language models that the caller may name in nodes, for pickers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from sqlalchemy import func, select
from sqlmodel import col

from engine.model_calls import ModelProvider
from gateway.ai_models import model_status
from gateway.ai_models.model_shapes import CapabilitiesShape, ModelType
from gateway.ai_models.model_status import ModelState
from gateway.http import limits
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from models.ai_model import AiModel, AiSettings, is_readable_by
from models.column_types import build_row
from nodes.ai.model_connection import ECHO_MODEL_ID

if TYPE_CHECKING:
    from datetime import datetime

RANKS: Final = (ModelState.ACTIVE, ModelState.UNTESTED, ModelState.BLOCKED, ModelState.FAILED)
"""States of models by their order in the list."""


class UsableModel(WireStruct):
    """Model that the caller may name in nodes."""

    id: str
    name: str
    type: ModelType | None
    """Null for the built-in model."""
    provider: ModelProvider
    vendor_model_id: str | None
    """Null for the built-in model."""
    status: ModelState
    is_default: bool
    """Whether nodes may name it by `default`."""
    is_priced: bool
    """Whether its costs are known, so that budgets in dollars admit it."""
    context_length: int | None
    max_output_tokens: int | None
    capabilities: CapabilitiesShape | None
    """Null before the first test, and for the built-in model."""


class UsableModelList(WireStruct):
    """Models that the caller may use, the best choice first."""

    count: int
    models: Sequence[UsableModel]


async def index(request: GatewayRequest) -> JsonResponse:
    """List all models that you may name in nodes, the built-in `echo` among them.

    The default model comes first, then those whose last test was answered, untested ones, blocked ones and failed
    ones, each by name, and `echo` last.
    """
    caller, now = request.caller, request.gateway.clock()
    statement = (
        select(AiModel).where(is_readable_by(caller)).order_by(func.lower(AiModel.name)).limit(limits.MODELS)
    )
    default = select(col(AiSettings.default_model_id)).where(
        col(AiSettings.organization_id) == caller.organization_id
    )
    async with request.gateway.database.read() as connection:
        rows = (await connection.execute(statement)).mappings().all()
        default_id = await connection.scalar(default)
    found = [_show(build_row(AiModel, row), default_id, now) for row in rows]
    found.sort(key=lambda model: (not model.is_default, RANKS.index(model.status)))
    echo = UsableModel(
        id=ECHO_MODEL_ID,
        name=ECHO_MODEL_ID,
        type=None,
        provider=ModelProvider.ECHO,
        vendor_model_id=None,
        status=ModelState.ACTIVE,
        is_default=default_id == ECHO_MODEL_ID,
        is_priced=True,
        context_length=None,
        max_output_tokens=None,
        capabilities=None,
    )
    models = [echo, *found] if echo.is_default else [*found, echo]
    return JsonResponse(UsableModelList(count=len(models), models=models))


def _show(model: AiModel, default_id: str | None, now: datetime) -> UsableModel:
    return UsableModel(
        id=model.id,
        name=model.name,
        type=ModelType(model.type),
        provider=ModelProvider(model.provider),
        vendor_model_id=model.vendor_model_id,
        status=model_status.find_state(model, now),
        is_default=model.id == default_id,
        is_priced=model.price is not None,
        context_length=model.context_length,
        max_output_tokens=model.max_output_tokens,
        capabilities=None
        if model.capabilities is None
        else msgspec.convert(model.capabilities, CapabilitiesShape),
    )
