"""Dead letters of a whole organization: list, redrive, replay and purge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec.structs import replace

from gateway.executions import bulk_replay
from gateway.executions.bulk_actions import ChosenExecutions
from gateway.executions.bulk_replay import BulkReplayOptions
from gateway.executions.replay_planning import CURRENT
from gateway.http import errors, idempotency, limits
from gateway.http.keyset import AFTER, KeysetBounds, PageCursor
from gateway.http.parameters import LIMIT, ChoiceParameter, FlagParameter, TextParameter, TimeParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, decode_body
from gateway.ingest import dead_letter_rows, dead_letters, delivery_rows, redrive_runs
from gateway.ingest.dead_letter_rows import (
    DeadLetterFilter,
    FailedRun,
    SettledRows,
    SettledRun,
)
from gateway.ingest.dead_letter_selection import DeadLetterSelection
from gateway.ingest.dead_letters import DeadLetter, PurgeResult
from gateway.ingest.deliveries import summarize_redrive
from journal.failure_causes import FailureKind
from journal.store import AcceptanceResult
from models import ids
from models.audit import AuditAction
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.access import ApiCaller

WORKFLOW: Final = TextParameter("workflow_id", "Only dead letters of this workflow.")
KIND: Final = TextParameter("trigger_type", "Only dead letters of this kind of trigger, such as `email`.")
GROUP: Final = TextParameter("group", "Only dead letters of this group, by its id.")
SINCE: Final = TimeParameter("since", "Only runs accepted from this time on.")
UNTIL: Final = TimeParameter("until", "Only runs accepted before this time.")
FAILURE: Final = ChoiceParameter("failure", "Only dead letters of this kind of failure.", FailureKind)
OLDEST_FIRST: Final = FlagParameter("oldest_first", "Begin with the oldest instead of the newest.")


class DeadLetterState(StrEnum):
    """State of a dead letter."""

    OPEN = "open"
    """A person has to decide."""
    REDRIVING = "redriving"
    """The run that was started in its place has not ended."""
    SETTLED = "settled"
    """It was purged, or the run in its place has ended: a failed one is a dead letter of its own."""


STATE: Final = ChoiceParameter("state", "Dead letters in this state; default: `open`.", DeadLetterState)
LISTED: Final = (WORKFLOW, KIND, GROUP, FAILURE, STATE, SINCE, UNTIL, OLDEST_FIRST, LIMIT, AFTER)
FIRST_PAGE: Final = PageCursor()


class OrganizationDeadLetter(DeadLetter, kw_only=True):
    """Dead letter in a list of the whole organization."""

    workflow_id: str
    workflow_name: str
    group: str
    """Id of the group of dead letters with the same cause."""
    failure: FailureKind
    state: DeadLetterState
    successor_id: str | None
    """Run that was started in its place; null for an open or purged one."""
    successor_status: ExecutionStatus | None
    completed_nodes: int
    total_nodes: int


class OrganizationDeadLetterList(WireStruct):
    """Page of the dead letters of the organization.

    A page may be shorter than `limit` although another follows: one request examines at most 2,000 failed runs.
    """

    limit: int
    next: str | None
    """Cursor of the next page; null on the last page."""
    dead_letters: Sequence[OrganizationDeadLetter]


class SelectDeadLetters(StrictWire):
    """Selection of dead letters of an organization, the oldest first.

    An unknown field is refused, since it might be meant to narrow the selection.
    """

    filter: DeadLetterSelection
    limit: Annotated[int, msgspec.Meta(ge=1, le=limits.REDRIVEN_AT_ONCE)] = limits.REDRIVEN_AT_ONCE
    dry_run: bool = False
    """Only count the dead letters, without a change."""


class ReplayDeadLetters(BulkReplayOptions, kw_only=True):
    """Selection of dead letters to replay, the oldest first, with the choices for each of them."""

    filter: DeadLetterSelection
    definition: Literal["original", "current"] = CURRENT


async def index(request: GatewayRequest) -> JsonResponse:
    """List the failed runs of inbound requests of the organization that are neither redriven nor purged.

    With `state`, those that are redriven now, or settled. Members see those of workflows that they may read.
    """
    query = request.query
    wanted = DeadLetterFilter(
        workflow_id=query[WORKFLOW],
        trigger_type=query[KIND],
        group=query[GROUP],
        failure=query[FAILURE],
        since=query[SINCE],
        until=query[UNTIL],
    )
    cursor, is_descending = query[AFTER] or FIRST_PAGE, not query[OLDEST_FIRST]
    if cursor.is_descending not in {None, is_descending}:
        raise errors.invalid_query(
            AFTER.name, "invalid-cursor", "after must be a cursor of this list in the same order"
        )
    bounds = KeysetBounds(query[LIMIT], is_descending, cursor)
    state = query[STATE] or DeadLetterState.OPEN
    async with request.gateway.database.read() as connection:
        found = await _find_in_state(connection, request.caller, wanted, bounds, state)
        given = await delivery_rows.read_input(connection, [one.failed.id for one in found.rows])
        names = await dead_letter_rows.read_workflow_names(
            connection, [one.failed.workflow_id for one in found.rows]
        )
    last = found.last_examined
    outputs = request.gateway.large_outputs
    shown = [
        OrganizationDeadLetter(
            **msgspec.structs.asdict(
                dead_letters.show_dead_letter(failed, given.get(failed.id), outputs.explain(failed.id))
            ),
            workflow_id=failed.workflow_id,
            workflow_name=names.get(failed.workflow_id, failed.workflow_id),
            group=cause.fingerprint,
            failure=cause.kind,
            state=state,
            successor_id=successor.id if successor else None,
            successor_status=ExecutionStatus(successor.status) if successor else None,
            completed_nodes=failed.completed_nodes,
            total_nodes=failed.total_nodes,
        )
        for one in found.rows
        for failed, successor, cause in [(one.failed, one.successor, one.failed.cause)]
    ]
    next_cursor = None if last is None else bounds.cursor_behind(last.created_at, last.id)
    return JsonResponse(OrganizationDeadLetterList(limit=bounds.limit, next=next_cursor, dead_letters=shown))


async def _find_in_state(
    connection: AsyncConnection,
    caller: ApiCaller,
    wanted: DeadLetterFilter,
    bounds: KeysetBounds,
    state: DeadLetterState,
) -> SettledRows:
    """Return a page of the dead letters in a state, each with its successor: None for open and purged ones, and if it
    is no longer kept.
    """
    examined = limits.EXAMINED_DEAD_LETTERS
    if state is not DeadLetterState.OPEN:
        is_live = state is DeadLetterState.REDRIVING
        return await dead_letter_rows.find_settled(
            connection, caller, wanted, bounds, is_live=is_live, examined=examined
        )
    found = await dead_letter_rows.find_dead_letters(connection, caller, wanted, bounds, examined=examined)
    return SettledRows([SettledRun(failed, None) for failed in found.rows], found.last_examined)


async def redrive(request: GatewayRequest) -> JsonResponse:
    """Run the current workflows again on the input of the organization's dead letters, the oldest first.

    At most 1,000 are redriven at a time, of the oldest 100,000 failed runs; `remaining` counts all others. Repeated
    requests run each dead letter once.
    """
    body = await decode_body(request, SelectDeadLetters)
    matched, chosen = await _choose(request, body, body.filter.to_filter())
    found = {failed.id: failed for failed in chosen}

    async def again(execution_id: str) -> AcceptanceResult:
        failed = found[execution_id]
        key = idempotency.redrive_key(failed.workflow_id, execution_id)
        accepted, _ = await request.gateway.redriver.redrive_dead_letter(request.caller, failed, key)
        return accepted

    if found and not body.dry_run:
        await redrive_runs.record_redrive(
            request.gateway.database,
            request.caller,
            AuditAction.DEAD_LETTERS_REDRIVEN,
            _name_subject(request, body),
            list(found),
            body.filter,
        )
    done = await redrive_runs.redrive_all([] if body.dry_run else list(found), again)
    if not body.dry_run:
        await dead_letters.settle_runs(request, list(found), done)
    return JsonResponse(summarize_redrive(matched, done))


async def replay(request: GatewayRequest) -> JsonResponse:
    """Replay the organization's dead letters, the oldest first: results are reused up to the node that failed.

    At most 200 at a time; `remaining` counts all others. With `dryRun`, they are only
    planned. One whose plan needs a confirmation that `confirm` does not give is listed in `refused`, and stays.
    """
    body = await decode_body(request, ReplayDeadLetters)
    matched, failed = await _choose(request, body, body.filter.to_filter())
    chosen = ChosenExecutions(ids.new_id("bulk"), matched, [one.id for one in failed])
    if failed and not body.dry_run:
        for workflow_id, runs in Counter(one.workflow_id for one in failed).items():
            await request.gateway.backlog.require_capacity(request.caller.organization_id, workflow_id, runs)
        await redrive_runs.record_redrive(
            request.gateway.database,
            request.caller,
            AuditAction.DEAD_LETTERS_REPLAYED,
            _name_subject(request, body),
            chosen.execution_ids,
            body.filter,
        )
    return JsonResponse(await bulk_replay.replay_all(request, chosen, body))


async def purge(request: GatewayRequest) -> JsonResponse:
    """Take dead letters of the organization off the list for good, so that none can be redriven.

    Only those of workflows that the caller may change are selected: of their own; for an admin, of all. Their
    executions stay until their retention ends.
    """
    body = await decode_body(request, SelectDeadLetters)
    caller = request.caller
    wanted = replace(body.filter.to_filter(), owner_id=None if caller.is_admin else caller.user_id)
    matched, chosen = await _choose(request, body, wanted)
    purged = 0 if body.dry_run else len(chosen)
    if purged:
        changes = redrive_runs.describe_selection(body.filter, len(chosen))
        await dead_letters.purge_runs(request, chosen, _name_subject(request, body), changes)
    return JsonResponse(PurgeResult(matched=matched, purged=purged, remaining=matched - purged))


async def _choose(
    request: GatewayRequest, body: SelectDeadLetters | ReplayDeadLetters, wanted: DeadLetterFilter
) -> tuple[int, Sequence[FailedRun]]:
    """Return the number of dead letters that match and the caller may see, and the oldest of them up to the body's
    limit, among 100,000 failed runs.

    `wanted` is used instead of the body's filter.
    """
    bounds = KeysetBounds(body.limit, is_descending=False, cursor=FIRST_PAGE)
    async with request.gateway.database.read() as connection:
        counts = await dead_letter_rows.count_by_error(connection, request.caller, wanted)
        found = await dead_letter_rows.find_dead_letters(
            connection, request.caller, wanted, bounds, examined=limits.EXAMINED_FOR_REDRIVE
        )
    return sum(row.count for row in counts), found.rows


def _name_subject(request: GatewayRequest, body: SelectDeadLetters | ReplayDeadLetters) -> str:
    """Return the subject of the audit entry: the id of the filter's workflow, or of the organization."""
    return body.filter.workflow_id or request.caller.organization_id
