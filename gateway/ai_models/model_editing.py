"""Reads and edits of one language model: permissions, preconditions, and audit records."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import structlog

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.ai_models import model_rows
from gateway.ai_models.model_rows import ModelNameTaken
from gateway.data_sources import data_source_rows
from gateway.http import errors, idempotency, limits, preconditions
from gateway.http.responses import JsonResponse
from models.ai_model import AiModel
from models.audit import AuditAction
from models.data_source_types import AiProviderProtocol, DataSourceType

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.errors import ApiError
    from gateway.http.preconditions import RequestedObject
    from journal.store import IdempotencyKey
    from models.access import ApiCaller
    from models.database import Database

log = structlog.get_logger()

Change: TypeAlias = Callable[[AiModel], AiModel]
"""Returns the changed model; raises `ApiError`. It may be called again and must have no side effects."""


async def find_readable(connection: AsyncConnection, requested: RequestedObject) -> AiModel:
    """Return the requested model; raises a 404 error if it is missing or the caller may not see it."""
    found = await model_rows.find(connection, requested.id, requested.caller)
    if found is None:
        raise errors.not_found("model")
    return found


async def read(database: Database, requested: RequestedObject) -> AiModel:
    """Return the requested model, read in a transaction of its own; raises a 404 error."""
    async with database.read() as connection:
        return await find_readable(connection, requested)


async def create(
    database: Database,
    caller: ApiCaller,
    model: AiModel,
    idempotency_key: IdempotencyKey | None,
    *,
    provider: str | None,
) -> JsonResponse:
    """Insert a model, once per idempotency key, and return an answer with 201 and its id.

    `provider` is the protocol that the caller has named; None for that of the data source.

    Raises a 409 error for a taken name or too many models, and 422 for a data source that the caller may not use.
    """

    async def insert(connection: AsyncConnection) -> str:
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=model.shard, resource_id=model.id, now=model.created_at
            )
            if bound != model.id:
                return bound
        # An earlier attempt may have been committed, though its answer was lost.
        if await model_rows.exists(connection, model.id):
            return model.id
        if await model_rows.count(connection, model.organization_id) >= limits.MODELS:
            message = f"An organization may have at most {limits.MODELS:,} models"
            raise errors.conflict("too-many-models", message)
        await _require_provider(connection, model, caller, provider)
        await model_rows.add(connection, model)
        await _record(connection, caller, AuditAction.MODEL_CREATED, None, model)
        return model.id

    try:
        model_id = await database.transaction(insert)
    except ModelNameTaken as error:
        raise name_taken(error) from error
    shown = {"modelId": model_id}
    if model_id != model.id:
        return JsonResponse(shown, status=201, headers=idempotency.REPLAYED)
    log.info(AuditAction.MODEL_CREATED, model_id=model_id, organization_id=model.organization_id)
    return JsonResponse(shown, status=201, headers=entity_tag(model))


async def edit(database: Database, requested: RequestedObject, change: Change, *, is_forced: bool) -> AiModel:
    """Apply `change` to the requested model, and return the stored result.

    Raises 404, 403, 412 if `If-Match` names another revision, 409 for a taken name or a concurrent edit, and the
    errors of `change`; then nothing is written. A model that workflows use is replaced by another one, or taken from
    the organization, only if `is_forced`; else 409.
    """
    done: AiModel | None = None

    async def work(connection: AsyncConnection) -> AiModel:
        nonlocal done
        if done is not None and await model_rows.exists(connection, done.id, revision=done.revision):
            # Repeated because the answer to the commit was lost: the change is committed.
            return done
        before = await find_readable(connection, requested)
        preconditions.require_owner(requested.caller, before.owner_id, what="model")
        preconditions.require_match(requested.if_match, entity_tag(before)["ETag"], what="model")
        after = change(before)
        if content_hash(after) == content_hash(before):
            return before
        after.revision, after.updated_at = before.revision + 1, database.clock.now()
        if after.data_source_id != before.data_source_id:
            await _require_provider(connection, after, requested.caller, before.provider)
        if not is_forced and _changes_for_users(before, after):
            await _require_unused(connection, before, requested.caller)
        if before.is_shared and not after.is_shared:
            await _remove_default(connection, before, is_forced=is_forced)
        if not await model_rows.save(connection, before, after):
            raise errors.conflict(
                "edit-conflict", "Another request changed this model at the same time: try again"
            )
        await _record(connection, requested.caller, AuditAction.MODEL_UPDATED, before, after)
        done = after
        return after

    try:
        after = await database.transaction(work)
    except ModelNameTaken as error:
        raise name_taken(error) from error
    if after is done:
        log.info(AuditAction.MODEL_UPDATED, model_id=after.id, revision=after.revision)
    return after


async def delete(database: Database, requested: RequestedObject, *, is_forced: bool) -> None:
    """Delete the requested model, with an audit entry.

    Raises 404 if it is missing or invisible, 403 unless the caller is its owner or an admin, 412 if
    `If-Match` names another revision, and 409 if workflows use it, unless `is_forced`.
    """
    is_done = False

    async def work(connection: AsyncConnection) -> None:
        nonlocal is_done
        if is_done and not await model_rows.exists(connection, requested.id):
            return
        before = await find_readable(connection, requested)
        preconditions.require_owner(requested.caller, before.owner_id, what="model")
        preconditions.require_match(requested.if_match, entity_tag(before)["ETag"], what="model")
        if not is_forced:
            await _require_unused(connection, before, requested.caller)
        await _remove_default(connection, before, is_forced=is_forced)
        await model_rows.remove(connection, before)
        await _record(connection, requested.caller, AuditAction.MODEL_DELETED, before, None)
        is_done = True

    await database.transaction(work)
    log.info(AuditAction.MODEL_DELETED, model_id=requested.id)


def entity_tag(model: AiModel) -> dict[str, str]:
    """Return the `ETag` header of a model's revision, for a later `If-Match`."""
    return {"ETag": f'"{model.revision}"'}


