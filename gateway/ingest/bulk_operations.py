"""Bulk operations: acts on many dead letters or executions, which the server performs by itself at a pace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta
from sqlmodel import col

from gateway.executions.bulk_filter import BulkFilter
from gateway.executions.replay import NodeIds
from gateway.executions.replay_planning import CURRENT, ORIGINAL
from gateway.http import errors, idempotency, keyset, limits
from gateway.http.keyset import AFTER
from gateway.http.parameters import LIMIT, FlagParameter
from gateway.http.request import GatewayRequest
from gateway.http.request_origin import current_origin
from gateway.http.responses import JsonResponse
from gateway.http.wire import (
    Instant,
    StrictWire,
    WireStruct,
    body_of,
    decode_body,
    instant,
    optional_instant,
    read_json,
)
from gateway.ingest.dead_letter_selection import DeadLetterSelection
from models import bulk_operation, ids
from models.bulk_operation import BulkAction, BulkOperation, BulkStatus
from models.column_types import build_row
from models.database_time import read_database_time

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.http.keyset import KeysetBounds, ListPage
    from journal.store import IdempotencyKey
    from models.access import ApiCaller

PREFIX: Final = "bulk"
DEFAULT_PER_SECOND: Final = 10
Pace = Annotated[int, Meta(ge=1, le=limits.BULK_PER_SECOND)]
OPEN: Final = FlagParameter("open", "Only operations that have not ended.")
LISTED: Final = (OPEN, LIMIT, AFTER)


class DeadLetterAct(StrEnum):
    """Act on dead letters."""

    REDRIVE = "redrive"
    """Run the present workflow again on the input."""
    REPLAY = "replay"
    """Reuse results up to the node that failed."""
    PURGE = "purge"
    """Take them off the list for good."""


class ExecutionAct(StrEnum):
    """Act on executions."""

    CANCEL = "cancel"
    RETRY = "retry"
    """Resume failed ones, with the definition that they had."""
    REPLAY = "replay"


class BulkOperationRequest(StrictWire, kw_only=True):
    """Pace and confirmation of a bulk operation."""

    count: Annotated[int, Meta(ge=1, le=limits.BULK_OBJECTS)]
    """Number of objects that you expect the filter to select. Of more, the oldest are taken; fewer are refused."""
    per_second: Pace = DEFAULT_PER_SECOND
    """Objects per second at most."""
    first_alone: bool = False
    """Begin with the oldest, and go on only if its run completes; no meaning for `purge` and `cancel`."""
    refresh: Annotated[list[Literal["read", "model"]], Meta(max_length=2)] = msgspec.field(
        default_factory=list
    )
    confirm: NodeIds = msgspec.field(default_factory=list)
    """For `replay`: writes that may be repeated, with new idempotency keys."""
    failed_only: bool = False
    """For `replay`: loops keep their completed iterations although their bodies have changed."""


class DeadLetterBulkRequest(BulkOperationRequest, kw_only=True):
    """Body that begins a bulk operation on dead letters."""

    action: DeadLetterAct
    filter: DeadLetterSelection
    definition: Literal["original", "current"] = CURRENT
    """For `replay`."""


class ExecutionBulkRequest(BulkOperationRequest, kw_only=True):
    """Body that begins a bulk operation on executions."""

    action: ExecutionAct
    filter: BulkFilter
    definition: Literal["original", "current"] = ORIGINAL
    """For `replay`."""


class PaceChange(StrictWire):
    """New pace of a bulk operation."""

    per_second: Pace


class BulkOperationShape(WireStruct):
    """Bulk operation with its progress."""

    id: str
    action: BulkAction
    filter: Mapping[str, Any]
    """Filter of the request."""
    status: BulkStatus
    total: int
    """Objects that it acts on at most."""
    done: int
    refused: int
    refusals: Mapping[str, int]
    """Numbers of refused objects by the code of the refusal, such as `confirmation-required`."""
    per_second: int
    first_alone: bool
    first_execution_id: str | None
    """Run that it has started first; null before, and for acts that start none."""
    end_reason: str | None
    """Reason of status `failed`: `first-failed`, `key-not-valid`, `scope-required` or `internal-error`."""
    user_id: str
    created_at: Instant
    ended_at: Instant | None


class BulkOperationList(WireStruct):
    """Page of bulk operations, the newest first."""

    count: int
    count_is_lower_bound: bool
    limit: int
    next: str | None
    """Cursor of the next page; null on the last page."""
    operations: Sequence[BulkOperationShape]


async def begin_for_dead_letters(request: GatewayRequest) -> JsonResponse:
    """Begin to redrive, replay or purge the dead letters that a filter selects, the oldest first, at a pace.

    The server goes on by itself, also after a restart. 409 `count-changed` if fewer than `count` match now. When
    it has ended, one entry of the audit trail names you, the filter and the numbers.
    """
    value = await read_json(request)
    body = body_of(request, value, DeadLetterBulkRequest)
    action = BulkAction(f"{body.action.value}-dead-letters")
    return await _begin(request, body, action, request.idempotency_key(value))


async def begin_for_executions(request: GatewayRequest) -> JsonResponse:
    """Begin to cancel, retry or replay the executions that a filter selects, the oldest first, at a pace.

    The server goes on by itself, also after a restart. 409 `count-changed` if fewer than `count` match now. When
    it has ended, one entry of the audit trail names you, the filter and the numbers.
    """
    value = await read_json(request)
    body = body_of(request, value, ExecutionBulkRequest)
    action = BulkAction(f"{body.action.value}-executions")
    return await _begin(request, body, action, request.idempotency_key(value))


async def index(request: GatewayRequest) -> JsonResponse:
    """List your bulk operations with their progress, for an admin those of the organization, the newest first.

    Ended ones are kept for 30 days.
    """
    bounds = keyset.read_newest_first(request.query)
    async with request.gateway.database.read() as connection:
        page = await _list_operations(connection, request.caller, bounds, is_open=request.query[OPEN])
    return JsonResponse(
        BulkOperationList(
            count=page.count,
            count_is_lower_bound=bool(page.is_lower_bound),
            limit=bounds.limit,
            next=page.next_cursor or None,
            operations=[show_operation(one) for one in page.items],
        )
    )


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a bulk operation with its progress."""
    return JsonResponse(show_operation(await _find(request)))


