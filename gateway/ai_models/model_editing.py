"""Reads and edits of one language model: permissions, preconditions, and audit records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import structlog

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.ai_models import ai_settings, model_rows
from gateway.ai_models.model_rows import ModelNameTaken, StoredModel
from gateway.data_sources import data_source_rows
from gateway.http import errors, idempotency, limits, preconditions
from gateway.http.responses import JsonResponse
from models import access_store
from models.ai_model import AiModel
from models.audit import AuditAction
from models.data_source_types import AiProviderProtocol, DataSourceType

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.errors import ApiError
    from gateway.http.preconditions import RequestedObject
    from journal.store import IdempotencyKey
    from models.access import ApiCaller
    from models.database import Database

log = structlog.get_logger()

Change: TypeAlias = Callable[[StoredModel], StoredModel]
"""Returns the changed model; raises `ApiError`. It may be called again and must have no side effects."""


async def find_readable(connection: AsyncConnection, requested: RequestedObject) -> StoredModel:
    """Return the requested model with its shares; raises a 404 error if it is missing or the caller may not see it."""
    found = await model_rows.find(connection, requested.id, requested.caller)
    if found is None:
        raise errors.not_found("model")
    return found


async def read(database: Database, requested: RequestedObject) -> StoredModel:
    """Return the requested model, read in a transaction of its own; raises a 404 error if the caller may not see it."""
    async with database.read() as connection:
        return await find_readable(connection, requested)


async def create(
    database: Database,
    caller: ApiCaller,
    stored: StoredModel,
    idempotency_key: IdempotencyKey | None,
    *,
    provider: str | None,
) -> JsonResponse:
    """Insert a model, once per idempotency key, and return an answer with 201 and its id.

    A repeated key inserts nothing and returns the first id; None inserts always. `provider` is the protocol that the
    caller has named; None for that of the data source. Raises a 409 error for a taken name or too many models, and 422
    for a data source that the caller may not use, for users that it can't be shared with, and for a key used with
    another body.
    """
    model = stored.model

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
        await _set_provider(connection, model, caller, provider)
        await _require_guests(connection, model, stored.shared_with)
        await model_rows.add(connection, stored)
        await _record(connection, caller, AuditAction.MODEL_CREATED, None, stored)
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


async def edit(
    database: Database, requested: RequestedObject, change: Change, *, is_forced: bool
) -> StoredModel:
    """Apply `change` to the requested model, and return the stored result; nothing is stored if the content stays the
    same.

    Raises 404, 403, 412 if `If-Match` names another revision, 409 for a taken name or a concurrent edit, 422 for an
    unusable data source or user, and the errors of `change`; then nothing is written. Unless `is_forced`, also 409 if
    workflows name the model, for another vendor model or data source and for the removal of users, and if the default
    model is no longer shared.
    """
    done: StoredModel | None = None

    async def work(connection: AsyncConnection) -> StoredModel:
        nonlocal done
        if done is not None and await model_rows.exists(
            connection, done.model.id, revision=done.model.revision
        ):
            # Repeated because the answer to the commit was lost: the change is committed.
            return done
        before = await find_readable(connection, requested)
        preconditions.require_owner(requested.caller, before.model.owner_id, what="model")
        preconditions.require_match(requested.if_match, entity_tag(before.model)["ETag"], what="model")
        after = change(before)
        if content_hash(after) == content_hash(before):
            return before
        model, was = after.model, before.model
        model.revision, model.updated_at = was.revision + 1, database.clock.now()
        if model.data_source_id != was.data_source_id:
            await _set_provider(connection, model, requested.caller, was.provider)
        await _require_guests(connection, model, after.shared_with.keys() - before.shared_with.keys())
        if not is_forced and _changes_for_users(before, after):
            await _require_unused(connection, was, requested.caller)
        if not await model_rows.save(connection, before, after):
            raise errors.conflict(
                "edit-conflict", "Another request changed this model at the same time: try again"
            )
        if was.is_shared and not model.is_shared:
            await _remove_default(connection, was, requested.caller, model.updated_at, is_forced=is_forced)
        await _record(connection, requested.caller, AuditAction.MODEL_UPDATED, before, after)
        done = after
        return after

    try:
        after = await database.transaction(work)
    except ModelNameTaken as error:
        raise name_taken(error) from error
    if after is done:
        log.info(AuditAction.MODEL_UPDATED, model_id=after.model.id, revision=after.model.revision)
    return after


async def delete(database: Database, requested: RequestedObject, *, is_forced: bool) -> None:
    """Delete the requested model, with an audit entry; with `is_forced` even the default model, after which there is
    none.

    Raises 404 if it is missing or invisible, 403 unless the caller is its owner or an admin, 412 if `If-Match` names
    another revision, and 409 if workflows use it or it is the default model, unless `is_forced`.
    """
    is_done = False

    async def work(connection: AsyncConnection) -> None:
        nonlocal is_done
        if is_done and not await model_rows.exists(connection, requested.id):
            return
        before = await find_readable(connection, requested)
        model = before.model
        preconditions.require_owner(requested.caller, model.owner_id, what="model")
        preconditions.require_match(requested.if_match, entity_tag(model)["ETag"], what="model")
        if not is_forced:
            await _require_unused(connection, model, requested.caller)
        await model_rows.remove(connection, model)
        await _remove_default(connection, model, requested.caller, database.clock.now(), is_forced=is_forced)
        await _record(connection, requested.caller, AuditAction.MODEL_DELETED, before, None)
        is_done = True

    await database.transaction(work)
    log.info(AuditAction.MODEL_DELETED, model_id=requested.id)


def entity_tag(model: AiModel) -> dict[str, str]:
    """Return the `ETag` header of a model's revision, for a later `If-Match`."""
    return {"ETag": f'"{model.revision}"'}


