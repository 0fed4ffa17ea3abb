"""Signals: values that clients send to an execution, which its waiting nodes receive in order."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import structlog
from msgspec import Meta

from concurrency import offload
from engine import values
from gateway.executions import answered_runs, signal_replies
from gateway.http import errors, idempotency, limits
from gateway.http.errors import ApiError
from gateway.http.parameters import ChoiceParameter, IntegerParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, instant, optional_instant, read_json
from journal.waits import signals
from journal.waits.signals import NewSignal, SignalVerdict
from models import ids

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from journal.store import ExecutionKey, IdempotencyKey
    from journal.waits.signals import SignalResult
    from models.signal import Signal

log = structlog.get_logger()

MAX_NUMBER: Final = 2_147_483_647


class SignalState(StrEnum):
    """State of a signal."""

    UNREAD = "unread"
    """No node has received it."""
    DELIVERED = "delivered"
    """A node has received it."""


STATE: Final = ChoiceParameter("state", "Only signals in this state.", SignalState)
AFTER: Final = IntegerParameter(
    "after",
    "Number after which the list begins: `next` of the page before.",
    0,
    minimum=0,
    maximum=MAX_NUMBER,
)
LIMIT: Final = IntegerParameter(
    "limit",
    "Maximum number of signals in the answer.",
    limits.RECORDS_DEFAULT,
    minimum=1,
    maximum=limits.RECORDS_MAX,
)
LISTED: Final = (STATE, AFTER, LIMIT)
WAIT: Final = IntegerParameter(
    "wait",
    "Seconds for which the answer waits for the reply of a node `reply-to-signal`, or for the end of the execution.",
    0,
    minimum=0,
    maximum=limits.WAIT_SECONDS,
)


class SignalBody(StrictWire):
    """Signal to an execution."""

    name: Annotated[
        str,
        Meta(
            pattern="^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
            description="a letter or digit, then up to 63 letters, digits, `_`, `.` and `-`",
        ),
    ]
    """Name for which a node of the execution waits, now or later."""
    payload: Any = None
    """Any JSON value that matches the schema of the node."""


class SignalReceipt(WireStruct):
    """Stored signal."""

    execution_id: str
    number: int
    """Place among the signals of the execution, from 1."""
    name: str
    state: SignalState
    """`delivered`: a waiting node has received it. `unread`: the next node that waits for its name gets it, after
    earlier ones.
    """
    node_id: str | None
    """Node that has received it; null while it is unread."""
    iteration: str | None
    """Turn of the loops around this node; empty outside of loops."""
    reply: Any
    """Value of the node `reply-to-signal` that has replied first; null before."""
    replied_at: Instant | None
    """Time of the reply; null before."""


class ShownSignal(SignalReceipt, kw_only=True):
    """Signal of an execution."""

    payload: Any
    sent_by: str
    """User who has sent it."""
    sent_at: Instant
    delivered_at: Instant | None


class SignalList(WireStruct):
    """Signals of an execution, in order."""

    count: int
    """Number of signals in this answer."""
    next: int | None
    """Value of `after` for the next page; null on the last one."""
    signals: Sequence[ShownSignal]


async def index(request: GatewayRequest) -> JsonResponse:
    """List the signals of an execution in order, also after its end: `state=unread` lists those that no node
    has received.

    A page has at most 10 MB of payloads, thus perhaps fewer signals than `limit`; `next` leads to the others.
    """
    query = request.query
    key = await request.gateway.access.find_key(request.path_params["id"], request.caller)
    state = query[STATE]
    is_unread = None if state is None else state is SignalState.UNREAD
    async with request.gateway.database.read() as connection:
        found, following = await signals.list_signals(
            connection, key, after=query[AFTER], at_most=query[LIMIT], is_unread=is_unread
        )
    shown = await offload.run(_show_signals, found)
    return JsonResponse(SignalList(count=len(shown), next=following, signals=shown))


async def send(request: GatewayRequest) -> JsonResponse:
    """Send a signal to an execution: the node that has waited longest for its name continues with the payload.

    If none waits, the signal is kept, in order, for the next node that does. It is answered after its commit,
    and delivered once, also if processes die. A repetition with the same `Idempotency-Key` gets the same signal.
    With `wait`, the answer is 200 with the `reply` of the execution, or 202 if it has not replied by then.
    """
    gateway, caller = request.gateway, request.caller
    key = await gateway.access.find_key(request.path_params["id"], caller)
    value = await read_json(request)
    body = body_of(request, value, SignalBody)
    idempotency_key = await offload.run(request.idempotency_key, value, workflow_id=key.execution_id)
    payload = await offload.run(values.encode_json, body.payload)
    if len(payload) > limits.SIGNAL_BYTES:
        message = f"The payload has more than {limits.SIGNAL_BYTES:,} bytes: send a reference to its content"
        raise ApiError(413, "payload-too-large", message)
    await gateway.signal_schemas.require_valid(key, caller.organization_id, body.name, body.payload)
    sent = NewSignal(ids.new_id("signal"), body.name, payload, caller.user_id)
    seconds = request.query[WAIT]
    with signal_replies.reserve_wait(gateway.waiting, key, seconds):
        stored, result = await _store(request, key, sent, idempotency_key)
        if result is not None:
            await _continue_run(request, key, sent.name, result)
        stored = await signal_replies.wait_for_reply(
            gateway.database, gateway.waiting, key, caller, stored, seconds
        )
    receipt = SignalReceipt(**await offload.run(_receipt_fields, stored))
    return JsonResponse(
        receipt,
        status=202 if stored.replied_at is None else 200,
        headers=idempotency.REPLAYED if result is None else None,
    )


async def _continue_run(request: GatewayRequest, key: ExecutionKey, name: str, result: SignalResult) -> None:
    """Let the run continue if its node has received the stored signal, and log the signal."""
    gateway = request.gateway
    await answered_runs.continue_run(
        gateway.database, gateway.acceptances, gateway.pod_services.poll_hub, result.answer
    )
    log.info("signal received", execution_id=key.execution_id, signal=name, state=result.verdict.value)


async def _store(
    request: GatewayRequest, key: ExecutionKey, sent: NewSignal, idempotency_key: IdempotencyKey | None
) -> tuple[Signal, SignalResult | None]:
    """Store a signal in one transaction; return it with its result, or the signal of an earlier request with the same
    key and None.

    Raises 404 if the run is gone, 409 if it has ended or has too many unread signals, and 422 if the body of the
    earlier request differs.
    """
    now = request.gateway.clock()
    attempted: SignalResult | None = None

    async def work(connection: AsyncConnection) -> tuple[Signal, SignalResult | None]:
        nonlocal attempted
        if idempotency_key is not None:
            bound = await idempotency.reserve_key(
                connection, idempotency_key, shard=key.shard, resource_id=sent.id, now=now
            )
            if bound != sent.id:
                earlier = await signals.find_signal(connection, key, bound)
                if earlier is None:
                    raise errors.not_found("execution")
                return earlier, None
        attempted = result = await signals.store_signal(connection, key, sent, attempted)
        if result is None:
            raise errors.not_found("execution")
        if result.signal is None:
            raise _refusal_of(result)
        return result.signal, result

    return await request.gateway.database.transaction(work, locks=key.execution_id)


def _refusal_of(result: SignalResult) -> ApiError:
    """Return the 409 error for a signal that was not stored."""
    if result.verdict is SignalVerdict.ENDED:
        message = f"The execution has ended as {result.run_status}, and receives no more signals"
        detail = errors.problem("id", "execution-ended", message)
        return errors.conflict("execution-ended", message, details=[{**detail, "status": result.run_status}])
    message = (
        f"The execution has {limits.UNREAD_SIGNALS:,} signals that no node has received:"
        " send more once its nodes have received some"
    )
    return errors.conflict("too-many-signals", message)


def _receipt_fields(signal: Signal) -> dict[str, Any]:
    """Return the fields of a receipt, with the decoded reply."""
    return {
        "execution_id": signal.execution_id,
        "number": signal.number,
        "name": signal.name,
        "state": SignalState.UNREAD if signal.node_id is None else SignalState.DELIVERED,
        "node_id": signal.node_id,
        "iteration": signal.iteration,
        "reply": None if signal.reply is None else _decode(signal.reply),
        "replied_at": optional_instant(signal.replied_at),
    }


def _show_signals(found: Sequence[Signal]) -> Sequence[ShownSignal]:
    """Return signals as the list shows them, with their decoded payloads and replies."""
    return [
        ShownSignal(
            **_receipt_fields(one),
            payload=_decode(one.payload),
            sent_by=one.user_id,
            sent_at=instant(one.created_at),
            delivered_at=optional_instant(one.delivered_at),
        )
        for one in found
    ]


def _decode(text: str) -> Json:
    return values.restore_json(text.encode())
