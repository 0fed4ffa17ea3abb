"""Reads and edits of one workflow: permissions, locks, preconditions, checks of data sources, and audit records.

The data sources of a workflow are checked before it becomes active; otherwise senders would be refused because of the
owner's mistake. No server is contacted: the test of a data source does that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from engine.config_places import list_references
from engine.graph import ParsedGraph
from gateway.access import audit_log
from gateway.http import errors, idempotency, preconditions
from gateway.http.responses import JsonResponse
from gateway.workflows import graph_shapes, workflow_documents, workflow_rows
from gateway.workflows.stored_workflow import StoredWorkflow
from journal import definition_snapshot
from journal.definition_snapshot import build_definition
from models import lifecycle_policy
from models.audit import AuditAction
from models.column_types import build_row, column_values
from models.data_source import DataSource, decrypt_secrets, is_usable_by
from models.encryption import VaultError
from models.workflow import Workflow, WorkflowStatus

if TYPE_CHECKING:
    from collections.abc import Collection

    from engine.config_places import ResourceReference
    from engine.node_lookup import NodeTypeLookup
    from engine.values import Json
    from execution.organization_catalogs import OrganizationCatalogs
    from gateway.http.preconditions import RequestedObject
    from journal.store import IdempotencyKey
    from models.access import ApiCaller
    from models.database import Database
    from models.encryption import SecretVault
    from nodes.catalog import NodeCatalog

log = structlog.get_logger()

_AUDITED_COLUMNS: Final[Mapping[str, str]] = {
    **{name: name for name in ("name", "description", "status", "version", "tags", "settings", "config")},
    "isPublic": "is_public",
    "isTemplate": "is_template",
}
"""Columns whose changes the audit trail has, by the names that the API gives them."""
_SHOWN_FIELDS: Final = frozenset(
    {"name", "status", "version", "tags", "isPublic", "isTemplate", "sharedWith", "lifecyclePolicy"}
)
"""Fields whose values it has too: all others may contain credentials."""
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class WorkflowEdit(Struct, frozen=True):
    """Workflow before and after an edit; the same object twice if the edit changed nothing."""

    before: StoredWorkflow
    after: StoredWorkflow


class _AppliedEdit(Struct, frozen=True):
    """Workflow after a change, with the content hashes before and after."""

    after: StoredWorkflow
    hash_before: str
    hash_after: str
    changes: Sequence[Mapping[str, str | None]] = ()
    """Changes by path, for the audit trail."""
    named_sources: Sequence[ResourceReference] = ()
    """Data sources that the owner of the workflow must be able to use."""


Change: TypeAlias = Callable[[StoredWorkflow], StoredWorkflow]
"""Returns the changed workflow; raises `ApiError`. It may be called again and must have no side effects."""
Addition: TypeAlias = Callable[[AsyncConnection, WorkflowEdit], Awaitable[None]]
"""Writes rows beyond the workflow's own in the transaction of the edit."""


async def find_readable(connection: AsyncConnection, requested: RequestedObject) -> StoredWorkflow:
    """Return the requested workflow with its graph and shares; raises a 404 error if it is missing or the
    caller may not read it.
    """
    stored = await workflow_rows.find_workflow(connection, requested.id, requested.caller)
    if stored is None:
        raise errors.not_found("workflow")
    return stored


async def find_readable_row(connection: AsyncConnection, requested: RequestedObject) -> Workflow:
    """Return the row of the requested workflow without its graph and shares, which take longer to read.

    Raises a 404 error if it is missing or the caller may not read it.
    """
    workflow = await workflow_rows.find_workflow_row(connection, requested.id, requested.caller)
    if workflow is None:
        raise errors.not_found("workflow")
    return workflow


def require_writer(caller: ApiCaller, workflow: Workflow) -> None:
    """Raise a 403 error unless the caller owns the workflow or is an admin."""
    preconditions.require_owner(caller, workflow.owner_id, what="workflow")


