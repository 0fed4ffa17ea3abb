"""Cache of compiled definitions."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import structlog

from engine.graph import ParsedGraph
from engine.program import WorkflowProgram
from engine.run_errors import InvalidDefinition
from journal.store import ClaimedRun, DefinitionKey
from json_text import decoding
from nodes import custom_types

if TYPE_CHECKING:
    from journal.store import RunStore
    from nodes.catalog import NodeCatalog

log = structlog.get_logger()

MAX_CACHED_NODES = 100_000
"""Capacity of the cache, in nodes of all programs."""
LONG_DEFINITION_CHARACTERS = 50_000
"""Length above which a definition is compiled in a thread; it takes some ten milliseconds."""
CHARACTERS_PER_NODE = 1_000
"""Characters of a definition that count as one node: pinned data and configs may be long."""


class CachedProgram(NamedTuple):
    """Program, and the number of nodes that it counts as."""

    program: WorkflowProgram | InvalidDefinition
    nodes: int


class ProgramCache:
    """Compiled definitions by organization and content hash; evicts the least recently used."""

    def __init__(self, store: RunStore, catalog: NodeCatalog) -> None:
        self._store = store
        self._catalog = catalog
        self._cached: OrderedDict[DefinitionKey, CachedProgram] = OrderedDict()
        self._cached_nodes = 0

    async def load(
        self, runs: Sequence[ClaimedRun]
    ) -> dict[DefinitionKey, WorkflowProgram | InvalidDefinition]:
        """Return by key the program of each run's definition, or the `InvalidDefinition` that prevents its
        run, also if it is deleted.

        Missing ones are read, compiled and cached; the least recently used are evicted above 100,000 nodes.
        Raises `DatabaseUnavailable`.
        """
        wanted = {definition_key(run) for run in runs}
        missing = [key for key in wanted if key not in self._cached]
        texts = await self._store.definitions(missing) if missing else {}
        for key, text in texts.items():
            await self.prepare(key, text)
        found: dict[DefinitionKey, WorkflowProgram | InvalidDefinition] = {}
        for key in wanted:
            cached = self._cached.get(key)
            if cached is not None:
                self._cached.move_to_end(key)
            found[key] = cached.program if cached else InvalidDefinition("The definition is gone")
        self._evict_oldest()
        return found

    async def prepare(self, key: DefinitionKey, text: str) -> None:
        """Compile and cache a definition from its JSON text; an invalid one is cached as its error.

        Texts over 50,000 characters are compiled in a thread.
        """
        # In a thread if it takes long: runs in progress continue meanwhile.
        is_long = len(text) > LONG_DEFINITION_CHARACTERS
        program = await asyncio.to_thread(self._compile, text) if is_long else self._compile(text)
        self._put(key, program, len(text))

    def _compile(self, text: str) -> WorkflowProgram | InvalidDefinition:
        """Compile a definition; return the error that prevents it. Unexpected errors are logged."""
        try:
            definition = decoding.decode(text)
            catalog = custom_types.catalog_of_definition(self._catalog, definition)
            return WorkflowProgram.compile(
                ParsedGraph.from_stored(definition), catalog, catalog.implementation
            )
        except InvalidDefinition as error:
            return error
        except Exception as error:
            # A fault in one definition must not keep a worker from its other runs.
            log.exception("definition not compiled")
            return InvalidDefinition(f"The definition can't be read: {type(error).__name__}: {error}")

    def _put(self, key: DefinitionKey, program: WorkflowProgram | InvalidDefinition, characters: int) -> None:
        """Cache a program in place of an earlier one; it counts by its nodes, or by the `characters` of its definition
        if these weigh more.
        """
        if key in self._cached:
            self._cached_nodes -= self._cached[key].nodes
        nodes = 1 if isinstance(program, InvalidDefinition) else len(program.nodes)
        self._cached[key] = CachedProgram(program, max(nodes, characters // CHARACTERS_PER_NODE))
        self._cached_nodes += self._cached[key].nodes

    def _evict_oldest(self) -> None:
        while self._cached_nodes > MAX_CACHED_NODES and len(self._cached) > 1:
            _, cached = self._cached.popitem(last=False)
            self._cached_nodes -= cached.nodes


def definition_key(run: ClaimedRun) -> DefinitionKey:
    """Return the key under which a run's definition is stored."""
    return DefinitionKey(run.organization_id, run.definition_hash, run.shard)
