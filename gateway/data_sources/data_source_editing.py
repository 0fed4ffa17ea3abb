"""Reads and edits of one data source: permissions, locks, preconditions, and audit records."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import urlsplit

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.values import encode_canonical, fingerprint
from gateway.access import audit_log
from gateway.data_sources import data_source_rows
from gateway.data_sources.data_source_rows import DataSourceNameTaken, StoredDataSource
from gateway.http import errors, idempotency, limits, preconditions
from gateway.http.errors import ApiError
from gateway.http.responses import JsonResponse
from gateway.http.session_cookies import is_loopback_host
from gateway.http.wire import instant
from models.audit import AuditAction

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.http.preconditions import RequestedObject
    from journal.store import IdempotencyKey
    from models.access import ApiCaller
    from models.data_source import DataSource
    from models.database import Database

log = structlog.get_logger()

_SHOWN_FIELDS: Final = frozenset(
    {
        *("name", "secretsSetAt", "isPublic", "sharedWith"),
        *(f"settings.{name}" for name in ("host", "port", "database", "tls", "bucket", "region")),
    }
)
"""Fields whose values the audit trail has; user names and URLs may contain credentials."""

Change: TypeAlias = Callable[[StoredDataSource], StoredDataSource]
"""Returns the changed data source; raises `ApiError`. It may be called again and must have no side effects.
"""


async def find_readable(connection: AsyncConnection, requested: RequestedObject) -> StoredDataSource:
    """Return the requested data source with its shares; raises a 404 error if it is missing or the caller may
    not read it.
    """
    stored = await data_source_rows.find(connection, requested.id, requested.caller)
    if stored is None:
        raise errors.not_found("data source")
    return stored


def warn_of_plain_http(source: DataSource, path: str = "") -> Sequence[dict[str, Json]]:
    """Return the warning about a key that is sent without encryption to another machine, if it is.

    `path` comes before the name of the setting.
    """
    for name in ("baseUrl", "url"):
        url = urlsplit(str(source.settings.get(name, "")))
        if source.secret_names and url.scheme == "http" and not is_loopback_host(url.hostname or ""):
            message = (
                f"{url.hostname} gets the key over plain HTTP: who reads the network reads the key. Use https"
            )
            return [errors.problem(f"{path}{name}", "key-without-tls", message)]
    return []


def require_writer(caller: ApiCaller, source: DataSource) -> None:
    """Raise a 403 error unless the caller owns the data source or is an admin; only they may change, share
    and delete it.
    """
    preconditions.require_owner(caller, source.owner_id, what="data source")


class DataSourceEditor:
    """Reads, edits, creates and deletes data sources, each in a transaction with its audit record."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self, requested: RequestedObject) -> StoredDataSource:
        """Return the requested data source, read in a transaction of its own.

        Raises a 404 error if it is missing or the caller may not read it.
        """
        async with self._database.read() as connection:
            return await find_readable(connection, requested)

    async def create(
        self, caller: ApiCaller, source: DataSource, idempotency_key: IdempotencyKey | None
    ) -> JsonResponse:
        """Insert a data source, once per idempotency key, and return an answer with 201 and its id.

        A repeated key inserts nothing: the answer has the first id, and a header says so; None inserts always. Raises a
        409 error for a taken name or too many data sources of the organization, 422 for a key used with another body.
        """

        async def insert(connection: AsyncConnection) -> str:
            if idempotency_key is not None:
                bound = await idempotency.reserve_key(
                    connection,
                    idempotency_key,
                    shard=source.shard,
                    resource_id=source.id,
                    now=source.created_at,
                )
                if bound != source.id:
                    return bound
            # An earlier attempt may have been committed, though its answer was lost.
            if await data_source_rows.exists(connection, source.id):
                return source.id
            if await data_source_rows.count(connection, source.organization_id) >= limits.DATA_SOURCES:
                message = f"An organization may have at most {limits.DATA_SOURCES:,} data sources"
                raise errors.conflict("too-many-data-sources", message)
            await data_source_rows.add(connection, source)
            await _record(
                connection, caller, AuditAction.DATA_SOURCE_CREATED, None, StoredDataSource(source, {})
            )
            return source.id

        try:
            source_id = await self._database.transaction(insert)
        except DataSourceNameTaken as error:
            raise name_taken(error) from error
        shown = {"dataSourceId": source_id}
        if source_id != source.id:
            return JsonResponse(shown, status=201, headers=idempotency.REPLAYED)
        log.info(
            AuditAction.DATA_SOURCE_CREATED, data_source_id=source_id, organization_id=source.organization_id
        )
        return JsonResponse(shown, status=201, headers=entity_tag(StoredDataSource(source, {})))

    async def find_or_create(self, caller: ApiCaller, source: DataSource) -> str:
        """Return the id of the caller's data source with the name and type of `source`; without one, insert `source`.

        Raises the errors of `create`.
        """
        source_id = await self._find_named(source)
        if source_id is None:
            try:
                await self.create(caller, source, None)
            except ApiError:
                # Another request may have created it at the same time.
                source_id = await self._find_named(source)
                if source_id is None:
                    raise
        return source_id or source.id

    async def _find_named(self, source: DataSource) -> str | None:
        async with self._database.read() as connection:
            return await data_source_rows.find_named(connection, source)

    async def edit(self, requested: RequestedObject, action: AuditAction, change: Change) -> StoredDataSource:
        """Apply `change` to the requested data source after all concurrent edits, and return the stored result.

        The revision and the audit trail advance only if the content differs. Raises 404, 403, 412 if
        `If-Match` names another revision, 409 for a lost race, `DataSourceNameTaken`, and the errors of
        `change`; then nothing is written.
        """
        done: StoredDataSource | None = None

        async def work(connection: AsyncConnection) -> StoredDataSource:
            nonlocal done
            await data_source_rows.lock(connection, requested.id, requested.caller)
            if done is not None and await data_source_rows.exists(
                connection, done.source.id, revision=done.source.revision
            ):
                # Repeated because the answer to the commit was lost: the change is committed.
                return done
            before = await find_readable(connection, requested)
            require_writer(requested.caller, before.source)
            preconditions.require_match(requested.if_match, entity_tag(before)["ETag"], what="data source")
            after = change(before)
            if content_hash(after) == content_hash(before):
                return before
            after = after.with_columns(
                revision=before.source.revision + 1, updated_at=self._database.clock.now()
            )
            if not await data_source_rows.save(connection, before, after, requested.caller):
                raise errors.conflict(
                    "edit-conflict", "Another request changed this data source at the same time: try again"
                )
            await _record(connection, requested.caller, action, before, after)
            done = after
            return after

        after = await self._database.transaction(work)
        if after is done:
            log.info(action, data_source_id=after.source.id, revision=after.source.revision)
        return after

    async def delete(self, requested: RequestedObject, *, is_forced: bool) -> None:
        """Delete the requested data source, with a record in the audit trail.

        Raises 404, 403 unless the caller owns it or is an admin, 412 if `If-Match` names another revision,
        and 409 if workflows or language models use it, unless `is_forced`.
        """
        is_done = False

        async def work(connection: AsyncConnection) -> None:
            nonlocal is_done
            await data_source_rows.lock(connection, requested.id, requested.caller)
            if is_done and not await data_source_rows.exists(connection, requested.id):
                return
            before = await find_readable(connection, requested)
            require_writer(requested.caller, before.source)
            preconditions.require_match(requested.if_match, entity_tag(before)["ETag"], what="data source")
            if not is_forced:
                await _require_unused(connection, before.source, requested.caller)
            await data_source_rows.remove(connection, before.source)
            await _record(connection, requested.caller, AuditAction.DATA_SOURCE_DELETED, before, None)
            is_done = True

        await self._database.transaction(work)
        log.info(AuditAction.DATA_SOURCE_DELETED, data_source_id=requested.id)