class WorkflowEditor:
    """Reads, edits and creates workflows, each in a transaction with its audit record."""

    def __init__(self, database: Database, catalogs: OrganizationCatalogs, vault: SecretVault) -> None:
        self._database = database
        self._catalogs = catalogs
        self._vault = vault

    async def read(self, requested: RequestedObject) -> StoredWorkflow:
        """Return the requested workflow, read in a transaction of its own.

        Raises a 404 error unless the caller may read it.
        """
        async with self._database.read() as connection:
            return await find_readable(connection, requested)

    async def edit(
        self,
        requested: RequestedObject,
        action: AuditAction,
        change: Change,
        *,
        also: Addition | None = None,
        anyway: Addition | None = None,
    ) -> WorkflowEdit:
        """Apply `change` to the requested workflow after all concurrent edits, and return it before and after.

        Both are the same object if nothing has changed; else revision and audit trail advance. `also` runs in the
        transaction of a change, `anyway` even without one. Raises 404, 403, 412 if `If-Match` names another revision,
        422 if an active workflow would become invalid or name an unusable data source, or a template would have
        credentials, 409 if a custom type of the nodes is deleted at the same time, and the errors of `change`, `also`
        and `anyway`; then nothing is written.
        """
        caller = requested.caller
        done: WorkflowEdit | None = None

        async def work(connection: AsyncConnection) -> WorkflowEdit:
            nonlocal done
            await workflow_rows.lock_workflow(connection, requested.id, caller)
            if done is not None and await workflow_rows.is_stored(connection, done.after.workflow):
                # Repeated because the answer to the commit was lost: the change is committed.
                return done
            before = await find_readable(connection, requested)
            require_writer(caller, before.workflow)
            preconditions.require_match(
                requested.if_match, entity_tag(before.workflow)["ETag"], what="workflow"
            )
            edited = await self.change_in(
                connection, caller, before, action, change, also=also, anyway=anyway
            )
            if edited.after is not edited.before:
                done = edited
            return edited

        edited = await self._database.transaction(work, locks=requested.id)
        if edited.after is not edited.before:
            log.info(action, workflow_id=edited.after.workflow.id, revision=edited.after.workflow.revision)
        return edited

    async def change_in(
        self,
        connection: AsyncConnection,
        caller: ApiCaller,
        before: StoredWorkflow,
        action: AuditAction,
        change: Change,
        *,
        also: Addition | None = None,
        anyway: Addition | None = None,
    ) -> WorkflowEdit:
        """Apply `change` to a workflow that the open transaction has locked; return it before and after.

        `also` and `anyway` add statements to the transaction: the first only if the workflow changes, the second
        always. A change gets an audit entry with `action`. Access and `If-Match` must have been checked; raises the
        other errors of `edit`.
        """
        catalog = await self.read_catalog(connection, caller.organization_id)
        # A thread, so that a large graph does not block other requests.
        wanted = await asyncio.to_thread(_apply_change, change, before, catalog)
        if wanted is None:
            same = WorkflowEdit(before, before)
            if anyway is not None:
                await anyway(connection, same)
            return same
        edited = WorkflowEdit(before, await self._save(connection, before, wanted, caller, catalog))
        for addition in (also, anyway):
            if addition is not None:
                await addition(connection, edited)
        await audit_log.record_change(
            connection,
            caller,
            action,
            before.workflow.id,
            before=wanted.hash_before,
            after=None if edited.after.workflow.deleted_at else wanted.hash_after,
            changes=wanted.changes,
        )
        return edited

    async def create_in(
        self, connection: AsyncConnection, caller: ApiCaller, made: StoredWorkflow, action: AuditAction
    ) -> None:
        """Insert a workflow in a transaction, with its audit record; raises a 422 error for unusable data sources, and
        409 if a custom type of its nodes is being deleted.

        Data sources are checked only for an active workflow: each must exist, be usable by the owner, decrypt, and have
        a suitable type.
        """
        catalog = await self.read_catalog(connection, caller.organization_id)
        if made.workflow.status == WorkflowStatus.ACTIVE:
            every = {str(node["id"]) for node in made.nodes}
            named = await asyncio.to_thread(named_sources, made, catalog, only=every)
            await require_usable(connection, made, named, self._vault)
        await workflow_rows.add_workflow(connection, made, catalog)
        await audit_log.record_change(
            connection, caller, action, made.workflow.id, before=None, after=content_hash(made)
        )

    async def read_catalog(self, connection: AsyncConnection, organization_id: str) -> NodeCatalog:
        """Return the shipped node types and the organization's own, as the open transaction sees them."""
        return await self._catalogs.read(connection, organization_id)

    async def _save(
        self,
        connection: AsyncConnection,
        before: StoredWorkflow,
        wanted: _AppliedEdit,
        caller: ApiCaller,
        catalog: NodeCatalog,
    ) -> StoredWorkflow:
        """Store a changed workflow as its next revision, and return it.

        Raises a 409 error for a concurrent edit or deletion of a custom type, and 422 for unusable data sources.
        """
        after = wanted.after.with_columns(
            revision=before.workflow.revision + 1, updated_at=self._database.clock.now()
        )
        if not await workflow_rows.save_workflow(connection, before, after, caller, catalog):
            raise errors.conflict(
                "edit-conflict", "Another request changed this workflow at the same time: try again"
            )
        await require_usable(connection, after, wanted.named_sources, self._vault)
        return after

    async def create(
        self,
        caller: ApiCaller,
        made: StoredWorkflow,
        action: AuditAction,
        idempotency_key: IdempotencyKey | None,
        *,
        shown: Callable[[str], object] = lambda workflow_id: {"workflowId": workflow_id},
    ) -> JsonResponse:
        """Insert a workflow in a transaction of its own, once per idempotency key, and return an answer with 201 and
        `shown(workflow_id)`.

        A repeated key inserts nothing: the answer has the first id, and a header says so; None inserts always. Raises
        the errors of `create_in`, and 422 for a key that was used with another body.
        """
        workflow = made.workflow

        async def insert(connection: AsyncConnection) -> str:
            if idempotency_key is not None:
                bound = await idempotency.reserve_key(
                    connection,
                    idempotency_key,
                    shard=workflow.shard,
                    resource_id=workflow.id,
                    now=workflow.created_at,
                )
                if bound != workflow.id:
                    return bound
            # An earlier attempt may have been committed, though its answer was lost.
            if not await workflow_rows.exists(connection, workflow.id):
                await self.create_in(connection, caller, made, action)
            return workflow.id

        workflow_id = await self._database.transaction(insert)
        if workflow_id != workflow.id:
            return JsonResponse(shown(workflow_id), status=201, headers=idempotency.REPLAYED)
        log.info(action, workflow_id=workflow_id, organization_id=workflow.organization_id)
        return answer(made, shown(workflow_id), status=201)


