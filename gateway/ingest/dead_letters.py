"""Dead letters: failed runs of inbound requests, until they are redriven or purged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from gateway.access import audit_log
from gateway.executions.execution_shapes import ErrorText
from gateway.http import limits
from gateway.http.parameters import LIMIT, OFFSET, PageBounds
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, decode_body, instant, optional_instant
from gateway.ingest import dead_letter_rows, delivery_rows, redrive_runs
from gateway.ingest.deliveries import summarize_redrive
from gateway.workflows import editing
from journal.store import AcceptanceResult, IdempotencyKey
from models.audit import AuditAction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.executions.large_outputs import ShownOutputs
    from gateway.ingest.dead_letter_rows import FailedRun
    from models.execution import Execution
    from models.workflow import Workflow

LISTED: Final = (LIMIT, OFFSET)


class DeadLetter(WireStruct):
    """Failed run of an inbound request."""

    execution_id: str
    trigger_type: str
    given: msgspec.Raw | None
    """Output of the trigger; null if it is too large for a list. The execution has it.

    A webhook body over 256 kB is `{"$blob": …, "omitted": {bytes, reason, message, url}}`.
    """
    error: ErrorText | None
    created_at: Instant
    failed_at: Instant | None


class DeadLetterList(WireStruct):
    """Page of the dead letters, the oldest first; `count` is the number of all."""

    count: int
    limit: int
    offset: int
    dead_letters: Sequence[DeadLetter]


class ChooseDeadLetters(StrictWire):
    """Selection of dead letters: those with the given ids, or the oldest.

    An unknown field is refused, since it might be meant to narrow the selection.
    """

    execution_ids: (
        Annotated[list[str], msgspec.Meta(min_length=1, max_length=limits.REDRIVEN_AT_ONCE)] | None
    ) = None
    """Only these; absent: all. An empty list is refused, since it might be an empty choice."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=limits.REDRIVEN_AT_ONCE)] = limits.REDRIVEN_AT_ONCE
    dry_run: bool = False
    """Only count the dead letters, without a change."""


class PurgeResult(WireStruct):
    """Numbers of matching, purged and remaining dead letters."""

    matched: int
    purged: int
    remaining: int


async def index(request: GatewayRequest) -> JsonResponse:
    """List the failed runs of inbound requests of a workflow, neither redriven nor purged, the oldest first."""
    part = request.query.page()
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        count, found = await delivery_rows.list_dead_letters(connection, workflow, part)
        given = await delivery_rows.read_input(connection, [failed.id for failed in found])
    outputs = request.gateway.large_outputs
    shown = [show_dead_letter(failed, given.get(failed.id), outputs.explain(failed.id)) for failed in found]
    return JsonResponse(DeadLetterList(count=count, limit=part.limit, offset=part.offset, dead_letters=shown))


async def redrive(request: GatewayRequest) -> JsonResponse:
    """Run the current workflow again on the input of its dead letters: the named ones, or the oldest.

    Repeated requests run each dead letter once. With `dryRun`, they are only counted.
    """
    body = await decode_body(request, ChooseDeadLetters)
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        count, found = await _choose_dead_letters(connection, workflow, body)

    async def again(execution_id: str, idempotency_key: IdempotencyKey) -> tuple[AcceptanceResult, str]:
        return await request.gateway.redriver.redrive_dead_letter(
            request.caller, found[execution_id], idempotency_key
        )

    done = await redrive_runs.redrive_each(
        request.path_params["id"], [] if body.dry_run else list(found), again
    )
    if not body.dry_run:
        await settle_runs(request, list(found), done)
    return JsonResponse(summarize_redrive(count, done))


async def purge(request: GatewayRequest) -> JsonResponse:
    """Take the chosen dead letters off the list for good, so that none can be redriven; a dry run only counts
    them.

    Their executions stay until their retention ends. Raises 404, and 403 unless the caller may change the
    workflow.
    """
    body = await decode_body(request, ChooseDeadLetters)
    async with request.gateway.database.read() as connection:
        workflow = await editing.find_readable_row(connection, request.requested_object)
        editing.require_writer(request.caller, workflow)
        count, found = await _choose_dead_letters(connection, workflow, body)
    purged = 0 if body.dry_run else len(found)
    if purged:
        await purge_runs(request, list(found.values()), request.path_params["id"])
    return JsonResponse(PurgeResult(matched=count, purged=purged, remaining=count - purged))


async def _choose_dead_letters(
    connection: AsyncConnection, workflow: Workflow, body: ChooseDeadLetters
) -> tuple[int, dict[str, Execution]]:
    """Return the number of dead letters of the workflow that match the body, and by id those that failed first, up to
    its limit.

    Named ids of runs that are no dead letters match nothing, and are left out.
    """
    count, found = await delivery_rows.list_dead_letters(
        connection, workflow, PageBounds(body.limit, 0), body.execution_ids or ()
    )
    return count, {failed.id: failed for failed in found}


async def purge_runs(
    request: GatewayRequest,
    failed: Sequence[Execution | FailedRun],
    about: str,
    changes: Sequence[Mapping[str, str | None]] | None = None,
) -> None:
    """Mark failed runs as purged in one transaction with an audit entry, so that they leave the lists of dead letters.

    `about` is the id of the workflow or organization that the entry is about, and `changes` describe the selection.
    """
    now = request.gateway.clock()

    async def settle(connection: AsyncConnection) -> None:
        await dead_letter_rows.mark_purged(connection, failed, now)
        await audit_log.record_change(
            connection,
            request.caller,
            AuditAction.DEAD_LETTERS_PURGED,
            about,
            before=None,
            after=str(len(failed)),
            changes=changes,
        )

    await request.gateway.database.transaction(settle)


async def settle_runs(
    request: GatewayRequest, execution_ids: Sequence[str], done: redrive_runs.RedriveResult
) -> None:
    """Mark the runs of a redrive as settled, except those with an error in `done`; in a transaction of its own."""
    settled = [one for one in execution_ids if one not in done.errors]
    if settled:
        await request.gateway.database.transaction(
            partial(dead_letter_rows.mark_settled, execution_ids=settled, now=request.gateway.clock())
        )


def show_dead_letter(failed: Execution | FailedRun, given: str | None, outputs: ShownOutputs) -> DeadLetter:
    """Return a dead letter, from its run's row or a part of it, as the API shows it.

    `given` is its trigger output as JSON text, None if it is too large for a list; `outputs` are of the same run, and
    show a large webhook body.
    """
    return DeadLetter(
        execution_id=failed.id,
        trigger_type=failed.trigger_type,
        given=None if given is None else outputs.show_trigger(given),
        error=_show_error(failed.error),
        created_at=instant(failed.created_at),
        failed_at=optional_instant(failed.ended_at),
    )


def _show_error(error: Mapping[str, Any] | str | None) -> msgspec.Raw | None:
    """Return a stored error, JSON text or decoded, as JSON for an answer; None without one."""
    if not error:
        return None
    return msgspec.Raw(error.encode() if isinstance(error, str) else msgspec.json.encode(error))
