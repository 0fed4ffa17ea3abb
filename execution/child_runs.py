"""Sub-workflow runs: accepted like any other run, linked to their parent, and started at most once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakValueDictionary

import msgspec
from msgspec import Struct
from sqlalchemy import Text, func, literal, or_, select
from sqlmodel import col

from engine.node_api import NodeEffect
from engine.run_errors import NodeError
from engine.triggers import trigger_output
from engine.values import equal_json
from execution.organization_catalogs import OrganizationCatalogs
from execution.retry import until_available
from journal import concurrency_limits, definition_snapshot, run_copies
from journal.concurrency_limits import LimitAction
from journal.store import AcceptanceVerdict, ExecutionKey, RunAcceptance
from journal.waits import children, completion
from journal.waits.completion import ON_FAILURE_TRIGGER
from json_text import decoding
from messages import wakeups
from models import access, ids
from models.access import User, UserRole
from models.execution import Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.workflow import Workflow, WorkflowGraph, WorkflowStatus, is_readable_by
from telemetry import run_origin

if TYPE_CHECKING:
    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from engine.services import RunCaller
    from engine.values import Json
    from journal.definition_snapshot import LoadedWorkflow
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database
    from models.settings import ServerSettings
    from nodes.catalog import NodeCatalog

TRIGGER_TYPE: Final = "sub-workflow"
SCHEDULED_AT: Final = "scheduledAt"
"""Field of a trigger's output that is the time of the start."""
ATTEMPTS: Final = 3
"""Maximum number of loads of a workflow that changes before its run is accepted."""
MAX_CACHED_CHARACTERS: Final = 16_000_000
"""Capacity of the workflow cache, in characters of definitions."""
SHOWN_FINDINGS: Final = 3
CAPACITY_CHECK_SECONDS: Final = 0.02
_RUNNABLE_STATUSES: Final = frozenset({WorkflowStatus.DRAFT, WorkflowStatus.ACTIVE})
_encode = msgspec.json.Encoder().encode


class ParentRun(NamedTuple):
    """Run with the node that starts another run."""

    shard: int
    root_id: str
    """The topmost ancestor of the run."""
    depth: int
    is_private: bool
    is_tainted: bool
    origin_of_child: str | None
    """Request and span of the run that it starts, as in `telemetry.run_origin`."""


class DescendantCount(Struct, weakref=True):
    """Starts of runs below one root in this process: the number begun and the number completed."""

    begun: int = 0
    done: int = 0