def answer(stored: StoredWorkflow, value: object, *, status: int = 200) -> JsonResponse:
    """Return a JSON answer with `value`, with the `ETag` of the workflow's revision."""
    return JsonResponse(value, status=status, headers=entity_tag(stored.workflow))


def entity_tag(workflow: Workflow) -> dict[str, str]:
    """Return the `ETag` header of a workflow's revision, for a later `If-Match`."""
    return {"ETag": f'"{workflow.revision}"'}


def content_hash(stored: StoredWorkflow) -> str:
    """Return the SHA-256 of all editable content and shares, in hexadecimal; equal means that an edit changed
    nothing.
    """
    row = column_values(
        stored.workflow,
        exclude={"id", "revision", "app_id", "search_text", "created_at", "updated_at", "deleted_at"},
    )
    content = [row, stored.nodes, stored.connections, sorted(stored.shared_with)]
    # The content was screened on input; screening it again would take longer than the rest of an edit.
    return sha256(_encode_sorted(content)).hexdigest()


def _list_changes(before: StoredWorkflow, after: StoredWorkflow) -> Sequence[Mapping[str, str | None]]:
    """Return the first 20 changed paths of an edit for the audit trail, with values only for fields that can't contain
    credentials.
    """
    contents = [
        {
            **{
                name: msgspec.to_builtins(getattr(stored.workflow, column))
                for name, column in _AUDITED_COLUMNS.items()
            },
            "lifecyclePolicy": lifecycle_policy.effective_policy(stored.workflow.lifecycle),
            "sharedWith": sorted(stored.shared_with),
            "nodes": audit_log.by_id(stored.nodes),
            "connections": audit_log.by_id(stored.connections),
        }
        for stored in (before, after)
    ]
    return audit_log.list_changes(*contents, shown=_SHOWN_FIELDS)


def _apply_change(change: Change, before: StoredWorkflow, catalog: NodeCatalog) -> _AppliedEdit | None:
    """Return the changed workflow with hashes of before and after; None if the change has no effect.

    Large graphs take a while: call it in a thread. Raises a 422 error if an active workflow would become
    invalid, or a template would have credentials, and the errors of `change`.
    """
    after = change(before)
    # In Python, 1 equals true: the hashes are of JSON texts, which differ.
    applied = _AppliedEdit(after, content_hash(before), content_hash(after))
    if applied.hash_after == applied.hash_before and after.workflow.deleted_at is None:
        return None
    applied = replace(applied, changes=_list_changes(before, after))
    to_check = _nodes_to_check(before, after)
    if to_check is not None:
        passed = frozenset(str(node["id"]) for node in after.nodes) - to_check
        graph_shapes.require_valid(
            definition_snapshot.check_graph(after.nodes, after.connections, catalog, passed=passed)
        )
        applied = replace(applied, named_sources=named_sources(after, catalog, only=to_check))
    _require_no_credentials(after)
    return applied


