"""State of an execution: the values that its nodes have published, and a long poll for their next change."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from engine import values
from gateway.http import errors, limits
from gateway.http.parameters import IntegerParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NotModified
from gateway.http.wire import Instant, WireStruct, optional_instant
from journal import run_state
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
    from gateway.executions.long_poll import ExecutionPollHub, ExecutionWaiter
    from journal.run_state import RunState
    from journal.store import ExecutionKey
    from models.database import Database

WAIT: Final = IntegerParameter(
    "wait",
    "Seconds for which the answer waits for a state other than that of `If-None-Match`, or for the end.",
    0,
    minimum=0,
    maximum=limits.WAIT_SECONDS,
)


class PublishedState(WireStruct):
    """Values that the nodes of an execution have published."""

    execution_id: str
    status: ExecutionStatus
    revision: int
    """Number of changes of the state; 0 before the first."""
    values: Mapping[str, Any]
    """Newest values by key."""
    updated_at: Instant | None
    """Time of the last change; null before the first."""


async def show(request: GatewayRequest) -> JsonResponse | NotModified:
    """Show the state of an execution: the values that its nodes have published so far, also after its end.

    With `If-None-Match` and `wait`, it is answered at the next change or at the end, and with 304 if neither
    comes in time. No code runs for it.
    """
    gateway = request.gateway
    key = await gateway.access.key(request.path_params["id"], request.caller)
    known = _read_known_tags(request)
    found = await _read_changed(gateway.database, gateway.waiting, key, known, request.query[WAIT])
    tag = _entity_tag(found)
    if tag in known:
        return NotModified({"ETag": tag})
    shown = PublishedState(
        execution_id=key.execution_id,
        status=ExecutionStatus(found.status),
        revision=found.revision,
        values={one.key: values.restore_json(one.value.encode()) for one in found.values},
        updated_at=optional_instant(max((one.updated_at for one in found.values), default=None)),
    )
    return JsonResponse(shown, headers={"ETag": tag})


async def _read_changed(
    database: Database,
    waiting: ExecutionPollHub,
    key: ExecutionKey,
    known: Collection[str],
    wait_seconds: int,
) -> RunState:
    """Return the state of a run once it has another tag than the known ones or has ended, or when the time is over.

    Raises 404 if the run is gone, and 503 if 10,000 requests wait here.
    """
    found = await _read(database, key)
    if wait_seconds == 0 or found.has_ended or _entity_tag(found) not in known:
        return found
    if waiting.polls >= limits.POLLS_WAITING:
        raise errors.not_ready("Too many requests wait here for executions to change: ask with wait=0")
    waiting.polls += 1
    with waiting.waiter(key.execution_id) as waiter:
        timer = asyncio.get_running_loop().call_later(wait_seconds, waiter.end)
        try:
            return await _wait_for_change(database, waiting, key, known, waiter)
        finally:
            timer.cancel()
            waiting.polls -= 1


async def _wait_for_change(
    database: Database,
    waiting: ExecutionPollHub,
    key: ExecutionKey,
    known: Collection[str],
    waiter: ExecutionWaiter,
) -> RunState:
    """Return the state of a run once it differs from the known one, or when the waiter is over.

    The commit that records the publishing node notifies the waiter; a lost notification costs a second.
    """
    while True:
        waiter.changed.clear()
        if not waiting.is_watched(key.execution_id):
            await waiting.watch([key.execution_id])
        found = await _read(database, key)
        if found.has_ended or waiter.is_over or _entity_tag(found) not in known:
            return found
        await waiter.changed.wait()


async def _read(database: Database, key: ExecutionKey) -> RunState:
    async with database.read() as connection:
        found = await run_state.read_state(connection, key)
    if found is None:
        raise errors.not_found("execution")
    return found


def _read_known_tags(request: GatewayRequest) -> Collection[str]:
    """Return the tags that the client has; proxies that compress answers mark them as weak, by `W/`."""
    listed = request.headers.get("if-none-match", "").split(",")
    return {tag.strip().removeprefix("W/") for tag in listed}


def _entity_tag(state: RunState) -> str:
    """Return the tag of a state, which changes with each value and at the end of the run."""
    return f'"{state.revision}-ended"' if state.has_ended else f'"{state.revision}"'