async def stop(request: GatewayRequest) -> JsonResponse:
    """Stop a bulk operation: the step in progress ends, and the other objects stay as they are.

    Nothing happens if it has ended.
    """
    return await _change(request, {"status": BulkStatus.STOPPING.value})


async def set_pace(request: GatewayRequest) -> JsonResponse:
    """Set the number of objects per second of a bulk operation, from its next step on.

    Nothing happens if it has ended.
    """
    body = await decode_body(request, PaceChange)
    return await _change(request, {"per_second": body.per_second})


async def _begin(
    request: GatewayRequest,
    body: DeadLetterBulkRequest | ExecutionBulkRequest,
    action: BulkAction,
    idempotency_key: IdempotencyKey | None,
) -> JsonResponse:
    """Store a new operation, wake the runner of this gateway, and answer 202; a used key gives its first operation.

    Raises a 409 error when fewer objects match than the body's `count`, or 20 operations of the organization are open;
    404 when the first operation is gone; 422 when it had another body.
    """
    from gateway.ingest import bulk_selection  # noqa: PLC0415 - loaded by the first operation

    gateway, caller, origin = request.gateway, request.caller, current_origin()
    async with gateway.database.read() as connection:
        # Not before the times of objects that were accepted by now.
        now = max(await read_database_time(connection), gateway.clock())
    operation = BulkOperation(
        id=ids.new_id(PREFIX),
        organization_id=caller.organization_id,
        shard=caller.shard,
        user_id=caller.user_id,
        key_id=caller.key_id,
        action=action.value,
        selection=_encode_filter(body.filter),
        options=_encode_options(body, action),
        total=body.count,
        per_second=body.per_second,
        first_alone=body.first_alone and action in bulk_selection.STARTING,
        status=BulkStatus.RUNNING.value,
        leased_until=now,
        created_at=now,
        request_id=origin.request_id if origin else None,
        address_hash=origin.address_hash if origin else None,
    )

    async def reserve(connection: AsyncConnection) -> str:
        if idempotency_key is None:
            return operation.id
        return await idempotency.reserve_key(
            connection, idempotency_key, shard=caller.shard, resource_id=operation.id, now=now
        )

    async with gateway.database.read() as connection:
        matched = await bulk_selection.count_matching(connection, caller, operation)

    async def store(connection: AsyncConnection) -> BulkOperation:
        bound = await reserve(connection)
        if bound != operation.id:
            earlier = await bulk_operation.find_operation(connection, caller, bound)
            if earlier is None:
                raise errors.not_found("bulk operation")
            return earlier
        if matched < operation.total:
            raise _count_changed(matched, operation.total)
        if await bulk_operation.count_open(connection, caller.organization_id) >= limits.BULK_OPEN:
            raise errors.conflict(
                "too-many-bulk-operations",
                f"The organization has {limits.BULK_OPEN} open bulk operations: stop one, or wait for an end",
            )
        await bulk_operation.insert_operation(connection, operation)
        return operation

    stored = await gateway.database.transaction(store)
    gateway.bulk_operations.wake()
    headers = {} if stored is operation else idempotency.REPLAYED
    return JsonResponse(show_operation(stored), status=202, headers=headers)