def _require_no_credentials(stored: StoredWorkflow) -> None:
    """Raise a 422 error for credentials in a template, since the whole organization can read it; others may
    have them.
    """
    if not stored.workflow.is_template:
        return
    found = [
        errors.problem(
            removed.path if removed.node_id is None else f"nodes.{removed.node_id}.{removed.path}",
            "inline-secret",
            "The whole organization can read a template: remove this credential, or use save-as-template",
        )
        for removed in workflow_documents.strip_credentials(stored).removed
    ]
    if found:
        raise errors.invalid(found)


def _nodes_to_check(before: StoredWorkflow, after: StoredWorkflow) -> frozenset[str] | None:
    """Return the ids of nodes to check before a workflow becomes active, or stays active with another graph.

    In the latter case these are the changed ones. None if no check is needed.
    """
    if after.workflow.status != WorkflowStatus.ACTIVE:
        return None
    is_same_graph = after.nodes is before.nodes and after.connections is before.connections
    was_active = before.workflow.status == WorkflowStatus.ACTIVE
    if is_same_graph and was_active:
        return None
    every = frozenset(str(node["id"]) for node in after.nodes)
    return every - _find_unchanged_nodes(before, after) if was_active else every


def _find_unchanged_nodes(before: StoredWorkflow, after: StoredWorkflow) -> frozenset[str]:
    """Return the ids of the nodes that an edit has not changed; none if any value changed between 1 and `true`."""
    known = {node["id"]: node for node in before.nodes}
    alike = [(known[node["id"]], node) for node in after.nodes if known.get(node["id"]) == node]
    if _encode_sorted([old for old, _ in alike]) != _encode_sorted([new for _, new in alike]):
        return frozenset()  # 1 has become true in some node, which are equal in Python
    return frozenset(str(node["id"]) for _, node in alike)


def named_sources(
    stored: StoredWorkflow, catalog: NodeTypeLookup, *, only: Collection[str]
) -> Sequence[ResourceReference]:
    """Return a reference for each field of the nodes with ids in `only` that names a data source."""
    nodes = [node for node in stored.nodes if str(node["id"]) in only]
    graph = ParsedGraph.from_stored(build_definition(nodes, [], {}))
    return [one for one in list_references(graph, catalog) if one.kind == "datasources"]


async def require_usable(
    connection: AsyncConnection,
    stored: StoredWorkflow,
    named: Sequence[ResourceReference],
    vault: SecretVault,
) -> None:
    """Raise a 422 error with an entry for each of the named data sources that the workflow can't use.

    Each must exist, be usable by the workflow's owner, decrypt, and have a suitable type.
    """
    if not named:
        return
    owner = stored.workflow
    statement = select(DataSource).where(
        col(DataSource.id).in_({one.id for one in named}), is_usable_by(owner.organization_id, owner.owner_id)
    )
    rows = (await connection.execute(statement)).mappings()
    found = {row["id"]: build_row(DataSource, row) for row in rows}
    problems = [
        problem for one in named if (problem := _find_problem(one, found.get(one.id), vault)) is not None
    ]
    if problems:
        raise errors.invalid(problems)


def _find_problem(
    reference: ResourceReference, source: DataSource | None, vault: SecretVault
) -> dict[str, Json] | None:
    """Return the error for a data source that is missing (None), unsuitable or undecryptable; None if it is usable."""
    path = f"nodes.{reference.node_id}.config.{reference.path}"
    wanted = " or ".join(reference.source_types)
    if source is None:
        message = (
            f"{path} names no data source that the workflow's owner may use: choose one of the type {wanted}"
        )
        return errors.problem(path, "data-source-not-found", message)
    if source.type not in reference.source_types:
        message = (
            f"{path} names a data source of the type {source.type}; the node needs one of the type {wanted}"
        )
        return errors.problem(path, "wrong-data-source", message)
    try:
        decrypt_secrets(vault, source)
    except VaultError:
        message = f"{path} names a data source with secrets that can't be decrypted: set them again"
        return errors.problem(path, "data-source-unreadable", message)
    return None
