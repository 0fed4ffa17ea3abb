"""Cache of workflows for runs: definition, hash and findings are computed once per revision.

Entries are used for some seconds. An outdated entry is harmless: the statement that inserts a run checks the
revision again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from time import monotonic
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import select
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from gateway.http import errors
from journal import definition_snapshot
from models.deployment import Deployment
from models.workflow import Workflow, WorkflowGraph, WorkflowShare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from execution.organization_catalogs import OrganizationCatalogs
    from journal.definition_snapshot import LoadedWorkflow
    from models.access import ApiCaller
    from models.database import Database
    from nodes.catalog import NodeCatalog

CACHE_SECONDS = 5.0
MAX_WORKFLOWS = 2_000
MAX_DEFINITION_CHARACTERS = 64_000_000
LOADED_TOGETHER = 500
ORGANIZATION_SECONDS = 3600.0
"""Seconds for which the organization of a workflow is cached; it never changes."""
MAX_ORGANIZATIONS = 20_000
_IS_DEPLOYED = (
    select(col(Deployment.is_deployed))
    .where(col(Deployment.workflow_id) == col(Workflow.id))
    .correlate(Workflow)
    .scalar_subquery()
    .label("is_deployed")
)
_WITH_GRAPH = select(Workflow, col(WorkflowGraph.nodes), col(WorkflowGraph.connections), _IS_DEPLOYED).join(
    WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id)
)


class CachedWorkflow(Struct):
    """Workflow and the time until which it is used without a query."""

    workflow: LoadedWorkflow
    fresh_until: float
    catalog: NodeCatalog
    """Node types by which it was validated."""

    @property
    def is_fresh(self) -> bool:
        """Whether it may be used without a query; never if it names the default language model, which may change."""
        return self.fresh_until > monotonic() and not self.workflow.names_default_model


class WorkflowCache:
    """Workflows that this process has used recently, by organization and id."""

    def __init__(self, database: Database, catalogs: OrganizationCatalogs) -> None:
        self._database = database
        self._catalogs = catalogs
        self._kept: OrderedDict[tuple[str, str], CachedWorkflow] = OrderedDict()
        self._characters = 0
        self._loads: dict[tuple[str, str], asyncio.Task[LoadedWorkflow | None]] = {}
        self._organizations: TTLCache[str, str] = TTLCache(ORGANIZATION_SECONDS, MAX_ORGANIZATIONS)

    async def load(self, workflow_id: str, caller: ApiCaller) -> LoadedWorkflow:
        """Return a workflow that the caller may read and execute, cached for five seconds.

        Raises a 404 error if it is missing or the caller may not. Concurrent calls share a query.
        """
        key = (caller.organization_id, workflow_id)
        kept = self._kept.get(key)
        if kept and kept.is_fresh and kept.workflow.is_readable_by(caller):
            return kept.workflow
        workflow = await self._load_once(key)
        if workflow is None or not workflow.is_readable_by(caller):
            raise errors.not_found("workflow")
        return workflow

    async def load_for_sender(self, workflow_id: str) -> LoadedWorkflow | None:
        """Return a workflow for a request that proves its sender itself, such as a signed one; None if it is missing or
        deleted.

        No permission is checked: the caller of this method verifies the request. A workflow that is found is cached for
        five seconds.
        """
        organization_id = self._organizations.get(workflow_id)
        if organization_id is None:
            statement = select(col(Workflow.organization_id)).where(col(Workflow.id) == workflow_id)
            async with self._database.read() as connection:
                organization_id = await connection.scalar(statement)
            if organization_id is None:
                return None
            self._organizations.put(workflow_id, organization_id)
        key = (organization_id, workflow_id)
        kept = self._kept.get(key)
        if kept and kept.is_fresh:
            return kept.workflow
        return await self._load_once(key)

    async def load_several(
        self, organization_id: str, revisions: Mapping[str, int]
    ) -> Mapping[str, LoadedWorkflow]:
        """Return workflows of an organization by their ids, for a caller that may run all of them; missing
        ones are left out.

        `revisions` has the current revision by id. A cached workflow is used if it has that revision and is
        valid; the others are read together, 500 at once, in their current revisions.
        """
        found: dict[str, LoadedWorkflow] = {}
        for workflow_id, revision in revisions.items():
            kept = self._kept.get((organization_id, workflow_id))
            # An invalid one is read again: a custom node type may have been added, or a default model named.
            if (
                kept is not None
                and kept.workflow.revision == revision
                and not kept.workflow.validation.errors
                and not kept.workflow.names_default_model
            ):
                self._kept.move_to_end((organization_id, workflow_id))
                found[workflow_id] = kept.workflow
        missing = [workflow_id for workflow_id in revisions if workflow_id not in found]
        for start in range(0, len(missing), LOADED_TOGETHER):
            found |= await self._load_together(organization_id, missing[start : start + LOADED_TOGETHER])
        return found

    def forget(self, organization_id: str, workflow_id: str) -> None:
        """Mark a cached workflow as outdated after a change, so that its next use queries the database.

        The result of a query in progress is not cached. `load_several` still returns the cached one while its revision
        is the current one.
        """
        self._loads.pop(
            (organization_id, workflow_id), None
        )  # a query that is running may have begun before the change
        kept = self._kept.get((organization_id, workflow_id))
        if kept is not None:
            kept.fresh_until = 0.0

    async def close(self) -> None:
        """Wait for queries in progress that load workflows."""
        await asyncio.gather(*self._loads.values(), return_exceptions=True)

    async def _load_once(self, key: tuple[str, str]) -> LoadedWorkflow | None:
        """Return a workflow from the database, with one query for all concurrent calls; None if it does not exist."""
        load = self._loads.get(key)
        if load is None:
            load = asyncio.create_task(self._load(key))
            self._loads[key] = load
            load.add_done_callback(lambda done: self._finish_load(key, done))
        return await asyncio.shield(load)

    def _finish_load(self, key: tuple[str, str], load: asyncio.Task[LoadedWorkflow | None]) -> None:
        if self._loads.get(key) is load:
            del self._loads[key]
        if not load.cancelled():
            load.exception()  # callers have the error; without callers, asyncio would log it

    async def _load(self, key: tuple[str, str]) -> LoadedWorkflow | None:
        """Read a workflow with its organization's node types, and cache it unless `forget` was called meanwhile; None
        if it does not exist.
        """
        asked_at = monotonic()
        async with self._database.read() as connection:
            catalog = await self._catalogs.read(connection, key[0])
            workflow = await self._read_current(connection, key, catalog)
        if self._loads.get(key) is asyncio.current_task():  # otherwise a newer query has been started
            self._drop(key)
            if workflow is not None:
                self._keep(key, CachedWorkflow(workflow, asked_at + CACHE_SECONDS, catalog))
        return workflow

    async def _load_together(
        self, organization_id: str, workflow_ids: Sequence[str]
    ) -> Mapping[str, LoadedWorkflow]:
        """Read workflows of an organization by one query, and cache and return them by id; missing ones are
        omitted.
        """
        asked_at = monotonic()
        of_workflows = col(WorkflowShare.workflow_id).in_(workflow_ids)
        readers: dict[str, set[str]] = {}
        async with self._database.read() as connection:
            catalog = await self._catalogs.read(connection, organization_id)
            rows = (
                await connection.execute(
                    _WITH_GRAPH.where(
                        col(Workflow.organization_id) == organization_id,
                        col(Workflow.id).in_(workflow_ids),
                        col(Workflow.deleted_at).is_(None),
                    )
                )
            ).all()
            shares = select(col(WorkflowShare.workflow_id), col(WorkflowShare.user_id)).where(of_workflows)
            for workflow_id, user_id in await connection.execute(shares):
                readers.setdefault(workflow_id, set()).add(user_id)
        # A thread, so that many graphs do not block other requests.
        loaded = await asyncio.to_thread(
            lambda: [_load_row(row, frozenset(readers.get(row.id, ())), catalog) for row in rows]
        )
        for workflow in loaded:
            self._drop((organization_id, workflow.id))
            cached = CachedWorkflow(workflow, asked_at + CACHE_SECONDS, catalog)
            self._keep((organization_id, workflow.id), cached)
        return {workflow.id: workflow for workflow in loaded}

    async def _read_current(
        self, connection: AsyncConnection, key: tuple[str, str], catalog: NodeCatalog
    ) -> LoadedWorkflow | None:
        """Return the workflow as stored now, None if it is missing or deleted.

        A cached graph is used if its revision and the node types are still the same.
        """
        organization_id, workflow_id = key
        condition = (
            col(Workflow.organization_id) == organization_id,
            col(Workflow.id) == workflow_id,
            col(Workflow.deleted_at).is_(None),
        )
        kept = self._kept.get(key)
        if kept is not None and kept.catalog is catalog:
            now = (
                await connection.execute(select(col(Workflow.revision), _IS_DEPLOYED).where(*condition))
            ).first()
            if now is not None and now.revision == kept.workflow.revision:
                return replace(kept.workflow, is_deployed=bool(now.is_deployed))
        row = (await connection.execute(_WITH_GRAPH.where(*condition))).first()
        if row is None:
            return None
        shares = select(col(WorkflowShare.user_id)).where(col(WorkflowShare.workflow_id) == workflow_id)
        readers = frozenset(await connection.scalars(shares))
        # A thread, so that a large graph does not block other requests.
        return await asyncio.to_thread(_load_row, row, readers, catalog)

    def _keep(self, key: tuple[str, str], kept: CachedWorkflow) -> None:
        """Cache a workflow; the oldest ones are dropped beyond 2,000 workflows or 64 million characters of
        definitions.
        """
        self._kept[key] = kept
        self._characters += len(kept.workflow.definition)
        while len(self._kept) > MAX_WORKFLOWS or self._characters > MAX_DEFINITION_CHARACTERS:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[str, str]) -> None:
        dropped = self._kept.pop(key, None)
        if dropped is not None:
            self._characters -= len(dropped.workflow.definition)


def _load_row(row: Row[Any], readers: frozenset[str], catalog: NodeCatalog) -> LoadedWorkflow:
    """Return a workflow from its row, with the findings of its validation; `readers` are the users that it is shared
    with.
    """
    return definition_snapshot.load_workflow(row, readers, catalog, is_deployed=bool(row.is_deployed))