class ChildRunStarter:
    """Start of sub-workflow and failure runs; implements `engine.services.SubRunService`."""

    def __init__(
        self,
        database: Database,
        store: JournalStore,
        broker: Broker,
        catalog: NodeCatalog,
        settings: ServerSettings,
    ) -> None:
        self._database = database
        self._store = store
        self._broker = broker
        self._catalogs = OrganizationCatalogs(database, catalog)
        self._max_depth = settings.max_run_depth
        self._max_sub_runs = settings.max_sub_runs
        self._cached: OrderedDict[tuple[str, str], LoadedWorkflow] = OrderedDict()
        self._cached_characters = 0
        self._descendants: WeakValueDictionary[str, DescendantCount] = WeakValueDictionary()

    async def start(
        self,
        caller: RunCaller,
        workflow_id: str,
        trigger_inputs: Json,
        *,
        node_id: str,
        iteration: str,
        awaited: bool,
    ) -> str:
        """Start a run of another workflow for a node, or find the run of an earlier call for the same node and
        iteration; return its execution id.

        A run that is `awaited` answers the node of this very execution at its end, so a resumed execution
        starts it anew, or resumes the failed run of the execution that it replays. A run that isn't awaited
        belongs to all executions with the caller's `key_prefix`, such as those that resume it. Waits while the
        database is unavailable. Raises `NodeError`, also if the workflow changes three times meanwhile.
        """
        origin = caller.execution_id if awaited else caller.key_prefix
        child_id = ids.derive_id("exec", origin, node_id, iteration)
        answering = (
            children.completion_for_parent(caller.execution_id, node_id, iteration) if awaited else None
        )
        if answering is not None:
            resume = partial(self._resume_child, caller, workflow_id, trigger_inputs, child_id, answering)
            if await until_available(partial(resume, node_id=node_id, iteration=iteration)):
                return child_id
        start = partial(self._accept_child, caller, workflow_id, trigger_inputs, child_id, answering)
        for _ in range(ATTEMPTS):
            if await until_available(start):
                return child_id
        raise _build_change_error(workflow_id)

    async def _resume_child(
        self,
        caller: RunCaller,
        workflow_id: str,
        inputs: Json,
        child_id: str,
        answering: dict[str, dict[str, str]],
        *,
        node_id: str,
        iteration: str,
    ) -> bool:
        """Resume the failed run that this node started, with equal inputs, in the execution that the caller replays.

        `answering` is the completion action that answers the node. Return False if there is no such run, its inputs
        differ, or a run of this execution exists already. A new run would repeat the writes that the failed one has
        completed. Raises `NodeError` and `DatabaseUnavailable`.
        """
        async with self._database.read() as connection:
            found = await _find_failed_child(connection, caller, workflow_id, node_id, iteration)
            if found is None or await _child_exists(connection, caller, child_id):
                return False
            parent = await _read_parent(connection, caller)
            workflow = await self._load_workflow(connection, caller, parent.shard, workflow_id)
        recorded = decoding.decode(found.trigger)
        given = trigger_output(workflow.trigger_kind or "manual", inputs, self._database.clock.now())
        if isinstance(recorded, dict) and SCHEDULED_AT in given:
            given[SCHEDULED_AT] = recorded.get(SCHEDULED_AT)
        if not equal_json(given, recorded):
            return False
        key = ExecutionKey(found.id, found.shard)
        changes: dict[str, SQLColumnExpression[Any]] = {
            "parent_id": literal(caller.execution_id),
            "root_id": literal(parent.root_id),
            "depth": literal(parent.depth + 1),
            "trace_origin": literal(parent.origin_of_child, Text()),
            "completion_action": literal(completion.requested_actions({}, answering=answering), Text()),
            "is_tainted": or_(col(Execution.is_tainted), literal(caller.is_tainted or parent.is_tainted)),
        }

        async def insert(connection: AsyncConnection) -> None:
            if not await _child_exists(connection, caller, child_id):
                await run_copies.insert_copy(
                    connection, key, child_id, caller.user_id, trigger_type=TRIGGER_TYPE, also=changes
                )

        await self._database.transaction(insert)
        if found.concurrency_key is not None:
            await concurrency_limits.admit_waiting_runs(self._database, found.concurrency_key)
        await wakeups.wake_workers(self._broker)
        return True

    async def may_write(self, caller: RunCaller, workflow_id: str) -> bool:
        """Return whether a run of another workflow may write, as it is now; true for one that can't be read.

        Waits while the database is unavailable.
        """

        async def read() -> bool:
            async with self._database.read() as connection:
                parent = await _read_parent(connection, caller)
                return await self._may_write(connection, caller, parent.shard, workflow_id)

        return await until_available(read)

    async def _may_write(
        self, connection: AsyncConnection, caller: RunCaller, shard: int, workflow_id: str
    ) -> bool:
        from execution import workflow_traits  # noqa: PLC0415 - loaded with the first workflow that an agent calls

        reader = await _read_caller(connection, caller, shard)
        catalog = await self._catalogs.read(connection, caller.organization_id)
        traits = await workflow_traits.read(connection, reader, [workflow_id], catalog)
        return traits[workflow_id].effect is NodeEffect.WRITE

    async def start_about_failure(self, caller: RunCaller, workflow_id: str, inputs: Json) -> None:
        """Start the run of a failure workflow for a failed run, at most once.

        Its run starts no failure workflow or callback at its own failure. It counts toward the maximum depth,
        so that two workflows that handle each other's failures end. Raises `NodeError` and
        `DatabaseUnavailable`.
        """
        run_id = ids.derive_id("exec", caller.execution_id, ON_FAILURE_TRIGGER)
        for _ in range(ATTEMPTS):
            if await self._accept_child(caller, workflow_id, inputs, run_id, None, ON_FAILURE_TRIGGER):
                return
        raise _build_change_error(workflow_id)

    async def _accept_child(
        self,
        caller: RunCaller,
        workflow_id: str,
        inputs: Json,
        child_id: str,
        answering: dict[str, dict[str, str]] | None,
        trigger_type: str = TRIGGER_TYPE,
    ) -> bool:
        """Accept a child run; return False if its workflow has changed since it was read, so that the caller
        tries again.

        A run that an earlier call accepted counts as accepted. `answering` is the completion action that answers the
        node that awaits it; None if none does. Raises `NodeError` for depth, number of runs,
        access, an invalid workflow, one that writes for a caller that may only read, and a reached concurrency
        limit (only this may be retried), and `DatabaseUnavailable`.
        """
        async with self._database.read() as connection:
            if await _child_exists(connection, caller, child_id):
                return True
            parent = await _read_parent(connection, caller)
            _require_depth(parent, self._max_depth)
            workflow = await self._load_workflow(connection, caller, parent.shard, workflow_id)
            if caller.is_read_only and await self._may_write(connection, caller, parent.shard, workflow_id):
                raise NodeError(f"The workflow {workflow_id} writes now", code="workflow-writes")
        kind = workflow.trigger_kind or "manual"
        trigger = trigger_output(kind, inputs, self._database.clock.now())
        limit = concurrency_limits.concurrency_limit(workflow.settings, workflow.id, trigger)
        is_last = trigger_type == ON_FAILURE_TRIGGER
        child = RunAcceptance(
            execution_id=child_id,
            shard=workflow.shard,
            organization_id=workflow.organization_id,
            workflow_id=workflow.id,
            workflow_revision=workflow.revision,
            user_id=caller.user_id,
            trigger_type=trigger_type,
            trigger=_encode(trigger).decode(),
            config=workflow.config,
            definition_hash=workflow.definition_hash,
            definition=workflow.definition,
            timeout_seconds=workflow.timeout_seconds,
            total_nodes=workflow.total_nodes,
            parent_id=caller.execution_id,
            root_id=parent.root_id,
            depth=parent.depth + 1,
            concurrency_key=limit.key if limit else None,
            concurrency_limit=limit.runs if limit else None,
            may_wait=limit is None or limit.on_limit is LimitAction.QUEUE,
            completion_action=completion.requested_actions(
                {} if is_last else workflow.settings, answering=answering
            ),
            is_private=parent.is_private,
            # The error of a failed run may quote what an outsider has sent.
            is_tainted=is_last or caller.is_tainted or parent.is_tainted,
            trace_origin=parent.origin_of_child,
        )
        async with self._hold_capacity(parent.root_id):
            (accepted,) = await self._store.accept([child])
        if accepted.verdict is AcceptanceVerdict.FULL:
            message = f"The workflow {workflow_id} has reached its concurrency limit"
            raise NodeError(message, code="concurrency-limit", retryable=True)
        if accepted.verdict is not AcceptanceVerdict.ACCEPTED:
            return False
        if limit is not None:
            await concurrency_limits.admit_waiting_runs(self._database, limit.key)
        await wakeups.wake_workers(self._broker)
        return True

    @asynccontextmanager
    async def _hold_capacity(self, root_id: str) -> AsyncIterator[None]:
        """Count one more run below a root run during the block; raises `NodeError` if the maximum number has
        been started.

        Other starts of this process may be committed or not. While they decide whether there is capacity,
        this waits for them.
        """
        descendants = self._descendants.setdefault(root_id, DescendantCount())
        while True:
            done = descendants.done
            started = await self._count_descendants(root_id)
            if started >= self._max_sub_runs:
                raise _too_many_runs(self._max_sub_runs)
            if started + descendants.begun - done < self._max_sub_runs:
                break
            await asyncio.sleep(CAPACITY_CHECK_SECONDS)
        descendants.begun += 1
        try:
            yield
        finally:
            descendants.done += 1

    async def _count_descendants(self, root_id: str) -> int:
        """Return the number of runs that were started below a root run, counted up to the allowed maximum."""
        of_root = select(col(Execution.id)).where(col(Execution.root_id) == root_id)
        counted = select(func.count()).select_from(of_root.limit(self._max_sub_runs).subquery())
        async with self._database.read() as connection:
            return await connection.scalar(counted) or 0

    async def _load_workflow(
        self, connection: AsyncConnection, caller: RunCaller, shard: int, workflow_id: str
    ) -> LoadedWorkflow:
        """Return a workflow that the user of the run may run, from the cache if its revision has not changed.

        Raises `NodeError` if it is missing, unreadable, neither draft nor active, or invalid.
        """
        readable = (
            col(Workflow.id) == workflow_id,
            is_readable_by(await _read_caller(connection, caller, shard)),
        )
        revision = await connection.scalar(select(col(Workflow.revision)).where(*readable))
        cached = self._cached.get((caller.organization_id, workflow_id))
        if (
            cached is None
            or cached.revision != revision
            or cached.validation.errors
            or cached.names_default_model
        ):
            row = (
                await connection.execute(
                    select(Workflow, col(WorkflowGraph.nodes), col(WorkflowGraph.connections))
                    .join(WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id))
                    .where(*readable)
                )
            ).first()
            if row is None:
                raise NodeError(f"There is no workflow {workflow_id}", code="workflow-not-found")
            # In a thread: other runs progress while a large graph is validated.
            catalog = await self._catalogs.read(connection, caller.organization_id)
            cached = await asyncio.to_thread(definition_snapshot.load_workflow, row, frozenset(), catalog)
        self._cache_workflow(cached)
        _require_runnable(cached)
        return cached

    def _cache_workflow(self, workflow: LoadedWorkflow) -> None:
        """Cache a workflow; the oldest ones are dropped above 16 million characters of definitions."""
        key = (workflow.organization_id, workflow.id)
        earlier = self._cached.pop(key, None)
        self._cached_characters -= len(earlier.definition) if earlier else 0
        self._cached[key] = workflow
        self._cached_characters += len(workflow.definition)
        while self._cached_characters > MAX_CACHED_CHARACTERS and len(self._cached) > 1:
            _, oldest = self._cached.popitem(last=False)
            self._cached_characters -= len(oldest.definition)


