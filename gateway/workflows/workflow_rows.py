"""Rows of workflows and their triggers, each query within the caller's organization; the revision guards changes."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from msgspec import Struct
from sqlalchemy import (
    Row,
    UnaryExpression,
    bindparam,
    case,
    delete,
    func,
    insert,
    null,
    select,
    tuple_,
    update,
)
from sqlalchemy.sql import operators
from sqlmodel import col

from gateway.http import errors, keyset
from gateway.http.keyset import ListPage
from gateway.workflows import schedule_rows, stored_workflow
from gateway.workflows.stored_workflow import StoredWorkflow
from journal import definition_snapshot, held_runs
from journal.store import ExecutionKey
from models import ids
from models.column_types import build_row, column_values
from models.custom_node_type import CustomNodeType
from models.execution import Execution, ExecutionData
from models.execution_status import TERMINAL_STATUSES
from models.workflow import (
    Workflow,
    WorkflowGraph,
    WorkflowShare,
    WorkflowStatus,
    WorkflowTag,
    WorkflowVersion,
    is_listed_for,
    is_open_to,
    is_readable_by,
    is_writable_by,
)
from models.workflow_triggers import TriggerKind, WorkflowTrigger, WorkflowTriggerMatch, parse_patterns

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from gateway.http.keyset import KeysetBounds
    from gateway.http.parameters import PageBounds
    from gateway.workflows.stored_workflow import StoredNode
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog

FIRST_VERSION = 1
FIRST_VERSION_TAG = "v1.0.0"
FIRST_VERSION_DESCRIPTION = "Initial version"
SORTABLE: Mapping[str, SQLColumnExpression[Any]] = {
    "createdAt": col(Workflow.created_at),
    "updatedAt": col(Workflow.updated_at),
    "name": col(Workflow.name),
    "status": col(Workflow.status),
    "version": col(Workflow.version),
}
LISTED: Sequence[SQLColumnExpression[Any]] = (
    col(Workflow.id),
    col(Workflow.name),
    col(Workflow.description),
    col(Workflow.status),
    col(Workflow.version),
    col(Workflow.tags),
    col(Workflow.organization_id),
    col(Workflow.owner_id),
    col(Workflow.is_public),
    col(Workflow.is_template),
    col(Workflow.created_at),
    col(Workflow.updated_at),
)
"""Columns of a workflow in a list."""
Listed: TypeAlias = Row[*tuple[Any, ...]]
"""Row with these columns alone, as attributes."""


async def lock_workflow(connection: AsyncConnection, workflow_id: str, caller: ApiCaller) -> None:
    """Lock a workflow of the caller's organization against other changes until the transaction ends; no
    effect if it is missing.

    A separate statement: PostgreSQL may read rows together with a lock that are older than the lock. SQLite
    serializes transactions anyway.
    """
    values = {"workflow_id": workflow_id, "organization_id": caller.organization_id}
    await connection.execute(_select_for_update(), values)


@cache
def _select_for_update() -> Select[*tuple[Any, ...]]:
    """Return the statement that locks a workflow, for all calls: each change of a workflow executes it."""
    return (
        select(col(Workflow.id))
        .where(
            col(Workflow.id) == bindparam("workflow_id"),
            col(Workflow.organization_id) == bindparam("organization_id"),
        )
        .with_for_update()
    )


async def is_readable(connection: AsyncConnection, workflow_id: str, caller: ApiCaller) -> bool:
    """Return whether a workflow exists and the caller may read it."""
    statement = select(col(Workflow.id)).where(col(Workflow.id) == workflow_id, is_readable_by(caller))
    return await connection.scalar(statement) is not None


async def find_workflow(
    connection: AsyncConnection, workflow_id: str, caller: ApiCaller
) -> StoredWorkflow | None:
    """Return a workflow with its graph and shares; None if it is missing or the caller may not read it."""
    row = (
        (
            await connection.execute(
                select(Workflow, col(WorkflowGraph.nodes), col(WorkflowGraph.connections))
                .join(WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id))
                .where(col(Workflow.id) == workflow_id, is_readable_by(caller))
            )
        )
        .mappings()
        .first()
    )
    if row is None:
        return None
    shares = (
        select(col(WorkflowShare.user_id), col(WorkflowShare.shared_at))
        .where(col(WorkflowShare.workflow_id) == workflow_id)
        .order_by(col(WorkflowShare.shared_at), col(WorkflowShare.user_id))
    )
    shared_with = {share.user_id: share.shared_at for share in await connection.execute(shares)}
    return _build_workflow(row, shared_with)


async def find_workflow_row(
    connection: AsyncConnection, workflow_id: str, caller: ApiCaller
) -> Workflow | None:
    """Return a workflow without its graph and shares; None if it is missing or the caller may not read it."""
    statement = select(Workflow).where(col(Workflow.id) == workflow_id, is_readable_by(caller))
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else build_row(Workflow, stored_workflow.move_foreign_settings({**row}))


async def find_readable_ids(
    connection: AsyncConnection, workflow_ids: Collection[str], caller: ApiCaller
) -> frozenset[str]:
    """Return those of the ids that are workflows which the caller may read."""
    statement = select(col(Workflow.id)).where(col(Workflow.id).in_(workflow_ids), is_readable_by(caller))
    return frozenset(await connection.scalars(statement))


def _build_workflow(row: Mapping[Any, Any], shared_with: Mapping[str, datetime]) -> StoredWorkflow:
    """Return a workflow from its row joined with that of its graph; `shared_with` has the time of each share by user
    id.
    """
    fields = stored_workflow.move_foreign_settings(row)
    nodes, connections = fields.pop("nodes"), fields.pop("connections")
    return StoredWorkflow(build_row(Workflow, fields), nodes, connections, shared_with)


class WorkflowFilter(Struct, frozen=True):
    """Filter of a list of workflows."""

    status: WorkflowStatus | None
    tag: str | None
    search: str | None


async def list_workflows(
    connection: AsyncConnection,
    caller: ApiCaller,
    wanted: WorkflowFilter,
    part: PageBounds,
    order: ColumnElement[Any],
) -> ListPage[Listed]:
    """Return the page `part` in `order` of the workflows that the caller may read and that match, with the number of
    all.

    Templates are left out; rows have no graph.
    """
    conditions = list_conditions(caller, wanted)
    sorting = (order, _tie_order(order))
    # Only ids are sorted and skipped: PostgreSQL would sort whole rows, on disk if there are many.
    shown = (
        select(col(Workflow.id), _total_column(wanted).label("total"))
        .where(*conditions)
        .order_by(*sorting)
        .limit(part.limit)
        .offset(part.offset)
        .subquery()
    )
    found = await connection.execute(
        select(*LISTED, shown.c.total).join(shown, shown.c.id == col(Workflow.id)).order_by(*sorting)
    )
    rows = found.all()
    if rows and rows[0].total is not None:
        return ListPage(rows[0].total, rows)
    if len(rows) < part.limit and (rows or part.offset == 0):
        return ListPage(part.offset + len(rows), rows)
    return ListPage(await count_workflows(connection, caller, wanted), rows)


async def list_page(
    connection: AsyncConnection, caller: ApiCaller, wanted: WorkflowFilter, bounds: KeysetBounds
) -> ListPage[Workflow]:
    """Return a page of the workflows that the caller may read and that match, by a cursor, with their number up to
    10,000.

    Templates are left out; rows have only the columns of lists.
    """
    found = await keyset.list_rows(
        connection,
        LISTED,
        list_conditions(caller, wanted),
        bounds,
        created_at=col(Workflow.created_at),
        item_id=col(Workflow.id),
    )
    return found.convert(lambda row: build_row(Workflow, row))


async def count_workflows(connection: AsyncConnection, caller: ApiCaller, wanted: WorkflowFilter) -> int:
    """Return the number of workflows that the caller may read and that match, without templates."""
    statement = select(func.count()).select_from(Workflow).where(*list_conditions(caller, wanted))
    return await connection.scalar(statement) or 0


def _total_column(wanted: WorkflowFilter) -> ColumnElement[Any]:
    """Return a column with the total for a search, which reads every row and should do so once; null without
    a search.

    Without a search, the total is counted in an index by another statement, and the page reads only its own
    rows.
    """
    return null() if wanted.search is None else func.count().over()


def _tie_order(order: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the ORDER BY term for equal rows: by id, in the same direction.

    So one index gives the whole order.
    """
    is_descending = isinstance(order, UnaryExpression) and order.modifier is operators.desc_op
    return col(Workflow.id).desc() if is_descending else col(Workflow.id).asc()


