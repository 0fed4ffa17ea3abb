"""Endpoints of language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.ai_models import model_editing, model_rows, model_shapes
from gateway.ai_models.model_rows import StoredModel
from gateway.ai_models.model_shapes import CapabilitiesShape, CreateModel, ModelShape, UpdateModel
from gateway.http import read_only
from gateway.http.parameters import LIMIT, OFFSET, FlagParameter, sorted_by
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import WireStruct, body_of, read_json

if TYPE_CHECKING:
    from engine.values import Json

SORT = sorted_by(model_rows.SORTABLE)
LISTED = (LIMIT, OFFSET, SORT)
FORCE = FlagParameter("force", "Do it even if workflows name the model.")


class ModelList(WireStruct):
    """Page of a list of models; `count` is the total."""

    count: int
    limit: int
    offset: int
    models: Sequence[ModelShape]


class NewModel(WireStruct):
    """Id of a registered model."""

    model_id: str


class ModelTest(WireStruct):
    """Result of a test with real calls."""

    ok: bool
    message: str
    duration_ms: int
    capabilities: CapabilitiesShape | None
    """Abilities that the test has seen and stored; null if the model did not answer."""


async def index(request: GatewayRequest) -> JsonResponse:
    """List the models that the caller may use."""
    part, order = request.query.page(), request.query[SORT]
    async with request.gateway.database.read() as connection:
        count, found = await model_rows.page(connection, request.caller, part, order)
    shown = [model_shapes.show_model(model) for model in found]
    return JsonResponse(ModelList(count=count, limit=part.limit, offset=part.offset, models=shown))


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a model."""
    return _answer(await model_editing.read(request.gateway.database, request.requested_object))


async def create(request: GatewayRequest) -> JsonResponse:
    """Register a model of a provider.

    Nodes name it by the returned id. A repetition with the same `Idempotency-Key` creates nothing. Refused
    for a taken name, and for a data source that you may not use.
    """
    value = await read_json(request)
    body = body_of(request, value, CreateModel)
    model = model_shapes.build_model(request.caller, body, request.gateway.clock())
    read_only.warn_of_new(request, value, CreateModel, lambda: _as_json(model))
    key = request.idempotency_key(value)
    return await model_editing.create(
        request.gateway.database, request.caller, model, key, provider=body.provider
    )


async def update(request: GatewayRequest) -> JsonResponse:
    """Change a model; absent fields do not change.

    Only its owner and admins may. If workflows name the model, another vendor model or data source, and the
    removal of users, require `force`.
    """
    value = await read_json(request)
    body = body_of(request, value, UpdateModel)

    now = request.gateway.clock()

    def change(before: StoredModel) -> StoredModel:
        read_only.require_same(value, UpdateModel, lambda: _as_json(before))
        return model_shapes.apply_changes(before, body, now)

    return _answer(
        await model_editing.edit(
            request.gateway.database, request.requested_object, change, is_forced=request.query[FORCE]
        )
    )


async def delete(request: GatewayRequest) -> NoContent:
    """Delete a model; with `force`, even if workflows name it: their runs then fail."""
    requested, is_forced = request.requested_object, request.query[FORCE]
    await model_editing.delete(request.gateway.database, requested, is_forced=is_forced)
    return NoContent()


async def test(request: GatewayRequest) -> JsonResponse:
    """Test a model with up to six short calls, which its provider bills, and store the abilities that it shows.

    They take up to a minute together; an ability that is null had no answer in its share of that.
    `GET /ai/models/:id/status` shows the result of the last test.
    """
    model = (await model_editing.read(request.gateway.database, request.requested_object)).model
    found = await request.gateway.model_prober.probe(model)
    await request.gateway.model_prober.store(model, found)
    return JsonResponse(
        ModelTest(
            ok=found.is_ok,
            message=found.message,
            duration_ms=found.duration_milliseconds,
            capabilities=found.capabilities,
        )
    )


def _answer(stored: StoredModel) -> JsonResponse:
    return JsonResponse(model_shapes.show_model(stored), headers=model_editing.entity_tag(stored.model))


def _as_json(stored: StoredModel) -> Mapping[str, Json]:
    shown: dict[str, Any] = msgspec.to_builtins(model_shapes.show_model(stored))
    return shown
