"""Starts of workflows by their schedules: each tick finds all due ones, no matter when the last tick was."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
from sqlalchemy import select
from sqlmodel import col

from engine.values import encode_canonical
from execution import due_runs
from execution.organization_catalogs import OrganizationCatalogs
from journal import concurrency_limits, definition_snapshot, scheduled_runs
from journal.deployments import wakes
from journal.scheduled_runs import BATCH_SCHEDULES, DueSchedule, ScheduleDefinition, ScheduleRunResult
from json_text import decoding
from messages import wakeups
from models.database_time import DatabaseTime
from models.errors import LockWaitTimeout
from models.workflow import Definition, Workflow, WorkflowGraph

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement, RowMapping
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.definition_snapshot import NodeTypeRegistry
    from messages.broker import Broker
    from models.database import Database
    from nodes.catalog import NodeCatalog

log = structlog.get_logger()

MAX_KEPT_CHARACTERS: Final = 32_000_000
"""Total length of the cached definitions."""


class ScheduleRunner:
    """Starter of scheduled runs. Several may run at once, in any processes."""

    def __init__(
        self,
        database: Database,
        broker: Broker,
        catalog: NodeCatalog,
        now: ColumnElement[int] | None = None,
    ) -> None:
        """Create a runner; `now` is a SQL expression for the time in microseconds since 1970, by default the database's
        own time.
        """
        self._database = database
        self._broker = broker
        self._catalogs = OrganizationCatalogs(database, catalog)
        self._now = DatabaseTime() if now is None else now
        self._cache: OrderedDict[str, ScheduleDefinition] = OrderedDict()
        self._cached_characters = 0

    async def start_due(self) -> int:
        """Start all due scheduled runs, wake workers and deployments, and return the number of runs.

        A schedule that can't be run is postponed with its problem. Raises `DatabaseUnavailable`.
        """
        runs = 0
        while True:
            async with self._database.read() as connection:
                found = await connection.execute(scheduled_runs.due_statement(self._now))
                due = [DueSchedule(*row) for row in found]
            if not due:
                return runs
            started = await self._start(due)
            runs += len(started.runs)
            if len(due) < BATCH_SCHEDULES or not started.decided:
                return runs

    async def reset_ahead(self) -> None:
        """Recompute the next instants of schedules that were computed while the clock was ahead.

        Raises `DatabaseUnavailable`.
        """
        count = BATCH_SCHEDULES
        while count == BATCH_SCHEDULES:
            count = await self._database.transaction(
                partial(scheduled_runs.reset_schedules_ahead, now=self._now)
            )
            if count:
                log.warning("schedules reset: the clock was ahead", schedules=count)

    async def _start(self, due: Sequence[DueSchedule]) -> ScheduleRunResult:
        """Start the runs of a batch of due schedules, postpone those with a problem, announce the runs, and return the
        result.

        Raises `DatabaseUnavailable`.
        """
        runnables, lost = await self._load_definitions(due)
        if lost:
            await self._database.transaction(
                partial(scheduled_runs.postpone_schedules, problems=lost, now=self._now)
            )
        if deployed := [one.workflow_id for one in due if one.deployed_hash]:
            # Before their runs, so that no deployment stops in between as idle.
            await wakes.record_activities(self._database, deployed)
        started = await self._start_runs(runnables)
        _log_result(started, lost)
        for key in sorted(started.concurrency_keys):
            await concurrency_limits.admit_waiting_runs(self._database, key)
        if started.concurrency_keys or None in started.assigned_deployment_ids:
            await wakeups.wake_workers(self._broker)
        if any(started.assigned_deployment_ids):
            await due_runs.wake_due_deployments(self._database, self._broker)
        started.decided += len(lost)
        return started

    async def _start_runs(self, runnables: Mapping[str, ScheduleDefinition]) -> ScheduleRunResult:
        """Start the due runs of workflows in one transaction; return the result.

        If a lock wait times out, they are started workflow by workflow; a locked one remains due. Raises
        `DatabaseUnavailable`.
        """
        try:
            return await self._database.transaction(
                partial(scheduled_runs.start_due_runs, runnables=runnables, now=self._now)
            )
        except LockWaitTimeout:
            if len(runnables) == 1:
                log.warning("schedule locked", workflow_id=next(iter(runnables)))
                return ScheduleRunResult()
        started = ScheduleRunResult()
        for workflow_id, runnable in runnables.items():
            started.add(await self._start_runs({workflow_id: runnable}))
        return started

    # ── definitions ─────────────────────────────────────────────────────────────────────────────────────────

    async def _load_definitions(
        self, due: Sequence[DueSchedule]
    ) -> tuple[dict[str, ScheduleDefinition], dict[str, str]]:
        """Return the definitions of these workflows by id, from the cache or read together, and the reasons
        why others can't run.

        Workflows that have changed meanwhile are in neither. Raises `DatabaseUnavailable`.
        """
        runnables = {one.workflow_id: self._cache[one.workflow_id] for one in due if self._is_cached(one)}
        missing = [one for one in due if one.workflow_id not in runnables]
        if missing:
            async with self._database.read() as connection:
                own = await _read_graphs(connection, [one for one in missing if not one.deployed_hash])
                deployed = await _read_definitions(connection, [one for one in missing if one.deployed_hash])
                catalogs = {
                    organization_id: await self._catalogs.read(connection, organization_id)
                    for organization_id in {one.organization_id for one in missing}
                }
            # In a thread: `pilotflame dev` serves requests while large graphs are decoded.
            found = await asyncio.to_thread(_build_definitions, missing, own, deployed, catalogs)
            for runnable in found:
                if not runnable.names_default_model:
                    self._store_in_cache(runnable)
                runnables[runnable.due.workflow_id] = runnable
        lost = {
            one.workflow_id: "The deployed definition is not stored" for one in missing if one.deployed_hash
        }
        return runnables, {key: reason for key, reason in lost.items() if key not in runnables}

    def _is_cached(self, due: DueSchedule) -> bool:
        cached = self._cache.get(due.workflow_id)
        return cached is not None and cached.due == due

    def _store_in_cache(self, runnable: ScheduleDefinition) -> None:
        """Cache a definition; the oldest ones are dropped above 32 million characters."""
        earlier = self._cache.pop(runnable.due.workflow_id, None)
        self._cached_characters += len(runnable.text) - (len(earlier.text) if earlier else 0)
        self._cache[runnable.due.workflow_id] = runnable
        while self._cached_characters > MAX_KEPT_CHARACTERS and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_characters -= len(oldest.text)


async def _read_graphs(connection: AsyncConnection, due: Sequence[DueSchedule]) -> dict[str, RowMapping]:
    """Return graph, settings and revision of the workflows of schedules by workflow id; deleted ones are left out."""
    if not due:
        return {}
    rows = await connection.execute(
        select(
            *(col(Workflow.id), col(Workflow.revision), col(Workflow.settings)),
            *(col(WorkflowGraph.nodes), col(WorkflowGraph.connections)),
        )
        .join(WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id))
        .where(col(Workflow.id).in_([one.workflow_id for one in due]))
    )
    return {row["id"]: row for row in rows.mappings()}


async def _read_definitions(connection: AsyncConnection, due: Sequence[DueSchedule]) -> dict[str, str]:
    """Return the deployed definitions of schedules as JSON texts by workflow id; those that are not stored are left
    out.
    """
    found: dict[str, str] = {}
    for one in due:
        text = await connection.scalar(
            select(col(Definition.body)).where(
                col(Definition.organization_id) == one.organization_id,
                col(Definition.hash) == one.deployed_hash,
            )
        )
        if text is not None:
            found[one.workflow_id] = text
    return found


def _build_definitions(
    due: Sequence[DueSchedule],
    own: Mapping[str, RowMapping],
    deployed: Mapping[str, str],
    catalogs: Mapping[str, NodeTypeRegistry],
) -> list[ScheduleDefinition]:
    """Return the definitions that schedules run: the deployed one, or the workflow's graph without a deployment.

    Workflows that have changed since they were found are left out, and so are deployed definitions that are not stored.
    `own` has graphs and `deployed` JSON texts by workflow id, and `catalogs` the node types by organization id.
    """
    found: list[ScheduleDefinition] = []
    for one in due:
        catalog = catalogs[one.organization_id]
        if one.deployed_hash is not None:
            if text := deployed.get(one.workflow_id):
                definition = cast("dict[str, Any]", decoding.decode(text))
                found.append(_build_definition(one, text, one.deployed_hash, definition, catalog))
            continue
        row = own.get(one.workflow_id)
        if row is not None and row["revision"] == one.revision:
            definition = definition_snapshot.build_definition(
                row["nodes"], row["connections"], row["settings"], catalog
            )
            encoded = encode_canonical(definition)
            found.append(
                _build_definition(
                    *(one, encoded.decode(), sha256(encoded).hexdigest(), definition, catalog),
                    names_default_model=definition_snapshot.names_default_model(row["nodes"], catalog),
                )
            )
    return found


def _build_definition(
    due: DueSchedule,
    text: str,
    content_hash: str,
    definition: Mapping[str, Json],
    catalog: NodeTypeRegistry,
    *,
    names_default_model: bool = False,
) -> ScheduleDefinition:
    nodes = cast("Sequence[Mapping[str, Json]]", definition["nodes"])
    trigger = definition_snapshot.find_trigger(nodes, catalog)
    return ScheduleDefinition(
        due=due,
        text=text,
        hash=content_hash,
        settings=cast("Mapping[str, Json]", definition["settings"]),
        trigger_kind=trigger.kind if trigger else definition_snapshot.MANUAL_KIND,
        total_nodes=len(nodes),
        names_default_model=names_default_model,
    )


def _log_result(started: ScheduleRunResult, lost: Mapping[str, str]) -> None:
    if started.runs or started.passed:
        log.info("schedules started", runs=len(started.runs), passed_over=len(started.passed))
    for workflow_id, reason, at in started.passed:
        log.debug("schedule skipped", workflow_id=workflow_id, reason=reason, last=at.isoformat())
    for workflow_id, problem in [*started.problems, *lost.items()]:
        log.warning("schedule postponed", workflow_id=workflow_id, reason=problem)
