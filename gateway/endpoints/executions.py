"""Executions: looked at, followed while they run, ended and resumed."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from engine.events import SpanStatus
from gateway import errors, execution_rows, execution_shapes, limits, live_events, resumption
from gateway.ending import ask_to_end
from gateway.errors import ApiError, invalid_query
from gateway.execution_rows import Filter
from gateway.query import Page, Query
from gateway.request import Request
from gateway.responses import JsonResponse, NoContent, location
from models import ids
from models.execution import ExecutionStatus

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection
    from starlette.types import ASGIApp

    from journal.store import ExecutionKey

Choice = TypeVar("Choice", bound=StrEnum)

log = structlog.get_logger()

MAX_SEQUENCE: Final = 2**31 - 1
"""Sequence numbers are integers of four bytes."""
MAX_SEQUENCE_DIGITS: Final = 10


class LogLevel(StrEnum):
    """How much a line of a log matters."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


# ── looked at ───────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: Request) -> JsonResponse:
    query = request.query
    part = query.page()
    order = query.order(execution_rows.SORTABLE)
    wanted = Filter(
        workflow_id=query.text("workflow_id"),
        statuses=_choices(request, "status", ExecutionStatus),
        trigger_type=query.text("trigger_type"),
        since=query.moment("since"),
        until=query.moment("until"),
    )
    async with request.gateway.database.read() as connection:
        count, found = await execution_rows.page(connection, request.caller, wanted, part, order)
    return _list("executions", count, part, [execution_shapes.listed(one) for one in found])


async def show(request: Request) -> JsonResponse:
    async with request.gateway.database.read() as connection:
        found = await execution_rows.find(connection, request.path_params["id"], request.caller)
    if found is None:
        raise errors.not_found("execution")
    return JsonResponse(execution_shapes.whole(found))


async def progress(request: Request) -> JsonResponse:
    """Answer when the run has ended, or after `wait` seconds with where it is then."""
    wait_seconds = request.query.whole_number(
        "wait", default=limits.WAIT_DEFAULT_SECONDS, minimum=0, maximum=limits.WAIT_SECONDS
    )
    key = await _visible(request)
    found = await request.gateway.waiting.progress(key, wait_seconds)
    if found is None:
        raise errors.not_found("execution")
    return JsonResponse(execution_shapes.progress(found))


async def spans(request: Request) -> JsonResponse:
    query = request.query
    part = _long_page(query)
    node_id, statuses = query.text("node_id"), _choices(request, "status", SpanStatus)
    key = await _visible(request)
    async with request.gateway.database.read() as connection:
        count, rows = await execution_rows.spans(connection, key, part, node_id=node_id, statuses=statuses)
    return _list("spans", count, part, [execution_shapes.span(row) for row in rows])


async def logs(request: Request) -> JsonResponse:
    part = _long_page(request.query)
    levels = _choices(request, "level", LogLevel)
    key = await _visible(request)
    async with request.gateway.database.read() as connection:
        count, rows = await execution_rows.logs(connection, key, part, levels=levels)
    return _list("logs", count, part, [execution_shapes.log(row) for row in rows])


async def events(request: Request) -> ASGIApp:
    """Stream what is committed from behind `Last-Event-ID` on; 204 tells a client that has seen the end to stop."""
    last_seen = request.headers.get("last-event-id", "0")
    key = await _visible(request)
    if last_seen == live_events.END:
        return NoContent()
    if not (last_seen.isascii() and last_seen.isdecimal() and len(last_seen) <= MAX_SEQUENCE_DIGITS):
        message = "Last-Event-ID must be the id of an event of this stream"
        raise ApiError(400, "invalid-last-event-id", message)
    return request.gateway.live_events.stream(key, min(int(last_seen), MAX_SEQUENCE))


# ── ended and resumed ───────────────────────────────────────────────────────────────────────────────────────


async def stop(request: Request) -> JsonResponse:
    """Let what has begun finish, and start nothing more; of an execution that has ended, nothing changes."""
    return await _end(request, "stop")


async def cancel(request: Request) -> JsonResponse:
    """Break off what has begun; of an execution that has ended, nothing changes."""
    return await _end(request, "cancel")


async def _end(request: Request, wish: str) -> JsonResponse:
    key = await _visible(request)
    requested = await ask_to_end(request.gateway, key, wish)
    if requested is None:
        raise errors.not_found("execution")
    log.info("execution asked to end", execution_id=key.execution_id, request=wish, status=requested.status)
    return JsonResponse({"executionId": key.execution_id, "status": requested.status})


async def resume(request: Request) -> JsonResponse:
    """Begin a new execution from what a failed one has committed."""
    caller, gateway = request.caller, request.gateway
    failed = await _visible(request)
    new_id = ids.new("exec")

    async def insert(connection: AsyncConnection) -> None:
        await resumption.resume(connection, failed, new_id, caller)

    await gateway.database.transaction(insert)
    gateway.access.allow(new_id, caller)
    gateway.acceptances.hint()
    log.info("execution resumed", execution_id=new_id, resumed_from=failed.execution_id)
    headers = location(gateway.settings, new_id)
    return JsonResponse(
        {"executionId": new_id, "resumedFrom": failed.execution_id}, status=201, headers=headers
    )


# ── what they share ─────────────────────────────────────────────────────────────────────────────────────────


async def _visible(request: Request) -> ExecutionKey:
    """Return where the rows of the execution of the path are; raises 404 unless the caller may see it."""
    return await request.gateway.access.key(request.path_params["id"], request.caller)


def _choices(request: Request, name: str, kind: type[Choice]) -> list[Choice]:
    """Return what `name=a,b` or `name=a&name=b` asks for; nothing where it isn't given."""
    given = [one for value in request.query_params.getlist(name) for one in value.split(",") if one]
    try:
        return [kind(one) for one in dict.fromkeys(given)]
    except ValueError as error:
        raise invalid_query(
            name, "invalid-value", f"{name} must be one or more of {', '.join(kind)}"
        ) from error


def _long_page(query: Query) -> Page:
    """Return `limit` and `offset` of a list that belongs to one execution."""
    limit = query.whole_number("limit", default=limits.RECORDS_DEFAULT, minimum=1, maximum=limits.RECORDS_MAX)
    offset = query.whole_number("offset", default=0, minimum=0, maximum=limits.OFFSET_MAX)
    return Page(limit, offset)


def _list(name: str, count: int, part: Page, items: list[object]) -> JsonResponse:
    return JsonResponse({"count": count, "limit": part.limit, "offset": part.offset, name: items})
