"""Definitions made ready to run, kept while they are used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import structlog

from engine.errors import InvalidDefinition
from engine.graph import Graph
from engine.program import Program
from journal.store import Claimed, DefinitionKey

if TYPE_CHECKING:
    from journal.store import Store
    from nodes.catalog import Catalog

log = structlog.get_logger()

MAX_KEPT_NODES = 100_000
"""Programs are kept until their nodes are this many, all together."""


class Programs:
    """Compiled definitions by organisation and content hash; the least recently used go first."""

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog
        self._kept: OrderedDict[DefinitionKey, Program | InvalidDefinition] = OrderedDict()
        self._kept_nodes = 0

    async def load(self, runs: Sequence[Claimed]) -> dict[DefinitionKey, Program | InvalidDefinition]:
        """Return the program of each run's definition, or why it can't run."""
        wanted = {key_of(run) for run in runs}
        missing = [key for key in wanted if key not in self._kept]
        texts = await self._store.definitions(missing) if missing else {}
        for key, text in texts.items():
            self._keep(key, self._compile(text))
        found: dict[DefinitionKey, Program | InvalidDefinition] = {}
        for key in wanted:
            if key in self._kept:
                self._kept.move_to_end(key)
            found[key] = self._kept.get(key) or InvalidDefinition("The definition is gone")
        self._forget_oldest()
        return found

    def _compile(self, text: str) -> Program | InvalidDefinition:
        try:
            return Program.of(
                Graph.of(msgspec.json.decode(text)), self._catalog, self._catalog.implementation
            )
        except InvalidDefinition as error:
            return error
        except Exception as error:
            # Whatever is wrong with one definition must not keep a worker from its other runs.
            log.exception("definition not compiled")
            return InvalidDefinition(f"The definition can't be read: {type(error).__name__}: {error}")

    def _keep(self, key: DefinitionKey, program: Program | InvalidDefinition) -> None:
        self._kept[key] = program
        self._kept_nodes += _size(program)

    def _forget_oldest(self) -> None:
        while self._kept_nodes > MAX_KEPT_NODES and len(self._kept) > 1:
            _, program = self._kept.popitem(last=False)
            self._kept_nodes -= _size(program)


def key_of(run: Claimed) -> DefinitionKey:
    """Return where a run's definition is."""
    return DefinitionKey(run.organization_id, run.definition_hash, run.lane)


def _size(program: Program | InvalidDefinition) -> int:
    return 1 if isinstance(program, InvalidDefinition) else len(program.nodes)
