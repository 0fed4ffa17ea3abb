"""Endpoints of the log level of a workflow, which holds for a limited time without a new version or a deploy."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

import msgspec
import structlog

from engine.run_records import LogLevel
from engine.values import fingerprint
from gateway.access import audit_log
from gateway.http import errors
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, optional_instant
from gateway.workflows import editing, workflow_rows
from journal import log_levels
from models.audit import AuditAction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.workflow import WorkflowLogLevel

log = structlog.get_logger()

USUAL_TIME: Final = timedelta(hours=1)
LONGEST_TIME: Final = timedelta(days=1)


class SetLogLevel(StrictWire):
    """Log level of a workflow for a limited time; null ends the present one."""

    read_only: ClassVar[Mapping[str, str]] = {"workflowId": ""}

    level: LogLevel | None
    """Lowest level of logged lines. `debug` adds lines about each node of a run."""
    until: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    """End, at most a day ahead; an hour ahead if absent."""


class LogLevelShape(WireStruct):
    """Log level of a workflow."""

    workflow_id: str
    level: LogLevel | None
    """Null: all lines of nodes are logged."""
    until: Instant | None


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the log level of a workflow, and the time until which it holds."""
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        found = await log_levels.read_log_level(connection, workflow.id)
    return JsonResponse(_show(workflow.id, found))


async def update(request: GatewayRequest) -> JsonResponse:
    """Set the log level of a workflow for an hour, or until a time; null ends the present one.

    Its owner and admins may. It holds within two seconds for runs that start or continue after a wait, in workers and
    in pods.
    """
    body = await decode_body(request, SetLogLevel)
    caller, requested = request.caller, request.requested_object
    now = request.gateway.clock()
    until = None if body.level is None else body.until or now + USUAL_TIME
    if until is not None and not now < until <= now + LONGEST_TIME:
        message = "until must be a time within the next 24 hours"
        raise errors.invalid([errors.problem("until", "out-of-range", message)])

    async def work(connection: AsyncConnection) -> WorkflowLogLevel | None:
        await workflow_rows.lock_workflow(connection, requested.id, caller)
        workflow = await editing.find_readable_row(connection, requested)
        editing.require_writer(caller, workflow)
        before = await log_levels.read_log_level(connection, workflow.id)
        await log_levels.store_log_level(connection, workflow.id, body.level, until)
        after = await log_levels.read_log_level(connection, workflow.id)
        await audit_log.record_change(
            connection,
            caller,
            AuditAction.WORKFLOW_LOG_LEVEL_SET,
            workflow.id,
            before=_hash(before),
            after=_hash(after),
        )
        return after

    stored = await request.gateway.database.transaction(work, locks=requested.id)
    log.info(AuditAction.WORKFLOW_LOG_LEVEL_SET, workflow_id=requested.id, level=body.level)
    return JsonResponse(_show(requested.id, stored))


def _show(workflow_id: str, found: WorkflowLogLevel | None) -> LogLevelShape:
    """Return a log level as the API shows it; both fields are None without one."""
    return LogLevelShape(
        workflow_id=workflow_id,
        level=None if found is None else LogLevel(found.level),
        until=None if found is None else optional_instant(found.until),
    )


def _hash(found: WorkflowLogLevel | None) -> str:
    """Return the hash of a log level for the audit trail."""
    return fingerprint([None] if found is None else [found.level, optional_instant(found.until)])
