"""Visibility of a workflow to users besides its owner: shares, and access for the whole organization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar

from msgspec.structs import replace

from gateway.access import shares
from gateway.http import read_only
from gateway.http.errors import ApiError
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import (
    GuardedWire,
    Instant,
    StrictWire,
    WireStruct,
    body_of,
    decode_body,
    instant,
    read_json,
)
from gateway.workflows import editing, workflow_shapes
from models.audit import AuditAction

if TYPE_CHECKING:
    from gateway.workflows.editing import WorkflowEdit
    from gateway.workflows.stored_workflow import StoredWorkflow
    from models.access import ApiCaller


class ShareWith(GuardedWire):
    """User to share a workflow with."""

    user_id: str


class ShareResult(WireStruct):
    """Share of a workflow."""

    message: str
    workflow_id: str
    user_id: str


class WorkflowGuest(WireStruct):
    """User that a workflow is shared with, and the time of the share."""

    user_id: str
    shared_at: Instant


class WorkflowGuests(WireStruct):
    """Users that a workflow is shared with, in the order of their shares."""

    workflow_id: str
    shared_with: Sequence[WorkflowGuest]


class SetVisibility(StrictWire):
    """Visibility of a workflow; absent fields do not change."""

    read_only: ClassVar[Mapping[str, str]] = {
        name: route
        for name, route in workflow_shapes.READ_ONLY.items()
        if name not in {"isPublic", "isTemplate"}
    }

    is_public: bool | None = None
    """True if the whole organization may read and execute it."""
    is_template: bool | None = None
    """True for a template; only admins may change it."""


async def index(request: GatewayRequest) -> JsonResponse:
    """List the users that a workflow is shared with."""
    stored = await request.gateway.workflow_editor.read(request.requested_object)
    guests = [
        WorkflowGuest(user_id=user, shared_at=instant(since)) for user, since in stored.shared_with.items()
    ]
    return editing.answer(stored, WorkflowGuests(workflow_id=stored.workflow.id, shared_with=guests))


async def add(request: GatewayRequest) -> JsonResponse:
    """Share a workflow with a user of the organization. The user may then read and execute it."""
    body = await decode_body(request, ShareWith)
    await _require_user(request, body.user_id)
    now = request.gateway.clock()
    edited = await request.gateway.workflow_editor.edit(
        request.requested_object,
        AuditAction.SHARE_ADDED,
        lambda before: _add_share(before, body.user_id, request.caller, now),
    )
    shared = ShareResult(
        message="Workflow shared successfully", workflow_id=edited.after.workflow.id, user_id=body.user_id
    )
    return editing.answer(edited.after, shared)


async def remove(request: GatewayRequest) -> NoContent:
    """End a share: the user loses access to the workflow and its executions, unless it is public or a template.

    Raises a 404 error without a share.
    """
    user_id = request.path_params["subId"]
    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.SHARE_REMOVED, lambda before: _remove_share(before, user_id)
    )
    _forget_who_may_read(request, edited)
    return NoContent(editing.entity_tag(edited.after.workflow))


async def set_visibility(request: GatewayRequest) -> JsonResponse:
    """Set whether the whole organization may read and execute a workflow; admins also set whether it is a template."""
    value = await read_json(request)
    body = body_of(request, value, SetVisibility)

    def change(before: StoredWorkflow) -> StoredWorkflow:
        read_only.require_same(value, SetVisibility, lambda: workflow_shapes.show_workflow(before))
        return _change_visibility(before, body, request.caller)

    edited = await request.gateway.workflow_editor.edit(
        request.requested_object, AuditAction.WORKFLOW_VISIBILITY_SET, change
    )
    _forget_who_may_read(request, edited)
    return editing.answer(edited.after, workflow_shapes.show_workflow(edited.after))


async def _require_user(request: GatewayRequest, user_id: str) -> None:
    """Raise a 404 error unless the caller may read the workflow, 403 unless it may share it, then 404 unless
    the user exists.
    """
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        editing.require_writer(request.caller, stored.workflow)
        await shares.require_user(connection, user_id, request.caller)


def _add_share(before: StoredWorkflow, user_id: str, caller: ApiCaller, now: datetime) -> StoredWorkflow:
    """Return a workflow with a share for one more user since `now`; unchanged if there is one already.

    Raises a 409 error for more than 1,000, and 422 for the owner or caller.
    """
    shared_with = shares.with_user(
        before.shared_with, user_id, now, what="workflow", owner_id=before.workflow.owner_id, caller=caller
    )
    return replace(before, shared_with=shared_with)


def _remove_share(before: StoredWorkflow, user_id: str) -> StoredWorkflow:
    """Return a workflow without the share of a user; raises a 404 error if there is none."""
    return replace(before, shared_with=shares.without_user(before.shared_with, user_id))


def _change_visibility(before: StoredWorkflow, body: SetVisibility, caller: ApiCaller) -> StoredWorkflow:
    """Return a workflow with the requested visibility; None in the body keeps a field.

    Raises a 403 error if a caller that is no admin changes `isTemplate`.
    """
    workflow = before.workflow
    is_public = workflow.is_public if body.is_public is None else body.is_public
    is_template = workflow.is_template if body.is_template is None else body.is_template
    if is_template != workflow.is_template and not caller.is_admin:
        message = "Only an admin of the organization may change isTemplate"
        raise ApiError(403, "admin-required", message)
    return before.with_columns(is_public=is_public, is_template=is_template)


def _forget_who_may_read(request: GatewayRequest, edited: WorkflowEdit) -> None:
    """Clear this process's caches of the access to a workflow; those of other processes expire within seconds."""
    workflow = edited.after.workflow
    request.gateway.workflows.forget(workflow.organization_id, workflow.id)
    request.gateway.access.forget()