def _require_depth(parent: ParentRun, most: int) -> None:
    if parent.depth >= most:
        message = f"Sub-workflow runs nest at most {most} deep (PILOTFLAME_MAX_RUN_DEPTH); this run is at that depth"
        raise NodeError(message, code="run-too-deep")


def _too_many_runs(most: int) -> NodeError:
    message = f"A run may have at most {most:,} sub-workflow runs at all levels (PILOTFLAME_MAX_SUB_RUNS)"
    return NodeError(message, code="too-many-sub-runs")


async def _find_failed_child(
    connection: AsyncConnection, caller: RunCaller, workflow_id: str, node_id: str, iteration: str
) -> Row[Any] | None:
    """Return the failed run that a node has started in the execution that the caller replays, or None."""
    origin = await connection.scalar(
        select(col(Execution.replay_of)).where(
            col(Execution.id) == caller.execution_id, col(Execution.resumed_from).is_(None)
        )
    )
    if origin is None:
        return None
    statement: Select[*tuple[Any, ...]] = (
        select(
            *(col(Execution.id), col(Execution.shard), col(Execution.concurrency_key)),
            col(ExecutionData.trigger),
        )
        .join(ExecutionData, col(ExecutionData.execution_id) == col(Execution.id))
        .where(
            col(Execution.id) == ids.derive_id("exec", origin, node_id, iteration),
            col(Execution.organization_id) == caller.organization_id,
            col(Execution.workflow_id) == workflow_id,
            col(Execution.status) == ExecutionStatus.FAILED,
        )
    )
    found: Row[Any] | None = (await connection.execute(statement)).first()
    return found


