"""Endpoints of the settings of an organization for language models."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, TypeAlias

import msgspec
import structlog
from msgspec import Meta
from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from engine.month_budget import BudgetTokens, Dollars, MonthLimitAction
from engine.values import fingerprint
from gateway.access import audit_log
from gateway.ai_models import model_rows
from gateway.http import errors, read_only
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, instant, read_json
from models.ai_model import AiSettings
from models.audit import AuditAction
from models.column_types import build_row
from nodes.ai.model_connection import ECHO_MODEL_ID

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.request import GatewayRequest
    from models.access import ApiCaller

log = structlog.get_logger()

ModelId: TypeAlias = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="the id of a language model, or `echo`")
]

NEVER: Final = datetime.fromtimestamp(0, UTC)


class MonthBudgetShape(StrictWire):
    """Limits of the costs of all calls of the organization in a calendar month (UTC); null: no limit."""

    max_cost: Dollars | None = None
    """US dollars as a decimal text such as `250`; models without a price are then refused."""
    max_tokens: BudgetTokens | None = None
    """Input and output together."""
    on_limit: MonthLimitAction = MonthLimitAction.FAIL
    """`fail`: the node fails with `month-budget-exceeded`. `wait`: the run waits for the next month."""


class UpdateAiSettings(StrictWire):
    """Changes of the settings; absent fields do not change."""

    read_only: ClassVar[Mapping[str, str]] = dict.fromkeys(("organizationId", "updatedAt"), "")

    month_budget: MonthBudgetShape | msgspec.UnsetType | None = msgspec.UNSET
    default_model_id: ModelId | msgspec.UnsetType | None = msgspec.UNSET
    """Model that nodes name by `default`: the id of a shared model, or `echo`. Runs that are accepted later use it."""


class AiSettingsShape(WireStruct):
    """Settings of the organization for language models."""

    organization_id: str
    month_budget: MonthBudgetShape | None
    """Null without a budget."""
    default_model_id: str | None
    """Model that nodes name by `default`; null without one."""
    updated_at: Instant | None
    """Null before the first change."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the settings of the organization for language models."""
    async with request.gateway.database.read() as connection:
        return JsonResponse(_show(await _read(connection, request.caller)))


async def update(request: GatewayRequest) -> JsonResponse:
    """Change the settings of the organization for language models; only admins may.

    The definition of a run keeps the default model of the time of its acceptance. A first budget holds for calls that
    begin a second later, a changed one at once.
    """
    value = await read_json(request)
    body = body_of(request, value, UpdateAiSettings)
    caller, now = request.caller, request.gateway.clock()
    if not caller.is_admin:
        raise errors.admin_required()

    async def work(connection: AsyncConnection) -> AiSettings:
        if isinstance(body.default_model_id, str):
            await _require_shared(connection, caller, body.default_model_id)
        before = await _read(connection, caller, is_locking=True)
        read_only.require_same(value, UpdateAiSettings, lambda: msgspec.to_builtins(_show(before)))
        return await _apply(connection, caller, before, _build_changes(body), now)

    after = await request.gateway.database.transaction(work)
    log.info(AuditAction.AI_SETTINGS_UPDATED, organization_id=caller.organization_id)
    return JsonResponse(_show(after))


async def clear_default(connection: AsyncConnection, caller: ApiCaller, model_id: str, now: datetime) -> None:
    """Remove the default model of the caller's organization if it is this one, with an audit entry; else change
    nothing.
    """
    before = await _read(connection, caller, is_locking=True)
    if before.default_model_id == model_id:
        await _apply(connection, caller, before, {"default_model_id": None}, now)


async def _apply(
    connection: AsyncConnection,
    caller: ApiCaller,
    before: AiSettings,
    changes: Mapping[str, Any],
    now: datetime,
) -> AiSettings:
    """Store `changes`, values by column, with an audit entry, and return the settings after them.

    If the content stays the same, nothing is stored, and `before` is returned.
    """
    after = AiSettings(**{**before.model_dump(), **changes, "updated_at": now})
    hashes = [_hash_content(settings) for settings in (before, after)]
    if hashes[0] == hashes[1]:
        return before
    await _save(connection, after, changes)
    await audit_log.record_change(
        *(connection, caller, AuditAction.AI_SETTINGS_UPDATED, caller.organization_id),
        before=hashes[0],
        after=hashes[1],
    )
    return after


def _build_changes(body: UpdateAiSettings) -> dict[str, Any]:
    """Return the new values of the columns that a body changes; {} without changes."""
    changes: dict[str, Any] = {}
    if body.default_model_id is not msgspec.UNSET:
        changes["default_model_id"] = body.default_model_id
    budget = body.month_budget
    if budget is not msgspec.UNSET:
        given = {} if budget is None else msgspec.to_builtins(budget)
        limits = {name: value for name, value in given.items() if value is not None}
        # Without a limit there is nothing to do at one.
        changes["month_budget"] = limits if limits.keys() - {"onLimit"} else None
    return changes


async def _require_shared(connection: AsyncConnection, caller: ApiCaller, model_id: str) -> None:
    """Raise a 422 error unless the whole organization may use a model; it stays locked until the end of the
    transaction.
    """
    if model_id == ECHO_MODEL_ID:
        return
    found = await model_rows.find(connection, model_id, caller, is_locking=True)
    if found is None:
        message = "There is no language model with this id"
        raise errors.invalid([errors.problem("defaultModelId", "model-not-found", message)])
    if not found.model.is_shared:
        message = "Share the model with the organization first (isShared): runs of all users would name it"
        raise errors.invalid([errors.problem("defaultModelId", "model-not-shared", message)])


async def _read(connection: AsyncConnection, caller: ApiCaller, *, is_locking: bool = False) -> AiSettings:
    """Return the settings of the caller's organization; if none are stored, the defaults with `updated_at` `NEVER`.

    With `is_locking`, a stored row in PostgreSQL stays locked until the end of the transaction.
    """
    statement = select(AiSettings).where(col(AiSettings.organization_id) == caller.organization_id)
    rows = await connection.execute(statement.with_for_update() if is_locking else statement)
    row = rows.mappings().first()
    if row is not None:
        return build_row(AiSettings, row)
    return AiSettings(organization_id=caller.organization_id, shard=caller.shard, updated_at=NEVER)


async def _save(connection: AsyncConnection, settings: AiSettings, changes: Mapping[str, Any]) -> None:
    """Insert `settings`, which contain `changes`; if the organization has a row already, set only `changes` in it."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(AiSettings).values(settings.model_dump())
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=["organization_id"], set_={**changes, "updated_at": settings.updated_at}
        )
    )


def _hash_content(settings: AiSettings) -> str:
    return fingerprint({"monthBudget": settings.month_budget, "defaultModelId": settings.default_model_id})


def _show(settings: AiSettings) -> AiSettingsShape:
    budget = settings.month_budget
    return AiSettingsShape(
        organization_id=settings.organization_id,
        month_budget=None if budget is None else msgspec.convert(budget, MonthBudgetShape),
        default_model_id=settings.default_model_id,
        updated_at=None if settings.updated_at == NEVER else instant(settings.updated_at),
    )