def list_conditions(caller: ApiCaller, wanted: WorkflowFilter) -> Sequence[ColumnElement[bool]]:
    """Return the SQL conditions of a list: workflows that the caller may read and that match, without templates."""
    return [is_listed_for(caller), *_build_conditions(caller, wanted)]


def _build_conditions(caller: ApiCaller, wanted: WorkflowFilter) -> Iterable[ColumnElement[bool]]:
    """Yield the SQL conditions of a filter of workflows; fields that are None filter nothing."""
    if wanted.status is not None:
        yield col(Workflow.status) == wanted.status
    if wanted.tag is not None:
        tagged = select(col(WorkflowTag.workflow_id)).where(
            col(WorkflowTag.organization_id) == caller.organization_id, col(WorkflowTag.tag) == wanted.tag
        )
        yield col(Workflow.id).in_(tagged)
    if wanted.search is not None:
        yield col(Workflow.search_text).contains(_fold_text(wanted.search), autoescape=True)


def build_search_text(name: str, description: str) -> str:
    """Return the normalized text of name and description that is stored for the search of lists."""
    return _fold_text(f"{name}\n{description}")


def _fold_text(text: str) -> str:
    """Return a text with case folded and normalized, since databases fold only ASCII."""
    return unicodedata.normalize("NFC", text.casefold())


