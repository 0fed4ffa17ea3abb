"""State of an execution: the values that its nodes have published, and a long poll for their next change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from engine import values
from gateway.executions import change_polls
from gateway.http import errors, limits
from gateway.http.parameters import IntegerParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NotModified
from gateway.http.wire import Instant, WireStruct, optional_instant
from journal import run_state
from models.execution_status import ExecutionStatus

if TYPE_CHECKING:
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
    key = await gateway.access.find_key(request.path_params["id"], request.caller)
    known = _read_known_tags(request)
    found = await change_polls.read_until(
        gateway.waiting,
        key.execution_id,
        request.caller,
        request.query[WAIT],
        partial(_read, gateway.database, key),
        lambda state: state.has_ended or _entity_tag(state) not in known,
    )
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