def _count_changed(matched: int, expected: int) -> errors.ApiError:
    """Return the 409 error for a filter that selects fewer objects than the request expects."""
    message = f"{matched:,} match the filter now, not {expected:,}: look again, and send the present count"
    return errors.conflict(
        "count-changed", message, details=[errors.problem("count", "count-changed", f"{matched}")]
    )


async def _list_operations(
    connection: AsyncConnection, caller: ApiCaller, bounds: KeysetBounds, *, is_open: bool
) -> ListPage[BulkOperation]:
    """Return a page of the operations that the caller may see; with `is_open`, only of those that have not ended."""
    conditions = [*bulk_operation.visible_conditions(caller), *((bulk_operation.IS_OPEN,) if is_open else ())]
    columns = [getattr(BulkOperation, name) for name in BulkOperation.model_fields]
    created_at, item_id = col(BulkOperation.created_at), col(BulkOperation.id)
    page = await keyset.list_rows(
        connection, columns, conditions, bounds, created_at=created_at, item_id=item_id
    )
    return page.convert(lambda row: build_row(BulkOperation, row))


async def _change(request: GatewayRequest, values: Mapping[str, Any]) -> JsonResponse:
    """Set columns of the operation of the path unless it has ended, and return it as it is then.

    Raises a 404 error if it is missing, or the caller may not see it.
    """
    await _find(request)
    change = partial(
        bulk_operation.change_open,
        caller=request.caller,
        operation_id=request.path_params["id"],
        values=values,
    )
    await request.gateway.database.transaction(change)
    return await show(request)


async def _find(request: GatewayRequest) -> BulkOperation:
    """Return the bulk operation of the path; raises a 404 error unless it exists and the caller may see it:
    an own one, or any for an admin.
    """
    async with request.gateway.database.read() as connection:
        found = await bulk_operation.find_operation(connection, request.caller, request.path_params["id"])
    if found is None:
        raise errors.not_found("bulk operation")
    return found


def _encode_filter(selection: DeadLetterSelection | BulkFilter) -> dict[str, Any]:
    """Return a filter as JSON without the fields that are not set."""
    given = msgspec.to_builtins(selection)
    return {name: value for name, value in given.items() if value not in (None, [])}


def _encode_options(body: DeadLetterBulkRequest | ExecutionBulkRequest, action: BulkAction) -> dict[str, Any]:
    """Return the options of a replay as an operation stores them; empty for other actions."""
    from gateway.ingest import bulk_selection  # noqa: PLC0415 - loaded by the first operation

    if action not in bulk_selection.REPLAYS:
        return {}
    options = bulk_selection.StoredReplayOptions(
        body.definition, body.refresh, body.confirm, body.failed_only
    )
    stored: dict[str, Any] = msgspec.to_builtins(options)
    return stored


def show_operation(operation: BulkOperation) -> BulkOperationShape:
    """Return an operation as the API shows it."""
    return BulkOperationShape(
        id=operation.id,
        action=BulkAction(operation.action),
        filter=operation.selection,
        status=BulkStatus(operation.status),
        total=operation.total,
        done=operation.done,
        refused=operation.refused,
        refusals=operation.refusals,
        per_second=operation.per_second,
        first_alone=operation.first_alone,
        first_execution_id=operation.first_execution_id,
        end_reason=operation.end_reason,
        user_id=operation.user_id,
        created_at=instant(operation.created_at),
        ended_at=optional_instant(operation.ended_at),
    )
