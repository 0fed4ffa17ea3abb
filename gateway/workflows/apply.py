"""Endpoint that makes workflows equal to files: planned by the server, in one transaction, all or nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, assert_never

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from gateway.deployments import deployment_changes
from gateway.http import errors, limits
from gateway.http.errors import ApiError
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, decode_body
from gateway.workflows import (
    applied_rows,
    apply_plan,
    editing,
    finding_shapes,
    validation,
    workflow_builder,
    workflow_rows,
)
from gateway.workflows.apply_plan import (
    CONFLICT_TEXTS,
    ApplyAction,
    ConflictReason,
    PlannedChange,
    WantedWorkflow,
)
from gateway.workflows.finding_shapes import FindingShape
from gateway.workflows.graph_difference import ItemsDifference, ValueChange
from journal.deployments import desired_state
from models.audit import AuditAction
from models.lifecycle_policy import StoppedReason
from models.workflow import WorkflowStatus

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from gateway.workflows.editing import WorkflowEdit, WorkflowEditor
    from gateway.workflows.stored_workflow import StoredWorkflow
    from models.access import ApiCaller
    from models.database import Database
    from nodes.catalog import NodeCatalog


class ApplyWorkflows(StrictWire):
    """Workflows as files describe them. Names identify them; fields that are absent get their defaults."""

    workflows: Annotated[list[dict[str, Any]], Meta(max_length=limits.APPLIED_WORKFLOWS)]
    """Each as in `POST /workflows/build`, or an exported document; `status` may be any.

    A field of a config that names a data source accepts `@` and its name in place of its id.
    """
    set: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=64,
                pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*$",
                description="a letter or digit, then letters, digits, `_`, `.` and `-`",
            ),
        ]
        | None
    ) = None
    """Name of the set to which these workflows belong."""
    prune: Literal["archive", "delete"] | None = None
    """Treatment of members of the set that the request does not have; by default, they stay."""
    dry_run: bool = False
    """Only report the plan."""
    force: bool = False
    """Change workflows in spite of conflicts: edited since they were applied, never applied, or of another set."""
    strict: bool = False
    """Refuse workflows with warnings."""


class WorkflowDiff(WireStruct):
    """Differences between a workflow now and as the request describes it."""

    fields: Mapping[str, ValueChange]
    nodes: ItemsDifference
    connections: ItemsDifference


class AppliedChange(WireStruct):
    """Change of one workflow."""

    name: str
    action: ApplyAction
    workflow_id: str | None
    """Null for a workflow that a dry run would create."""
    conflict: ConflictReason | None
    """Reason why it is not changed without `force`; null without a conflict."""
    set: str | None
    """Set to which the workflow belongs."""
    warnings: Sequence[FindingShape]
    """Warnings about the workflow as the request describes it, as `POST /workflows/{id}/validate` has them."""
    diff: WorkflowDiff | UnsetType = UNSET
    """Absent where nothing changes, and for new workflows."""


class ApplyResult(WireStruct):
    """Plan of the request, carried out unless it was a dry run."""

    dry_run: bool
    changes: Sequence[AppliedChange]
    counts: Mapping[str, int]
    """Number of workflows by action."""


async def apply(request: GatewayRequest) -> JsonResponse:
    """Create, change and archive workflows so that they equal the given ones, all of them or none.

    The server plans the changes in the transaction that carries them out. Names identify the workflows. A workflow with
    other content that was never applied, or was edited since it was applied, is a conflict, and so is one that belongs
    to another set: 409 `apply-conflict` with an entry for each. `dryRun` shows the differences and conflicts with 200,
    `force` applies anyway. `strict` refuses warnings, also in a dry run. Repeating a request changes nothing.
    """
    body = await decode_body(request, ApplyWorkflows)
    if body.prune is not None and body.set is None:
        message = "prune needs a set: only members of a set are removed"
        raise errors.invalid([errors.problem("set", "required", message)])
    gateway = request.gateway
    apply_run = _ApplyRun(gateway.workflow_editor, gateway.database, request.caller, body)
    changes = await apply_run.run()
    if not body.dry_run:
        for one in changes:
            if one.before is not None and one.action in {
                ApplyAction.ARCHIVE,
                ApplyAction.DELETE,
                ApplyAction.UPDATE,
            }:
                await gateway.deployer.notify(one.before.workflow.id)
    counts = Counter(one.action.value for one in changes)
    shown = await asyncio.to_thread(lambda: [_shown(one, is_dry_run=body.dry_run) for one in changes])
    return JsonResponse(ApplyResult(dry_run=body.dry_run, changes=shown, counts=dict(counts)))


def _shown(change: PlannedChange, *, is_dry_run: bool) -> AppliedChange:
    """Return a planned change as the API shows it, with its differences; a new workflow has no id in a dry run."""
    before, after = change.before, change.after
    is_new = before is None
    shown = before or (None if is_dry_run else after)
    has_diff = before is not None and after is not None and after is not before
    return AppliedChange(
        name=change.name,
        action=change.action,
        workflow_id=None if shown is None or (is_new and is_dry_run) else shown.workflow.id,
        conflict=change.conflict,
        set=change.set_name or None,
        warnings=finding_shapes.show_findings(change.warnings[: limits.FINDINGS]),
        diff=WorkflowDiff(**apply_plan.compare(before, after)) if has_diff and before and after else UNSET,
    )


class _ApplyRun(Struct, frozen=True):
    """One run of `apply`: the plan, and its changes in one transaction."""

    editor: WorkflowEditor
    database: Database
    caller: ApiCaller
    body: ApplyWorkflows

    async def run(self) -> Sequence[PlannedChange]:
        """Return the plan, carried out in one transaction unless it is a dry run.

        Raises a 409 error for ambiguous names, 422 for invalid workflows and, if `strict`, for warnings, and 403 for
        workflows of others. Unless it is
        a dry run, which has conflicts in its plan, also 409 for conflicts, and for the deletion of a workflow that is
        deployed or has executions that have not ended.
        """
        return await self.database.transaction(self._work, locks=f"apply:{self.caller.organization_id}")

    async def _work(self, connection: AsyncConnection) -> Sequence[PlannedChange]:
        """Plan the changes in the open transaction and, unless it is a dry run, carry them out."""
        await applied_rows.lock_organization(connection, self.caller.organization_id)
        names = apply_plan.source_names(self.body.workflows)
        sources = await applied_rows.data_source_ids(connection, self.caller, names) if names else {}
        catalog = await self.editor.read_catalog(connection, self.caller.organization_id)
        now = self.database.clock.now()
        # A thread, so that large graphs do not block other requests.
        wanted = await asyncio.to_thread(
            apply_plan.read_workflows, self.caller, self.body.workflows, sources, catalog, now
        )
        planned = await self._plan(connection, wanted)
        if not self.body.dry_run:
            self._require_no_conflicts(planned)
        changes = [await self._with_warnings(connection, change, catalog, now) for change in planned]
        if self.body.strict:
            self._require_no_warnings(changes)
        if not self.body.dry_run:
            for change in changes:
                await self._carry_out(connection, change)
        return changes

    async def _plan(
        self, connection: AsyncConnection, wanted: Sequence[WantedWorkflow]
    ) -> Sequence[PlannedChange]:
        """Return the change of each workflow of the request and, if it prunes, of each other member of the set; store
        nothing.

        Raises a 409 error for an ambiguous name, and 403 for a change to a workflow of another user.
        """
        set_name, is_forced = self.body.set or "", self.body.force
        named = await applied_rows.find_named(connection, self.caller, [one.name for one in wanted])
        members: Sequence[StoredWorkflow] = ()
        if self.body.prune is not None:
            found = await applied_rows.find_members(connection, self.caller, set_name)
            members = [one for one in found if one.workflow.name not in {one.name for one in wanted}]
        ids = [one.workflow.id for several in (*named.values(), members) for one in several]
        applied = await applied_rows.find_apply_records(connection, ids)
        pairs = [(one, self._only(one, named.get(one.name, ()))) for one in wanted]

        def plan() -> list[PlannedChange]:
            kept = [
                apply_plan.plan_change(
                    one,
                    before,
                    None if before is None else applied.get(before.workflow.id),
                    set_name,
                    is_forced=is_forced,
                )
                for one, before in pairs
            ]
            is_deleted = self.body.prune == "delete"
            removed = [
                apply_plan.plan_removal(
                    one, applied[one.workflow.id], is_deleted=is_deleted, is_forced=is_forced
                )
                for one in members
            ]
            return [*kept, *removed]

        changes = await asyncio.to_thread(plan)
        for change in changes:
            if change.before is not None and change.action is not ApplyAction.UNCHANGED:
                editing.require_writer(self.caller, change.before.workflow)
        return changes

    def _only(self, wanted: WantedWorkflow, found: Sequence[StoredWorkflow]) -> StoredWorkflow | None:
        """Return the only one of the found workflows, None for none; raises a 409 error if several have the name."""
        if len(found) > 1:
            ids = ", ".join(one.workflow.id for one in found[:5])
            message = f"{len(found)} workflows have the name {wanted.name!r}: {ids}"
            path = f"workflows.{wanted.place}.name"
            raise errors.conflict(
                "apply-conflict", message, details=[errors.problem(path, "ambiguous-name", message)]
            )
        return found[0] if found else None

    def _require_no_conflicts(self, changes: Sequence[PlannedChange]) -> None:
        """Raise a 409 error with an entry for each conflict in the plan."""
        found = [_problem(one) for one in changes if one.action is ApplyAction.CONFLICT]
        if found:
            message = (
                f"{len(found)} workflows were changed elsewhere, and nothing was applied:"
                " `dryRun` shows the differences, `force` applies anyway"
            )
            raise errors.conflict("apply-conflict", message, details=found[: limits.FINDINGS])

    async def _with_warnings(
        self, connection: AsyncConnection, change: PlannedChange, catalog: NodeCatalog, now: datetime
    ) -> PlannedChange:
        """Return the change of a workflow of the request with the warnings of its validation."""
        if change.place is None or change.after is None:
            return change
        inputs = await validation.read_inputs(connection, self.caller, change.after, catalog, now)
        result = await asyncio.to_thread(validation.check_graph, inputs)
        return replace(change, warnings=result.warnings)

    def _require_no_warnings(self, changes: Sequence[PlannedChange]) -> None:
        """Raise a 422 error with an entry for each warning."""
        details = [
            apply_plan.locate_problem(finding, change.place, change.name)
            for change in changes
            if change.place is not None and change.after is not None
            for finding in workflow_builder.locate_findings(change.warnings, change.after)
        ]
        if details:
            message = (
                f"{len(details):,} warnings, and nothing was applied: correct them, or leave out `strict`"
            )
            raise ApiError(422, "validation-failed", message, details=details[: limits.FINDINGS])

    async def _carry_out(self, connection: AsyncConnection, change: PlannedChange) -> None:
        """Store one planned change with its audit entry; for a workflow of the request, also the record of its `apply`.

        A workflow that does not change gets the record too.
        """
        after = change.after
        assert after is not None  # noqa: S101 - every planned change has one
        match change.action:
            case ApplyAction.CREATE:
                await self.editor.create_in(connection, self.caller, after, AuditAction.WORKFLOW_CREATED)
            case ApplyAction.UPDATE | ApplyAction.ARCHIVE:
                after = await self._update(connection, change, after)
            case ApplyAction.DELETE:
                await self._delete(connection, after)
                return
            case ApplyAction.UNCHANGED | ApplyAction.CONFLICT:
                pass
            case _:
                assert_never(change.action)
        if change.place is not None:
            await self._store_apply_record(connection, change, after)

    async def _update(
        self, connection: AsyncConnection, change: PlannedChange, after: StoredWorkflow
    ) -> StoredWorkflow:
        """Store an updated or archived workflow and return it; archiving also undeploys it."""
        before = change.before
        assert before is not None  # noqa: S101 - an update has one
        is_archived = after.workflow.status == WorkflowStatus.ARCHIVED != before.workflow.status

        async def undeploy(connection: AsyncConnection, edited: WorkflowEdit) -> None:
            if is_archived:
                await deployment_changes.undeploy_workflow(
                    connection, self.caller, edited.after.workflow.id, reason=StoppedReason.ARCHIVED
                )

        is_status_only = change.action is ApplyAction.ARCHIVE
        action = AuditAction.WORKFLOW_STATUS_SET if is_status_only else AuditAction.WORKFLOW_UPDATED
        edited = await self.editor.change_in(
            connection, self.caller, before, action, lambda _: after, also=undeploy
        )
        return edited.after

    async def _delete(self, connection: AsyncConnection, stored: StoredWorkflow) -> None:
        """Mark a workflow as deleted, and delete the record of its last `apply`.

        Raises a 409 error if it is deployed or has executions that have not ended.
        """
        workflow = stored.workflow
        deployment = await desired_state.find_deployment(connection, workflow.id)
        is_deployed = deployment is not None and deployment.is_deployed
        live = await workflow_rows.list_live_executions(connection, workflow)
        if is_deployed:
            message = f"{workflow.name!r} is deployed, and is not deleted: nothing was applied"
            raise errors.conflict("workflow-deployed", message)
        if live:
            message = f"{len(live)} executions of {workflow.name!r} have not ended: nothing was applied"
            raise errors.conflict("workflow-running", message)
        await self.editor.change_in(
            connection,
            self.caller,
            stored,
            AuditAction.WORKFLOW_DELETED,
            lambda before: before.with_columns(deleted_at=self.database.clock.now()),
        )
        await applied_rows.delete_apply_record(connection, workflow.id)

    async def _store_apply_record(
        self, connection: AsyncConnection, change: PlannedChange, after: StoredWorkflow
    ) -> None:
        """Store the record of the `apply` of a workflow, with the hash by which later edits of it are detected."""
        status = None if change.status is None else change.status.value
        row = applied_rows.build_apply_record(
            self.caller,
            after.workflow.id,
            change.set_name,
            await asyncio.to_thread(apply_plan.hash_content, after),
            status,
            self.database.clock.now(),
        )
        await applied_rows.replace_apply_record(connection, row)


def _problem(change: PlannedChange) -> dict[str, Json]:
    """Return the entry of the 409 error for a conflict: its path in the request, and its reason."""
    assert change.conflict is not None  # noqa: S101 - a conflict has a reason
    path = "set" if change.place is None else f"workflows.{change.place}"
    text = CONFLICT_TEXTS[change.conflict]
    if change.conflict is ConflictReason.OTHER_SET:
        text = f"{text} {change.set_name!r}"
    return errors.problem(path, change.conflict.value, f"{change.name!r} {text}")