def content_hash(model: AiModel) -> str:
    """Return the SHA-256 of all content of a model that clients or tests set, in hexadecimal."""
    return fingerprint(
        msgspec.to_builtins(
            model.model_dump(exclude={"id", "blocked_until", "revision", "created_at", "updated_at"})
        )
    )


def name_taken(error: ModelNameTaken) -> ApiError:
    """Return the 409 error for a name that another model of the organization has."""
    message = f"The organization has another model with the name {error.args[0]!r}"
    return errors.conflict("model-name-taken", message)


def _changes_for_users(before: AiModel, after: AiModel) -> bool:
    """Return whether workflows that name a model get another one, or may lose it."""
    is_other = (after.vendor_model_id, after.data_source_id) != (
        before.vendor_model_id,
        before.data_source_id,
    )
    return is_other or (before.is_shared and not after.is_shared)


async def _require_unused(connection: AsyncConnection, model: AiModel, caller: ApiCaller) -> None:
    """Raise a 409 error if workflows name the model; its details list those that the caller may read."""
    if not await data_source_rows.is_named(connection, model.organization_id, model.id):
        return
    named_by = await data_source_rows.naming(connection, model.id, caller, limits.FINDINGS)
    raise errors.conflict(
        "model-in-use",
        "Workflows use this model (details lists those that you may read): remove it there, or use ?force=true",
        details=[errors.problem(f"workflows.{one}", "model-in-use", name) for one, name in named_by],
    )


async def _remove_default(connection: AsyncConnection, model: AiModel, *, is_forced: bool) -> None:
    """Leave the organization without a default model if it is this one; raises a 409 error unless `is_forced`."""
    if is_forced:
        await model_rows.clear_default(connection, model)
    elif await model_rows.is_default(connection, model):
        raise errors.conflict(
            "model-in-use",
            "It is the default model of the organization: name another by PUT /ai/settings, or use ?force=true",
        )


async def _require_provider(
    connection: AsyncConnection, model: AiModel, caller: ApiCaller, wanted: str | None
) -> None:
    """Set the provider of a model to that of its data source.

    Raises a 422 error unless the data source is a provider that the caller may use, with the `wanted` protocol.
    """
    stored = await data_source_rows.find(connection, model.data_source_id, caller)
    if stored is None:
        message = "There is no data source with this id that you may use"
        raise errors.invalid([errors.problem("dataSourceId", "data-source-not-found", message)])
    if stored.source.type != DataSourceType.AI_PROVIDER:
        message = f"The data source is of the type {stored.source.type}, not {DataSourceType.AI_PROVIDER}"
        raise errors.invalid([errors.problem("dataSourceId", "wrong-data-source", message)])
    provider = str(stored.source.settings.get("provider", AiProviderProtocol.OPENAI_COMPATIBLE))
    if wanted not in {None, provider}:
        message = f"The data source is of the provider {provider}, not {wanted}"
        raise errors.invalid([errors.problem("dataSourceId", "wrong-provider", message)])
    model.provider = provider


async def _record(
    connection: AsyncConnection,
    caller: ApiCaller,
    action: AuditAction,
    before: AiModel | None,
    after: AiModel | None,
) -> None:
    """Add an audit entry about a model: hashes of its content before and after, None for a model that didn't
    or doesn't exist.
    """
    hashes = [None if model is None else content_hash(model) for model in (before, after)]
    object_id = next(model.id for model in (before, after) if model is not None)
    await audit_log.record_change(connection, caller, action, object_id, before=hashes[0], after=hashes[1])
