"""Workflows as runs need them, kept for some seconds: definition, hash and findings are worked out once a revision.

A stale one does no harm: whoever accepts a run checks the revision again, in the statement that inserts it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlmodel import col

from gateway import errors
from journal import pinning
from models.workflow import Workflow, WorkflowGraph, WorkflowShare

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.pinning import LoadedWorkflow
    from models.access import Caller
    from models.database import Database
    from nodes.catalog import Catalog

CACHE_SECONDS = 5.0
MAX_WORKFLOWS = 2_000
MAX_DEFINITION_CHARACTERS = 64_000_000


@dataclass(slots=True)
class Kept:
    """A workflow and how long it may be used without asking."""

    workflow: LoadedWorkflow
    fresh_until: float


class WorkflowCache:
    """The workflows that this process has used of late, by organisation and id."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        self._database = database
        self._catalog = catalog
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()
        self._characters = 0
        self._loads: dict[tuple[str, str], asyncio.Task[LoadedWorkflow | None]] = {}

    async def load(self, workflow_id: str, caller: Caller) -> LoadedWorkflow:
        """Return a workflow that the caller may read and execute; raises 404."""
        key = (caller.organization_id, workflow_id)
        kept = self._kept.get(key)
        if kept and kept.fresh_until > monotonic() and kept.workflow.is_readable_by(caller):
            return kept.workflow
        workflow = await self._load_once(key)
        if workflow is None or not workflow.is_readable_by(caller):
            raise errors.not_found("workflow")
        return workflow

    def forget(self, organization_id: str, workflow_id: str) -> None:
        """Ask the database again next time: somebody has changed the workflow."""
        kept = self._kept.get((organization_id, workflow_id))
        if kept is not None:
            kept.fresh_until = 0.0

    async def close(self) -> None:
        """Wait for what is being loaded."""
        await asyncio.gather(*self._loads.values(), return_exceptions=True)

    async def _load_once(self, key: tuple[str, str]) -> LoadedWorkflow | None:
        """Ask the database, once for all who wait for the same workflow."""
        load = self._loads.get(key)
        if load is None:
            load = asyncio.create_task(self._load(key))
            self._loads[key] = load
            load.add_done_callback(lambda done: self._loaded(key, done))
        return await asyncio.shield(load)

    def _loaded(self, key: tuple[str, str], load: asyncio.Task[LoadedWorkflow | None]) -> None:
        del self._loads[key]
        if not load.cancelled():
            load.exception()  # those who waited have it; if all of them have gone, nobody need be told

    async def _load(self, key: tuple[str, str]) -> LoadedWorkflow | None:
        asked_at = monotonic()
        async with self._database.read() as connection:
            workflow = await self._current(connection, key)
        self._drop(key)
        if workflow is not None:
            self._keep(key, Kept(workflow, asked_at + CACHE_SECONDS))
        return workflow

    async def _current(self, connection: AsyncConnection, key: tuple[str, str]) -> LoadedWorkflow | None:
        organization_id, workflow_id = key
        condition = (
            col(Workflow.organization_id) == organization_id,
            col(Workflow.id) == workflow_id,
            col(Workflow.deleted_at).is_(None),
        )
        kept = self._kept.get(key)
        if kept is not None:
            revision = await connection.scalar(select(col(Workflow.revision)).where(*condition))
            if revision == kept.workflow.revision:
                return kept.workflow
        row = (
            await connection.execute(
                select(Workflow, col(WorkflowGraph.nodes), col(WorkflowGraph.connections))
                .join(WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id))
                .where(*condition)
            )
        ).first()
        if row is None:
            return None
        shares = select(col(WorkflowShare.user_id)).where(col(WorkflowShare.workflow_id) == workflow_id)
        readers = frozenset(await connection.scalars(shares))
        # In a thread: others are served while a large graph is gone through.
        return await asyncio.to_thread(pinning.loaded, row, readers, self._catalog)

    def _keep(self, key: tuple[str, str], kept: Kept) -> None:
        self._kept[key] = kept
        self._characters += len(kept.workflow.definition)
        while len(self._kept) > MAX_WORKFLOWS or self._characters > MAX_DEFINITION_CHARACTERS:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[str, str]) -> None:
        dropped = self._kept.pop(key, None)
        if dropped is not None:
            self._characters -= len(dropped.workflow.definition)
