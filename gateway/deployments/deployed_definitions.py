"""Definitions of deployments, loaded by hash, because a workflow's own graph may have changed since its deploy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import select
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from engine.findings import ValidationResult
from engine.graph import RunSettings
from engine.values import encode_json
from journal import definition_snapshot
from journal.store import DefinitionKey
from json_text import decoding
from models.workflow import Definition

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.values import Json
    from journal.definition_snapshot import LoadedWorkflow, TriggerNode
    from models.database import Database
    from models.deployment import Deployment
    from nodes.catalog import NodeCatalog

KEPT_SECONDS: Final = 3_600.0
MAX_KEPT: Final = 200
MAX_KEPT_CHARACTERS: Final = 500_000
"""Longer definitions are read again each time."""


class DefinitionMissing(Exception):
    """Deployed definition without a stored text."""


class DeployedDefinition(Struct, frozen=True):
    """Definition of a deployment, as runs need it."""

    text: str
    settings: Mapping[str, Json]
    trigger: TriggerNode | None
    total_nodes: int
    models: Mapping[str, str]
    """As in `LoadedWorkflow`."""


class DeployedDefinitions:
    """Cache of the deployed definitions that this process has used recently."""

    def __init__(self, database: Database, catalog: NodeCatalog) -> None:
        self._database = database
        self._catalog = catalog
        self._cache: TTLCache[DefinitionKey, DeployedDefinition] = TTLCache(KEPT_SECONDS, MAX_KEPT)

    async def load(self, workflow: LoadedWorkflow, deployment: Deployment) -> LoadedWorkflow:
        """Return a workflow with the deployed definition, which counts as valid, in place of its own.

        Its own may have been edited since. Definitions are cached. Raises `DefinitionMissing` if the text is not
        stored.
        """
        if workflow.definition_hash == deployment.definition_hash:
            return replace(workflow, validation=ValidationResult())
        deployed = await self._load(
            DefinitionKey(deployment.organization_id, deployment.definition_hash, deployment.shard)
        )
        return replace(
            workflow,
            settings=deployed.settings,
            config=encode_json(deployed.settings).decode(),
            timeout_seconds=RunSettings.from_stored(deployed.settings).timeout_seconds,
            definition=deployed.text,
            definition_hash=deployment.definition_hash,
            # It was validated when it was deployed.
            validation=ValidationResult(),
            trigger=deployed.trigger,
            total_nodes=deployed.total_nodes,
            models=deployed.models,
        )

    async def trigger_kind(self, key: DefinitionKey) -> str:
        """Return the kind of the trigger node of a deployed definition, `manual` without one.

        Raises `DefinitionMissing`.
        """
        trigger = (await self._load(key)).trigger
        return trigger.kind if trigger else definition_snapshot.MANUAL_KIND

    async def _load(self, key: DefinitionKey) -> DeployedDefinition:
        """Return a deployed definition from the cache or the database; raises `DefinitionMissing`.

        One of over 500,000 characters is not cached.
        """
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        text = select(col(Definition.body)).where(
            col(Definition.organization_id) == key.organization_id,
            col(Definition.hash) == key.hash,
            col(Definition.shard) == key.shard,
        )
        async with self._database.read() as connection:
            found = await connection.scalar(text)
        if found is None:
            raise DefinitionMissing(f"The definition {key.hash} is deployed, and not stored")
        # In a thread, so that other requests are served while a large graph is decoded.
        deployed = await asyncio.to_thread(_parse_definition, found, self._catalog)
        if len(found) <= MAX_KEPT_CHARACTERS:
            self._cache.put(key, deployed)
        return deployed


def _parse_definition(text: str, catalog: NodeCatalog) -> DeployedDefinition:
    definition: dict[str, Any] = decoding.decode(text)
    nodes = definition["nodes"]
    return DeployedDefinition(
        text,
        definition["settings"],
        definition_snapshot.find_trigger(nodes, catalog),
        len(nodes),
        definition_snapshot.find_models(nodes, definition["connections"], catalog),
    )