def entity_tag(stored: StoredDataSource) -> dict[str, str]:
    """Return the `ETag` header of a data source's revision, for a later `If-Match`."""
    return {"ETag": f'"{stored.source.revision}"'}


def answer(stored: StoredDataSource, value: object) -> JsonResponse:
    """Return a JSON answer with `value`, with the `ETag` of the data source's revision."""
    return JsonResponse(value, headers=entity_tag(stored))


def content_hash(stored: StoredDataSource) -> str:
    """Return the SHA-256 of all editable content and shares, in hexadecimal; equal means that nothing has changed.

    Secrets are represented by the time of their last change.
    """
    row = stored.source.model_dump(
        exclude={"id", "revision", "encrypted", "secret_id", "created_at", "updated_at"}
    )
    return fingerprint([msgspec.to_builtins(row), sorted(stored.shared_with)])


def name_taken(error: DataSourceNameTaken) -> ApiError:
    """Return the 409 error for a name that another data source of the owner has."""
    message = f"The owner has another data source with the name {error.args[0]!r}"
    return errors.conflict("data-source-name-taken", message)


async def _record(
    connection: AsyncConnection,
    caller: ApiCaller,
    action: AuditAction,
    before: StoredDataSource | None,
    after: StoredDataSource | None,
) -> None:
    """Record a change of a data source in the audit trail; `before` is None for a creation, `after` for a deletion."""
    hashes = [None if stored is None else content_hash(stored) for stored in (before, after)]
    object_id = next(stored.source.id for stored in (before, after) if stored is not None)
    changes = None if before is None or after is None else _list_changes(before, after)
    await audit_log.record_change(
        connection, caller, action, object_id, before=hashes[0], after=hashes[1], changes=changes
    )