async def count_by_status(
    connection: AsyncConnection, caller: ApiCaller
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Return the number of workflows in each status, without templates: all of the organization, and those that the
    caller may read.

    A status without workflows is absent from both; if the caller may read none of them, its second number is 0.
    """
    # One pass through the index of statuses alone.
    readable = func.sum(case((is_open_to(caller), 1), else_=0))
    counted = await connection.execute(
        select(col(Workflow.status), func.count().label("total"), readable.label("readable"))
        .where(
            col(Workflow.organization_id) == caller.organization_id,
            col(Workflow.deleted_at).is_(None),
            col(Workflow.is_template).is_(False),
        )
        .group_by(col(Workflow.status))
    )
    rows = counted.all()
    return {row.status: row.total for row in rows}, {row.status: int(row.readable) for row in rows}


async def list_templates(
    connection: AsyncConnection, caller: ApiCaller, part: PageBounds
) -> tuple[int, list[StoredWorkflow]]:
    """Return the number of templates of the caller's organization, and the page `part` of them, the newest first.

    They have their graphs, but no shares.
    """
    conditions = (
        col(Workflow.organization_id) == caller.organization_id,
        col(Workflow.deleted_at).is_(None),
        col(Workflow.is_template).is_(True),
    )
    count = await connection.scalar(select(func.count()).select_from(Workflow).where(*conditions))
    rows = await connection.execute(
        select(Workflow, col(WorkflowGraph.nodes), col(WorkflowGraph.connections))
        .join(WorkflowGraph, col(WorkflowGraph.workflow_id) == col(Workflow.id))
        .where(*conditions)
        .order_by(col(Workflow.created_at).desc(), col(Workflow.id).desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    return count or 0, [_build_workflow(row, shared_with={}) for row in rows.mappings()]


async def is_stored(connection: AsyncConnection, workflow: Workflow) -> bool:
    """Return whether a workflow is stored in exactly this revision and with this time of change."""
    statement = select(col(Workflow.id)).where(
        col(Workflow.id) == workflow.id,
        col(Workflow.revision) == workflow.revision,
        col(Workflow.updated_at) == workflow.updated_at,
    )
    return await connection.scalar(statement) is not None


async def exists(connection: AsyncConnection, workflow_id: str) -> bool:
    """Return whether a workflow exists, deleted or not; visibility is not checked."""
    return (
        await connection.scalar(select(col(Workflow.id)).where(col(Workflow.id) == workflow_id)) is not None
    )


async def lock_custom_types(
    connection: AsyncConnection, organization_id: str, nodes: Sequence[StoredNode], catalog: NodeCatalog
) -> None:
    """Keep the custom types of nodes from being deleted until the end of the transaction.

    Raises a 409 error if one was deleted since `catalog` was read.
    """
    used = {
        (use.type, use.version)
        for use in definition_snapshot.list_custom_types(nodes)
        if use.version is not None
    }
    wanted = {
        (name, version)
        for name, version in used
        if (found := catalog.node_types.get(name)) and version in {found.version, *found.earlier}
    }
    if not wanted:
        return
    statement = (
        select(col(CustomNodeType.type), col(CustomNodeType.version))
        .where(
            col(CustomNodeType.organization_id) == organization_id,
            tuple_(col(CustomNodeType.type), col(CustomNodeType.version)).in_(sorted(wanted)),
        )
        .order_by(col(CustomNodeType.type), col(CustomNodeType.version))
        .with_for_update(read=True)
    )
    if len((await connection.execute(statement)).all()) < len(wanted):
        raise errors.conflict("edit-conflict", "A node type of the workflow is being deleted: try again")


async def add_workflow(connection: AsyncConnection, stored: StoredWorkflow, catalog: NodeCatalog) -> None:
    """Insert a workflow with its graph, triggers, tags and first version in the transaction.

    Raises a 409 error if a custom type is being deleted.
    """
    workflow = stored.workflow
    await lock_custom_types(connection, workflow.organization_id, stored.nodes, catalog)
    graph = WorkflowGraph(
        workflow_id=workflow.id,
        shard=workflow.shard,
        nodes=list(stored.nodes),
        connections=list(stored.connections),
    )
    version = WorkflowVersion(
        workflow_id=workflow.id,
        version=FIRST_VERSION,
        shard=workflow.shard,
        version_tag=FIRST_VERSION_TAG,
        description=FIRST_VERSION_DESCRIPTION,
        snapshot=snapshot(stored),
        created_by=workflow.owner_id,
        created_at=workflow.created_at,
        definition_hash=await hash_definition(stored, catalog),
    )
    # Values beside the statements: within them, SQLAlchemy would build each statement anew, at twice the cost.
    await connection.execute(insert(Workflow), _collect_columns(workflow))
    await connection.execute(insert(WorkflowGraph), column_values(graph))
    await connection.execute(insert(WorkflowVersion), column_values(version))
    await add_triggers(connection, stored, catalog)
    await _add_tags(connection, workflow)


def _collect_columns(workflow: Workflow) -> dict[str, object]:
    """Return the columns of a workflow's row, including those derived for searches."""
    app_id = workflow.config.get("appId")
    is_known = isinstance(app_id, str) and ids.is_id(app_id)
    return {
        **column_values(workflow),
        "search_text": build_search_text(workflow.name, workflow.description),
        "app_id": app_id if is_known else None,
    }


async def save_workflow(
    connection: AsyncConnection,
    before: StoredWorkflow,
    after: StoredWorkflow,
    caller: ApiCaller,
    catalog: NodeCatalog,
) -> bool:
    """Write the differences of two states unless the workflow has changed since `before`; return whether they
    were written.

    Graph, triggers, schedule, tags and shares included. When a workflow is no longer paused, its held runs
    are released. False also if the caller may not write it. Raises a 409 error if a custom type is being
    deleted.
    """
    workflow = after.workflow
    result = await connection.execute(
        update(Workflow)
        .where(
            col(Workflow.id) == workflow.id,
            col(Workflow.revision) == before.workflow.revision,
            is_writable_by(caller),
        )
        .values(_collect_columns(workflow))
    )
    if result.rowcount != 1:
        return False
    changed: dict[str, object] = {}
    if after.nodes is not before.nodes:
        await lock_custom_types(connection, workflow.organization_id, after.nodes, catalog)
        changed["nodes"] = list(after.nodes)
    if after.connections is not before.connections:
        changed["connections"] = list(after.connections)
    if changed:
        await connection.execute(
            update(WorkflowGraph).where(col(WorkflowGraph.workflow_id) == workflow.id).values(changed)
        )
    await save_triggers(connection, before, after, catalog)
    if before.workflow.status == WorkflowStatus.PAUSED != workflow.status:
        await held_runs.release_held_runs(connection, workflow.id)
    if workflow.tags != before.workflow.tags or workflow.deleted_at is not None:
        await connection.execute(
            delete(WorkflowTag).where(
                col(WorkflowTag.organization_id) == workflow.organization_id,
                col(WorkflowTag.tag).in_(before.workflow.tags),
                col(WorkflowTag.workflow_id) == workflow.id,
            )
        )
        if workflow.deleted_at is None:
            await _add_tags(connection, workflow)
    await _save_shares(connection, before, after)
    return True


async def _save_shares(connection: AsyncConnection, before: StoredWorkflow, after: StoredWorkflow) -> None:
    """Insert added shares and delete removed ones."""
    workflow_id = after.workflow.id
    if gone := before.shared_with.keys() - after.shared_with.keys():
        await connection.execute(
            delete(WorkflowShare).where(
                col(WorkflowShare.workflow_id) == workflow_id, col(WorkflowShare.user_id).in_(gone)
            )
        )
    if added := after.shared_with.keys() - before.shared_with.keys():
        shares = [
            {"workflow_id": workflow_id, "user_id": user_id, "shared_at": after.shared_with[user_id]}
            for user_id in added
        ]
        await connection.execute(insert(WorkflowShare), shares)


async def list_live_executions(connection: AsyncConnection, workflow: Workflow) -> list[ExecutionKey]:
    """Return the keys of all of a workflow's runs that have not ended."""
    running = (
        select(col(Execution.id), col(Execution.shard))
        .join(ExecutionData, col(ExecutionData.execution_id) == col(Execution.id))
        .where(
            col(ExecutionData.workflow_id) == workflow.id,
            col(Execution.organization_id) == workflow.organization_id,
            col(Execution.status).not_in(TERMINAL_STATUSES),
        )
    )
    return [ExecutionKey(row.id, row.shard) for row in await connection.execute(running)]


async def _add_tags(connection: AsyncConnection, workflow: Workflow) -> None:
    if workflow.tags:
        tags = [
            {"organization_id": workflow.organization_id, "tag": tag, "workflow_id": workflow.id}
            for tag in workflow.tags
        ]
        await connection.execute(insert(WorkflowTag), tags)


def snapshot(stored: StoredWorkflow) -> dict[str, object]:
    """Return the content of a version: everything that a restore brings back, such as name, graph and settings."""
    workflow = stored.workflow
    return {
        "name": workflow.name,
        "description": workflow.description,
        "nodes": list(stored.nodes),
        "connections": list(stored.connections),
        "settings": workflow.settings,
        "config": workflow.config,
    }


async def hash_definition(stored: StoredWorkflow, catalog: NodeCatalog) -> str:
    """Return the hash of a workflow's definition that its versions and runs store, by which a run is assigned to a
    version.
    """
    # In a thread, so that a large graph does not block other requests.
    return await asyncio.to_thread(
        definition_snapshot.hash_definition,
        stored.nodes,
        stored.connections,
        stored.workflow.settings,
        catalog,
    )


async def add_triggers(connection: AsyncConnection, stored: StoredWorkflow, catalog: NodeCatalog) -> None:
    """Insert the trigger and schedule rows of a new workflow; only an active one gets a schedule."""
    workflow = stored.workflow
    triggers = _build_triggers(workflow, stored.nodes, catalog)
    await _insert_triggers(connection, triggers)
    if workflow.status == WorkflowStatus.ACTIVE:
        await schedule_rows.save_schedule(connection, workflow, _find_schedule_trigger(triggers))


async def save_triggers(
    connection: AsyncConnection, before: StoredWorkflow, after: StoredWorkflow, catalog: NodeCatalog
) -> None:
    """Replace the trigger and schedule rows of a workflow if a change concerns them; those of a deleted
    workflow are deleted.
    """
    workflow = after.workflow
    were = _build_triggers(before.workflow, before.nodes, catalog)
    are = _build_triggers(workflow, after.nodes, catalog) if workflow.deleted_at is None else []
    is_alike = list(map(_collect_content, were)) == list(map(_collect_content, are))
    if not is_alike or workflow.deleted_at is not None:
        for table in (WorkflowTriggerMatch, WorkflowTrigger):
            await connection.execute(delete(table).where(col(table.workflow_id) == workflow.id))
        await _insert_triggers(connection, are)
    had, has = _find_schedule_trigger(were), _find_schedule_trigger(are)
    if (had or has) and not (is_alike and _summarize_status(before.workflow) == _summarize_status(workflow)):
        await schedule_rows.save_schedule(connection, workflow, has)


async def _insert_triggers(connection: AsyncConnection, triggers: Sequence[WorkflowTrigger]) -> None:
    """Insert trigger rows, and a row for each event pattern of an event trigger."""
    if triggers:
        await connection.execute(insert(WorkflowTrigger), [trigger.model_dump() for trigger in triggers])
    matches = [
        {
            "workflow_id": trigger.workflow_id,
            "node_id": trigger.node_id,
            "pattern": pattern,
            "organization_id": trigger.organization_id,
        }
        for trigger in triggers
        if trigger.kind == TriggerKind.EVENT
        for pattern in parse_patterns(trigger.config)
    ]
    if matches:
        await connection.execute(insert(WorkflowTriggerMatch), matches)


def _build_triggers(
    workflow: Workflow, nodes: Sequence[StoredNode], catalog: NodeCatalog
) -> Sequence[WorkflowTrigger]:
    """Return the trigger rows of a graph, one for each trigger node that inbound requests or times start.

    Of nodes with the same id, which only a draft may have, the last one counts.
    """
    found: dict[str, WorkflowTrigger] = {}
    for node in nodes:
        node_type = catalog.node_types.get(str(node["type"]))
        if node_type is None or node_type.trigger_kind not in set(TriggerKind):
            continue
        found[str(node["id"])] = WorkflowTrigger(
            workflow_id=workflow.id,
            node_id=str(node["id"]),
            organization_id=workflow.organization_id,
            shard=workflow.shard,
            kind=node_type.trigger_kind,
            config=cast("dict[str, Any]", node["config"]),
            revision=workflow.revision,
        )
    return list(found.values())


def _collect_content(trigger: WorkflowTrigger) -> tuple[str, str, dict[str, Any], str]:
    # With the config's text, because 1 equals true in Python.
    return trigger.node_id, trigger.kind, trigger.config, repr(trigger.config)


def _summarize_status(workflow: Workflow) -> tuple[str, bool]:
    return workflow.status, workflow.is_template


def _find_schedule_trigger(triggers: Sequence[WorkflowTrigger]) -> WorkflowTrigger | None:
    """Return the first schedule trigger, of which only a draft may have several; None without one."""
    return next((trigger for trigger in triggers if trigger.kind == TriggerKind.SCHEDULE), None)
