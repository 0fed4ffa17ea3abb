"""Enqueue: a message for the queue trigger of an active workflow."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec

from concurrency import offload
from gateway.executions import callback_checks
from gateway.http import idempotency, limits, text_rules
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, location
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire, WireStruct, convert, json_of
from gateway.ingest import capacity, deduplication_keys, inbound_request, ingest, verification
from gateway.ingest.ingest import RunInput
from journal.store import AcceptanceVerdict
from models.ingest import IngestRoute

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.ingest.ingest import RunTarget
    from gateway.ingest.verification import VerifiedSignature
    from journal.store import IdempotencyKey

_encode = msgspec.json.Encoder().encode
QUEUE: Final = "queue"
DELIVERY: Final = "message"
"""For the keys of messages as providers name them."""
SOURCE: Final = "rest_api"
MAX_DELAY: Final = timedelta(seconds=limits.DELAY_SECONDS)

Queued = TypeVar("Queued", bound="QueueMessage")
Priority = Annotated[int, msgspec.Meta(ge=limits.LOWEST_PRIORITY, le=limits.HIGHEST_PRIORITY)]


class QueueMessage(GuardedWire):
    """A message of a queue."""

    message: Any = None
    data: Any = None
    """The same by another name."""
    priority: Priority = 0
    """The higher, the sooner: a step counts as much as a minute of waiting."""
    source: Annotated[str, text_rules.is_allowed_text(limits.SOURCE_LENGTH, min_length=1)] = SOURCE
    delay_seconds: Annotated[float, msgspec.Meta(ge=0, le=limits.DELAY_SECONDS)] | None = None
    not_before: datetime | None = None
    """Run it no sooner than then."""
    deduplication_id: (
        Annotated[str, text_rules.is_allowed_text(limits.DEDUPLICATION_ID_LENGTH, min_length=1)] | None
    ) = None
    """Of messages with the same one, a day's first is run; the others are answered like it."""

    @property
    def payload(self) -> Any:  # noqa: ANN401 - any JSON value
        """What the trigger node gives out as its message."""
        return self.data if self.message is None else self.message

    def delayed_until(self, now: datetime) -> datetime | None:
        """Return when it may be run at the soonest; None: at once."""
        until = max(now + timedelta(seconds=self.delay_seconds or 0.0), self.not_before or now)
        return until if until > now else None

    def planned(
        self, now: datetime, idempotency_key: IdempotencyKey | None, callback_url: str | None
    ) -> RunInput:
        """Return the run of it."""
        trigger = {"message": self.payload, "priority": self.priority, "source": self.source}
        return RunInput(
            trigger=trigger,
            text=_encode(trigger).decode(),
            priority=self.priority,
            delay_until=self.delayed_until(now),
            callback_url=callback_url or "",
            idempotency_key=idempotency_key,
        )


class BatchMessage(QueueMessage, forbid_unknown_fields=True):
    """A message among others."""


class EnqueueRequest(QueueMessage):
    """A message; a body without `message` and `data`, or with null for both, is one as a whole: nothing else counts."""

    callback_url: (
        Annotated[str, text_rules.is_allowed_text(limits.CALLBACK_URL_LENGTH, min_length=1)] | None
    ) = None
    """Is told how the run has ended, by a message that is signed with the organisation's secret."""


class EnqueueResult(WireStruct):
    """A message that was taken in."""

    execution_id: str
    trigger_type: str = msgspec.field(default=QUEUE, name="trigger_type")


async def enqueue(request: GatewayRequest) -> JsonResponse:
    """Run a workflow on a message, through its queue trigger.

    Senders that can't set a header send the workflow's trigger token as `key` in the URL.
    """
    gateway, workflow_id = request.gateway, request.path_params["id"]
    sender = request.sender
    content = await request.body()
    vouched = await verification.message_signature(request, QUEUE, content)
    note = await inbound_request.describe_request(
        IngestRoute.ENQUEUE, sender, content, workflow_id=workflow_id
    )
    async with gateway.deliveries.refusals(note):
        value = await json_of(request, content)
        now = gateway.clock()
        body = _interpreted(value, now, request.warnings)
        own_key, idempotency_key = await offload.run(_keys, request, value, body, vouched)
        message = body.planned(now, idempotency_key, body.callback_url)
        note.payload = message.text

        async def plan(ground: RunTarget) -> RunInput:
            if vouched is not None:
                await vouched.require_on(gateway, ground)
            await capacity.require_capacity(request, ground)
            if body.callback_url is not None:
                await callback_checks.require_reachable(request, body.callback_url)
            return message

        accepted = await ingest.ingest_request(gateway, note, QUEUE, plan, idempotency_key, own_key=own_key)
    headers = location(gateway.settings, accepted.execution_id)
    if accepted.verdict is AcceptanceVerdict.REPEATED:
        headers |= idempotency.REPLAYED
    return JsonResponse(EnqueueResult(execution_id=accepted.execution_id), status=201, headers=headers)


def _keys(
    request: GatewayRequest, value: Json, body: EnqueueRequest, vouched: VerifiedSignature | None
) -> tuple[IdempotencyKey | None, IdempotencyKey | None]:
    """Return what the request is known by, where that isn't all, and what its message is known by."""
    workflow_id = request.path_params["id"]
    keys = [
        vouched_key(vouched, workflow_id),
        idempotency.requested_key(request, value, workflow_id=workflow_id),
        deduplication_keys.sender_key(workflow_id, body.deduplication_id)
        if body.deduplication_id is not None
        else None,
    ]
    found = [key for key in keys if key is not None]
    return found[0] if len(found) > 1 else None, found[-1] if found else None


def vouched_key(vouched: VerifiedSignature | None, workflow_id: str) -> IdempotencyKey | None:
    """Return what a signed request is known by, whatever other keys it carries: those aren't signed."""
    if vouched is None or vouched.delivery_key is None:
        return None
    return deduplication_keys.derive_key(DELIVERY, workflow_id, vouched.delivery_key)


def check_message(
    value: Json,
    kind: type[Queued],
    now: datetime,
    path: str = "",
    warnings: list[dict[str, Json]] | None = None,
) -> Queued:
    """Return a message, found at `path`; raises 422."""
    body = convert(value, kind, path, warnings)
    problems = ProblemCollector()
    inside = f"{path}." if path else ""
    body.source = text_rules.check_line(
        body.source, f"{inside}source", problems, max_length=limits.SOURCE_LENGTH
    )
    if body.deduplication_id is not None:
        _require_name(body.deduplication_id, f"{inside}deduplicationId", problems)
    if body.not_before is not None and body.not_before.tzinfo is None:
        problems.add(
            f"{inside}notBefore", "invalid-value", "notBefore needs a time zone, such as 2025-01-15T10:30:00Z"
        )
    elif body.not_before is not None and body.not_before > now + MAX_DELAY:
        problems.add(f"{inside}notBefore", "invalid-value", f"notBefore may be {MAX_DELAY.days:,} days ahead")
    problems.raise_any()
    return body


def _require_name(name: str, path: str, problems: ProblemCollector) -> None:
    if not name:
        problems.add(path, "required", f"{path} must not be empty")
    if len(name) > limits.DEDUPLICATION_ID_LENGTH:
        problems.add(path, "too-long", f"{path} may have at most {limits.DEDUPLICATION_ID_LENGTH} characters")


def _interpreted(value: Json, now: datetime, warnings: list[dict[str, Json]]) -> EnqueueRequest:
    if not isinstance(value, dict) or (value.get("message") is None and value.get("data") is None):
        return EnqueueRequest(message=value)
    return check_message(value, EnqueueRequest, now, warnings=warnings)