async def _child_exists(connection: AsyncConnection, caller: RunCaller, child_id: str) -> bool:
    statement = select(col(Execution.id)).where(
        col(Execution.id) == child_id, col(Execution.organization_id) == caller.organization_id
    )
    return await connection.scalar(statement) is not None


async def _read_parent(connection: AsyncConnection, caller: RunCaller) -> ParentRun:
    statement = select(
        *(col(Execution.shard), col(Execution.root_id), col(Execution.depth), col(Execution.is_private)),
        *(col(Execution.is_tainted), col(Execution.token), col(Execution.trace_origin)),
    ).where(col(Execution.id) == caller.execution_id)
    row = (await connection.execute(statement)).one()
    shard, root_id, depth, is_private, is_tainted, token, origin = row
    own = run_origin.origin_of_child(caller.execution_id, token, origin)
    return ParentRun(
        shard, root_id or caller.execution_id, depth, is_private, is_tainted=is_tainted, origin_of_child=own
    )


async def _read_caller(connection: AsyncConnection, caller: RunCaller, shard: int) -> access.ApiCaller:
    """Return the user of the run as an API caller without a key or scopes; the role decides which workflows
    are readable.

    A deleted user counts as a member.
    """
    statement = select(col(User.role)).where(
        col(User.id) == caller.user_id, col(User.organization_id) == caller.organization_id
    )
    role = UserRole(await connection.scalar(statement) or UserRole.MEMBER)
    return access.ApiCaller("", caller.user_id, caller.organization_id, shard, role, frozenset())


def _build_change_error(workflow_id: str) -> NodeError:
    return NodeError(f"The workflow {workflow_id} is being changed", code="workflow-changed", retryable=True)


def _require_runnable(workflow: LoadedWorkflow) -> None:
    if workflow.status not in _RUNNABLE_STATUSES:
        message = f"The workflow {workflow.id} is {workflow.status}: set it to active to run it"
        raise NodeError(message, code=f"workflow-{workflow.status}")
    if not workflow.validation.is_valid:
        found = "; ".join(finding.message for finding in workflow.validation.errors[:SHOWN_FINDINGS])
        raise NodeError(f"The workflow {workflow.id} can't run: {found}", code="invalid-definition")