def content_hash(stored: StoredModel) -> str:
    """Return the SHA-256 of all content of a model that clients or tests set, with its shares, in hexadecimal."""
    excluded = {"id", "blocked_until", "last_test", "revision", "created_at", "updated_at"}
    content = stored.model.model_dump(exclude=excluded)
    return fingerprint([msgspec.to_builtins(content), sorted(stored.shared_with)])


def name_taken(error: ModelNameTaken) -> ApiError:
    """Return the 409 error for a name that another model of the organization has."""
    message = f"The organization has another model with the name {error.args[0]!r}"
    return errors.conflict("model-name-taken", message)


def _changes_for_users(before: StoredModel, after: StoredModel) -> bool:
    """Return whether a change lets the id mean another model for its users, or takes the model from some of them."""
    was, model = before.model, after.model
    is_other = (model.vendor_model_id, model.data_source_id) != (was.vendor_model_id, was.data_source_id)
    if is_other or model.is_shared:
        return is_other
    return was.is_shared or bool(before.shared_with.keys() - after.shared_with.keys())


async def _require_guests(connection: AsyncConnection, model: AiModel, user_ids: Iterable[str]) -> None:
    """Raise a 422 error unless a model may be shared with users: others than its owner, of its organization."""
    guests = sorted(user_ids)
    known = await access_store.read_user_names(connection, model.organization_id, guests)
    problems = [
        errors.problem("sharedWith", "user-not-found", f"There is no user {user_id!r} in your organization")
        for user_id in guests
        if user_id not in known
    ]
    if model.owner_id in guests:
        message = "sharedWith must not name the owner of the model, who may use it anyway"
        problems.append(errors.problem("sharedWith", "own-user", message))
    if problems:
        raise errors.invalid(problems)


async def _require_unused(connection: AsyncConnection, model: AiModel, caller: ApiCaller) -> None:
    """Raise a 409 error if workflows name the model; its details list those that the caller may read."""
    if not await data_source_rows.has_referring_workflows(connection, model.organization_id, model.id):
        return
    named_by = await data_source_rows.list_referring_workflows(connection, model.id, caller, limits.FINDINGS)
    raise errors.conflict(
        "model-in-use",
        "Workflows use this model (details lists those that you may read): remove it there, or use ?force=true",
        details=[errors.problem(f"workflows.{one}", "model-in-use", name) for one, name in named_by],
    )


async def _remove_default(
    connection: AsyncConnection, model: AiModel, caller: ApiCaller, now: datetime, *, is_forced: bool
) -> None:
    """Remove a model as the organization's default model if it is that; raises a 409 error instead unless `is_forced`.

    The transaction has changed or deleted the model, and a choice of the default locks its row: so a concurrent choice
    is committed before and seen here, or waits and sees the change.
    """
    if is_forced:
        await ai_settings.clear_default(connection, caller, model.id, now)
    elif await model_rows.is_default(connection, model):
        raise errors.conflict(
            "model-in-use",
            "It is the default model of the organization: name another by PUT /ai/settings, or use ?force=true",
        )


async def _set_provider(
    connection: AsyncConnection, model: AiModel, caller: ApiCaller, wanted: str | None
) -> None:
    """Set `model.provider` to the protocol of the model's data source.

    Raises a 422 error unless the data source is of the type for models, the caller may use it, and its protocol is
    `wanted`, if that is not None.
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
    before: StoredModel | None,
    after: StoredModel | None,
) -> None:
    """Add an audit entry about a model: hashes of its content before and after, None for a model that didn't
    or doesn't exist.
    """
    hashes = [None if stored is None else content_hash(stored) for stored in (before, after)]
    object_id = next(stored.model.id for stored in (before, after) if stored is not None)
    await audit_log.record_change(connection, caller, action, object_id, before=hashes[0], after=hashes[1])
