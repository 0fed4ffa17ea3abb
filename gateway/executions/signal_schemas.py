"""Names and schemas of the signals that the nodes of a run wait for, by the definition of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy import and_, select
from sqlmodel import col

from concurrency import offload
from concurrency.ttl_cache import TTLCache
from gateway.executions import input_checks
from gateway.http import errors
from json_text import decoding
from models.execution import Execution
from models.workflow import Definition

if TYPE_CHECKING:
    from engine.values import Json
    from journal.store import ExecutionKey
    from models.database import Database
    from nodes.sandbox.form_checks import FormChecker

NODE_TYPE: Final = "wait-for-signal"
CACHE_SECONDS: Final = 600.0
MAX_CACHED: Final = 200
SHOWN_NAMES: Final = 20

SchemasByName: TypeAlias = "Mapping[str, Sequence[Mapping[str, Json]]]"
"""Schemas of all nodes that wait for a signal, by its name; a node without a schema adds none."""


class SignalSchemas:
    """Check of signals by the definition of their run, which never changes."""

    def __init__(self, database: Database, forms: FormChecker) -> None:
        self._database = database
        self._forms = forms
        self._cache: TTLCache[tuple[str, str], SchemasByName] = TTLCache(CACHE_SECONDS, MAX_CACHED)

    async def require_valid(self, key: ExecutionKey, organization_id: str, name: str, payload: Json) -> None:
        """Raise a 422 error if no node of the run waits for signals of this name, or if the payload violates the schema
        of one of these nodes.

        A schema that can't be used or takes over three seconds to check gives 422, too. Raises 404 if the run is gone,
        and 503 if no process is free for the check.
        """
        schemas = await self._load(key, organization_id)
        if name not in schemas:
            names = ", ".join(list(schemas)[:SHOWN_NAMES])
            known = f"its nodes wait for {names}" if names else "none of its nodes waits for a signal"
            message = f"name: the execution receives no signal with this name: {known}"
            raise errors.invalid([errors.problem("name", "unknown-signal", message)])
        for schema in schemas[name]:
            await input_checks.require_valid_value(self._forms, organization_id, schema, payload, "payload")

    async def _load(self, key: ExecutionKey, organization_id: str) -> SchemasByName:
        """Return the schemas of the signals in a run's definition, by signal name; raises 404 if the run is gone."""
        hash_of_run = select(col(Execution.definition_hash)).where(
            col(Execution.id) == key.execution_id, col(Execution.shard) == key.shard
        )
        async with self._database.read() as connection:
            definition_hash = await connection.scalar(hash_of_run)
            if definition_hash is None:
                raise errors.not_found("execution")
            place = (organization_id, definition_hash)
            if (cached := self._cache.get(place)) is not None:
                return cached
            body = await connection.scalar(
                select(col(Definition.body)).where(
                    and_(
                        col(Definition.organization_id) == organization_id,
                        col(Definition.hash) == definition_hash,
                    )
                )
            )
        found = {} if body is None else await offload.run(_find_schemas, body)
        self._cache.put(place, found)
        return found


def _find_schemas(definition: str) -> SchemasByName:
    """Return the schemas of the nodes that wait for signals in a definition (JSON text), by signal name; empty for a
    name of nodes without a schema.
    """
    found: dict[str, list[Mapping[str, Json]]] = {}
    nodes: Sequence[Mapping[str, Any]] = decoding.decode(definition).get("nodes", [])
    for node in nodes:
        if node.get("type") != NODE_TYPE:
            continue
        config = node.get("config") or {}
        schemas = found.setdefault(str(config.get("name")), [])
        if isinstance(config.get("schema"), dict):
            schemas.append(config["schema"])
    return found
