"""Endpoint of the status of a language model: its last test, and the block that its provider has asked for."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.ai_models import model_editing
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, optional_instant
from models.ai_model import AiModel

if TYPE_CHECKING:
    from datetime import datetime


class ModelState(StrEnum):
    """State of a model as far as it is known without a call."""

    ACTIVE = "active"
    """The last test was answered."""
    UNTESTED = "untested"
    BLOCKED = "blocked"
    """The provider accepts no calls yet."""
    FAILED = "failed"
    """The last test was not answered."""


class LastModelTest(WireStruct):
    """Result of the last test of a model."""

    at: Instant
    ok: bool
    message: str
    duration_ms: int


class ModelStatus(WireStruct):
    """Status of a model."""

    model_id: str
    status: ModelState
    reachable: bool | None
    """Whether the last test was answered; null before the first."""
    blocked_until: Instant | None
    """Time until which the provider accepts no calls; null if it accepts them."""
    last_test: LastModelTest | None
    """Null before the first test of the present `vendorModelId` and `dataSourceId`."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the status of a model. No call is made: `POST /ai/models/:id/test` makes some."""
    model = (await model_editing.read(request.gateway.database, request.requested_object)).model
    return JsonResponse(_show(model, request.gateway.clock()))


def find_state(model: AiModel, now: datetime) -> ModelState:
    """Return the state of a model at a time: blocked, else untested, active or failed by its last test."""
    if model.blocked_until is not None and model.blocked_until > now:
        return ModelState.BLOCKED
    tested = _read_last_test(model)
    if tested is None:
        return ModelState.UNTESTED
    return ModelState.ACTIVE if tested.ok else ModelState.FAILED


def _show(model: AiModel, now: datetime) -> ModelStatus:
    state, tested = find_state(model, now), _read_last_test(model)
    return ModelStatus(
        model_id=model.id,
        status=state,
        reachable=None if tested is None else tested.ok,
        blocked_until=optional_instant(model.blocked_until) if state is ModelState.BLOCKED else None,
        last_test=tested,
    )


def _read_last_test(model: AiModel) -> LastModelTest | None:
    """Return the stored result of the last test, None before the first one.

    Earlier releases have stored answered tests by their time alone.
    """
    stored: dict[str, Any] | None = model.last_test
    if stored is not None:
        return msgspec.convert(stored, LastModelTest)
    if model.tested_at is None:
        return None
    return LastModelTest(at=optional_instant(model.tested_at) or "", ok=True, message="", duration_ms=0)
