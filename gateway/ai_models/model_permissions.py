"""Endpoints of the permissions of a language model: the users who may see it and name it in nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import msgspec

from gateway.ai_models import model_editing, model_shapes
from gateway.ai_models.ai_models import FORCE
from gateway.ai_models.model_rows import StoredModel
from gateway.ai_models.model_shapes import Guests, UpdateModel
from gateway.http import read_only
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, body_of, read_json

if TYPE_CHECKING:
    from models.access import ApiCaller


class SetPermissions(StrictWire):
    """Permissions of a model; absent fields do not change."""

    read_only: ClassVar[Mapping[str, str]] = dict.fromkeys(("modelId", "ownerId", "canEdit"), "")

    is_shared: bool | msgspec.UnsetType = msgspec.UNSET
    """True if the whole organization may use it."""
    shared_with: Guests | msgspec.UnsetType = msgspec.UNSET
    """Ids of further users who may use it; replaces the list."""


class ModelPermissions(WireStruct):
    """Permissions of a model. Its owner and admins of the organization may use it in any case."""

    model_id: str
    owner_id: str
    is_shared: bool
    """Whether the whole organization may use it."""
    shared_with: Sequence[str]
    """Ids of further users who may use it."""
    can_edit: bool
    """Whether the caller may change the model and its permissions."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the permissions of a model."""
    stored = await model_editing.read(request.gateway.database, request.requested_object)
    return _answer(stored, request.caller)


async def update(request: GatewayRequest) -> JsonResponse:
    """Set the permissions of a model; its owner and admins may.

    If workflows name the model, the removal of users requires `force`.
    """
    value = await read_json(request)
    body = body_of(request, value, SetPermissions)
    changes = UpdateModel(is_shared=body.is_shared, shared_with=body.shared_with)
    caller, now = request.caller, request.gateway.clock()

    def change(before: StoredModel) -> StoredModel:
        read_only.require_same(value, SetPermissions, lambda: msgspec.to_builtins(_show(before, caller)))
        return model_shapes.apply_changes(before, changes, now)

    after = await model_editing.edit(
        request.gateway.database, request.requested_object, change, is_forced=request.query[FORCE]
    )
    return _answer(after, caller)


def _answer(stored: StoredModel, caller: ApiCaller) -> JsonResponse:
    return JsonResponse(_show(stored, caller), headers=model_editing.entity_tag(stored.model))


def _show(stored: StoredModel, caller: ApiCaller) -> ModelPermissions:
    model = stored.model
    return ModelPermissions(
        model_id=model.id,
        owner_id=model.owner_id,
        is_shared=model.is_shared,
        shared_with=list(stored.shared_with),
        can_edit=caller.is_admin or model.owner_id == caller.user_id,
    )
