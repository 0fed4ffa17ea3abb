"""Responses of workflows to webhook requests: awaited, and sent with headers that make them harmless here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec import Struct
from sqlalchemy import and_, bindparam, select
from sqlmodel import col

from concurrency import offload
from engine.run_errors import NodeError
from engine.run_records import SpanStatus
from gateway.http import errors
from json_text import decoding
from models.execution import Execution, SpanRow
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from nodes import webhook_responses

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from gateway.executions.long_poll import ExecutionPollHub, ExecutionWaiter
    from journal.store import ExecutionKey, InboundRequest
    from models.database import Database
    from nodes.webhook_responses import WebhookResponse

NODE_TYPE: Final = "webhook-response"
POLICY: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
}
"""Headers of every answer: foreign content must not run with our origin, and the address is a secret."""

# Built once: construction of the statement takes longer than its execution.
_IS_ANSWER: Final = and_(
    col(SpanRow.execution_id) == col(Execution.id),
    col(SpanRow.shard) == col(Execution.shard),
    col(SpanRow.type) == NODE_TYPE,
    col(SpanRow.status) == SpanStatus.COMPLETED,
)
_RUN_STATE: Final = (
    select(col(Execution.status), col(SpanRow.resolved_config))
    .outerjoin(SpanRow, _IS_ANSWER)
    .where(col(Execution.id) == bindparam("execution_id"), col(Execution.shard) == bindparam("shard"))
    .order_by(col(SpanRow.sequence))
    .limit(1)
)


class AwaitedRunState(Struct, frozen=True):
    """State of an awaited run."""

    status: ExecutionStatus
    answer: WebhookResponse | None
    """First response that the run has given."""


async def await_answer(
    database: Database, waiting: ExecutionPollHub, key: ExecutionKey, inbound: InboundRequest, seconds: float
) -> AwaitedRunState | None:
    """Wait until the run of a request has answered or ended, at most `seconds`, and return its state then; None if
    there is no such run.

    Raises a 503 error when too many requests wait here, and 500 for an answer that can't be rendered.
    """
    with waiting.poll(
        key.execution_id, inbound.organization_id, inbound.workflow_id or "", seconds
    ) as waiter:
        return await _wait_for_answer(database, waiting, key, waiter)


async def _wait_for_answer(
    database: Database, waiting: ExecutionPollHub, key: ExecutionKey, waiter: ExecutionWaiter
) -> AwaitedRunState | None:
    """Wait until a run has answered or ended, or the wait of `waiter` has ended; return its state, None for a missing
    run.
    """
    while True:
        waiter.changed.clear()
        # Watch before the read, so that no change in between is missed.
        if not waiting.is_watched(key.execution_id):
            await waiting.watch([key.execution_id])
        state = await _read_run_state(database, key)
        if state is None or state.answer is not None or state.status in TERMINAL_STATUSES or waiter.is_over:
            return state
        await waiter.changed.wait()


async def _read_run_state(database: Database, key: ExecutionKey) -> AwaitedRunState | None:
    """Return the status of a run with its first answer to the sender, None while it has given none; None for a missing
    run.

    Raises a 500 error for an answer that can't be rendered.
    """
    async with database.read() as connection:
        row = (await connection.execute(_RUN_STATE, key._asdict())).first()
    if row is None:
        return None
    answer = None
    if row.resolved_config is not None:
        try:
            answer = await offload.run(_read_answer, row.resolved_config)
        except NodeError as error:
            raise errors.execution_failed(key.execution_id) from error
    return AwaitedRunState(ExecutionStatus(row.status), answer)


def _read_answer(config: str) -> WebhookResponse:
    return webhook_responses.build_response(decoding.decode(config))


class WorkflowAnswer:
    """Response of a workflow as an ASGI callable."""

    def __init__(self, answer: WebhookResponse, headers: Mapping[str, str]) -> None:
        """Build the HTTP response from the answer of a workflow, not to be stored by caches.

        The server's `headers` override those of the workflow.
        """
        self._answer = answer
        ours = {name.lower(): value for name, value in headers.items()}
        self._headers = {
            **answer.headers,
            **ours,
            "cache-control": "no-store",
            "content-length": str(len(answer.body)),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": self._answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": self._answer.body})
