"""Language models for runs: looked up with the permissions of the user that a workflow runs for."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from sqlalchemy import or_, select, update
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from engine.model_calls import ModelProvider
from engine.model_limits import ModelLimits, share_limits
from engine.model_prices import ModelPrice
from engine.run_errors import NodeError
from engine.services import RunCaller
from journal import worker_presence
from journal.presence_reports import REPORT_SECONDS
from models.ai_model import AiModel, is_usable_by
from models.column_types import build_row
from models.errors import DatabaseUnavailable
from nodes.ai.model_connection import ModelConnection

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from execution.stored_model_ledger import StoredModelLedger
    from models.database import Database
    from nodes.connections.data_source import ConnectionSource, ConnectionSources


MAX_BLOCKED_SECONDS: Final = 86_400.0
CACHE_SECONDS: Final = 1.0
"""Maximum delay until a run that calls a model again and again sees a change of it or of its shares."""
MAX_CACHED: Final = 1_000

_LookupKey: TypeAlias = tuple[str, str, str]
"""Execution, user and model."""


class StoredModels:
    """Models in the database; implements `nodes.ai.model_connection.ModelConnections`."""

    def __init__(self, database: Database, sources: ConnectionSources, *, is_deferring: bool = False) -> None:
        """With `is_deferring`, costs that no budget counts are stored together about once a second."""
        self._database = database
        self._sources = sources
        self._is_deferring = is_deferring
        self._workers = 1
        self._workers_known_until = 0.0
        self._cached: TTLCache[_LookupKey, ModelConnection] = TTLCache(CACHE_SECONDS, MAX_CACHED)

    @cached_property
    def ledger(self) -> StoredModelLedger:
        """Ledger of the calls of models, created at its first use."""
        from execution.stored_model_ledger import StoredModelLedger  # noqa: PLC0415 - loaded with the first call of a model

        return StoredModelLedger(self._database, is_deferring=self._is_deferring)

    async def find(self, caller: RunCaller, model_id: str) -> ModelConnection:
        """Return a model that a run may use, with the key of its provider, cached for a second for each run.

        A model that its provider refuses for some time is not cached, since the result has the rest of that time.
        Raises `NodeError` if it is missing, or the caller may not use it, or its owner may no longer use its data
        source; and one that may be retried if the database is unavailable.
        """
        key = (caller.execution_id, caller.user_id, model_id)
        cached = self._cached.get(key)
        if cached is not None:
            return cached
        found = await self.connect(await self._look_up(caller, model_id))
        if not found.blocked_seconds:
            self._cached.put(key, found)
        return found

    async def _look_up(self, caller: RunCaller, model_id: str) -> AiModel:
        """Return the row of a model that a run may use; raises `NodeError` as `find` does."""
        is_usable = is_usable_by(caller.organization_id, caller.user_id)
        statement = select(AiModel).where(col(AiModel.id) == model_id, is_usable)
        try:
            async with self._database.read() as connection:
                row = (await connection.execute(statement)).mappings().first()
        except DatabaseUnavailable as error:
            raise _build_lookup_failure() from error
        if row is None:
            # The same text for absent and for forbidden models: guessing an id reveals nothing.
            message = f"There is no model {model_id!r} that this run may use"
            raise NodeError(message, code="model-not-found")
        return build_row(AiModel, row)

    async def block(self, caller: RunCaller, model_id: str, seconds: float) -> None:
        """Store that the provider of a model accepts no calls for `seconds` from now, at most a day, unless a later end
        is stored.

        Nothing is stored for a model that the run may not use, and while the database is unavailable: the next call is
        refused by the provider again.
        """
        until = self._database.clock.now() + timedelta(seconds=min(seconds, MAX_BLOCKED_SECONDS))
        statement = (
            update(AiModel)
            .where(
                col(AiModel.id) == model_id,
                is_usable_by(caller.organization_id, caller.user_id),
                or_(col(AiModel.blocked_until).is_(None), col(AiModel.blocked_until) < until),
            )
            .values(blocked_until=until)
        )

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(statement)

        with suppress(DatabaseUnavailable):
            await self._database.transaction(work)
        self._cached.drop((caller.execution_id, caller.user_id, model_id))

    async def connect(self, model: AiModel) -> ModelConnection:
        """Return a model with address and key of its data source, which is used with the rights of the model's owner.

        Raises `NodeError`.
        """
        owner = RunCaller(model.organization_id, model.owner_id, "", "", "")
        found = build_connection(model, await self._sources.find(owner, model.data_source_id))
        if model.limits is not None:
            share = share_limits(msgspec.convert(model.limits, ModelLimits), await self._count_workers())
            found = msgspec.structs.replace(found, limits=share)
        if model.blocked_until is None:
            return found
        seconds = (model.blocked_until - self._database.clock.now()).total_seconds()
        return msgspec.structs.replace(found, blocked_seconds=max(seconds, 0.0))

    async def _count_workers(self) -> int:
        """Return the number of workers that share the limits of models, at least one, cached for five seconds.

        Raises `NodeError` while the database is unavailable.
        """
        if monotonic() >= self._workers_known_until:
            try:
                async with self._database.read() as connection:
                    self._workers = await worker_presence.count_present(connection)
            except DatabaseUnavailable as error:
                raise _build_lookup_failure() from error
            self._workers_known_until = monotonic() + REPORT_SECONDS
        return max(self._workers, 1)


def _build_lookup_failure() -> NodeError:
    return NodeError("The model could not be looked up just now", code="model-unavailable", retryable=True)


def build_connection(model: AiModel, source: ConnectionSource) -> ModelConnection:
    """Return a model with the address and the key of its data source, as nodes use it to call the provider."""
    settings, seen = source.settings, model.capabilities or {}
    return ModelConnection(
        id=model.id,
        provider=ModelProvider(model.provider),
        vendor_model_id=model.vendor_model_id,
        base_url=str(settings["baseUrl"]),
        key=source.secrets.get("key", ""),
        key_header=str(settings.get("keyHeader", "")),
        follows_schemas=bool(seen.get("jsonSchema")),
        has_json_mode=bool(seen.get("jsonMode")),
        calls_tools=bool(seen.get("tools")),
        ignores_tools=seen.get("tools") is False,
        max_output_tokens=model.max_output_tokens,
        price=None if model.price is None else msgspec.convert(model.price, ModelPrice),
    )