def _list_changes(before: StoredDataSource, after: StoredDataSource) -> Sequence[Mapping[str, str | None]]:
    """Return the changes of a data source by path for the audit trail; of secrets only the time of their setting."""
    contents = [
        {
            "name": stored.source.name,
            "settings": stored.source.settings,
            "secretsSetAt": instant(stored.source.secrets_set_at),
            "isPublic": stored.source.is_public,
            "sharedWith": sorted(stored.shared_with),
        }
        for stored in (before, after)
    ]
    return audit_log.list_changes(*contents, shown=_SHOWN_FIELDS)


async def _require_unused(connection: AsyncConnection, source: DataSource, caller: ApiCaller) -> None:
    """Raise a 409 error if workflows or language models name the data source.

    Its details list those that the caller may read.
    """
    is_used_by_models = await data_source_rows.has_models(connection, source.id)
    if not (
        is_used_by_models
        or await data_source_rows.has_referring_workflows(connection, source.organization_id, source.id)
    ):
        return
    models = await data_source_rows.list_models(connection, source.id, caller, limits.FINDINGS)
    workflows = await data_source_rows.list_referring_workflows(
        connection, source.id, caller, limits.FINDINGS
    )
    users = "Language models" if is_used_by_models else "Workflows"
    named = [
        *((f"models.{model_id}", name) for model_id, name in models),
        *((f"workflows.{workflow_id}", name) for workflow_id, name in workflows),
    ]
    raise ApiError(
        409,
        "data-source-in-use",
        f"{users} use this data source (details lists those that you may read): remove it there, or use ?force=true",
        details=[errors.problem(path, "data-source-in-use", name) for path, name in named],
    )


def without_secrets(body: Json, secret: bytes, field: str = "secrets") -> Json:
    """Return a request body with a keyed hash in place of its secret `field`, for the comparison of repeated requests.

    So the stored body tells nothing of it. A body without the field is unchanged.
    """
    if not isinstance(body, dict) or field not in body:
        return body
    hashed = hmac.digest(secret, encode_canonical(body[field]), "sha256")
    return {**body, field: hashed.hex()}
