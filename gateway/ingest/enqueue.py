"""Enqueue: a message for the queue trigger of an active workflow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec

from concurrency import offload
from gateway.executions import awaited_end, run_labels
from gateway.executions.awaited_end import OutcomeShape
from gateway.http import idempotency, limits, text_rules
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, location
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import GuardedWire, WireStruct, convert, json_of
from gateway.ingest import delivery_log
from gateway.ingest.ingest import RunInput
from journal.store import AcceptanceVerdict
from models.ingest import IngestRoute

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.ingest.ingest import RunTarget
    from gateway.ingest.verification import VerifiedSignature
    from journal.run_labels import RunLabel
    from journal.store import IdempotencyKey

_encode = msgspec.json.Encoder().encode
QUEUE: Final = "queue"
DELIVERY: Final = "message"
"""Kind of the deduplication keys of signed messages."""
SOURCE: Final = "rest_api"
MAX_DELAY: Final = timedelta(seconds=limits.DELAY_SECONDS)

Queued = TypeVar("Queued", bound="QueueMessage")
Priority = Annotated[int, msgspec.Meta(ge=limits.LOWEST_PRIORITY, le=limits.HIGHEST_PRIORITY)]


class QueueMessage(GuardedWire):
    """Message for a queue trigger."""

    message: Any = None
    data: Any = None
    """Alias of `message`."""
    priority: Priority = 0
    """Higher priorities run sooner: one step counts as much as a minute of waiting."""
    source: Annotated[str, text_rules.describe_length(limits.SOURCE_LENGTH, min_length=1)] = SOURCE
    delay_seconds: Annotated[float, msgspec.Meta(ge=0, le=limits.DELAY_SECONDS)] | None = None
    not_before: datetime | None = None
    """Earliest start of the run."""
    deduplication_id: (
        Annotated[str, text_rules.describe_length(limits.DEDUPLICATION_ID_LENGTH, min_length=1)] | None
    ) = None
    """Messages with the same id run once in a day; repetitions get the answer of the first."""

    @property
    def payload(self) -> Any:  # noqa: ANN401 - any JSON value
        """Content of the message for the output of the trigger node: `message`, or `data` if that is null."""
        return self.data if self.message is None else self.message

    def delayed_until(self, now: datetime) -> datetime | None:
        """Return the earliest start of the run, the later of its delay and its time; None when it may start
        at once.
        """
        until = max(now + timedelta(seconds=self.delay_seconds or 0.0), self.not_before or now)
        return until if until > now else None

    def to_run_input(
        self, now: datetime, idempotency_key: IdempotencyKey | None, callback_url: str | None
    ) -> RunInput:
        """Return the input of the run that the message starts: trigger output, priority, earliest start,
        labels and callback URL (None for none).
        """
        trigger = {"message": self.payload, "priority": self.priority, "source": self.source}
        return RunInput(
            trigger=trigger,
            text=_encode(trigger).decode(),
            priority=self.priority,
            delay_until=self.delayed_until(now),
            callback_url=callback_url or "",
            idempotency_key=idempotency_key,
            labels=self.labels(),
        )

    def labels(self) -> Sequence[RunLabel]:
        """Return the tags and metadata of the run: none, since only messages of a batch have their own."""
        return ()


class BatchMessage(QueueMessage, forbid_unknown_fields=True):
    """Message in a batch."""

    tags: run_labels.Tags | None = None
    """Tags by which lists find the run."""
    metadata: run_labels.Metadata | None = None
    """Metadata by which lists find the run; it replaces that of `settings.metadata` with the same keys."""

    def labels(self) -> Sequence[RunLabel]:
        """Return tags and metadata of the message as labels of its run; raises a 422 error for invalid ones."""
        return run_labels.read_labels(self.tags, self.metadata)


class EnqueueRequest(QueueMessage):
    """Request body with a message.

    A body without `message` and `data`, or with null for both, is itself the message; no other field counts
    then.
    """

    callback_url: (
        Annotated[str, text_rules.describe_length(limits.CALLBACK_URL_LENGTH, min_length=1)] | None
    ) = None
    """URL for a callback after the run, signed with the organization's secret."""


class EnqueueResult(WireStruct):
    """Accepted message with its run."""

    execution_id: str
    trigger_type: str = msgspec.field(default=QUEUE, name="trigger_type")


class EndedEnqueueResult(OutcomeShape, kw_only=True):
    """Accepted message whose run has ended."""

    execution_id: str
    trigger_type: str = msgspec.field(default=QUEUE, name="trigger_type")


async def enqueue(request: GatewayRequest) -> JsonResponse:
    """Start a run of a workflow on a message, through its queue trigger.

    The answer is 201 with the run's id, or that of the earlier run for a repetition. With `Prefer: wait=N` and an API
    key that may read workflows, it is 200 with the outcome if the run ends within N seconds, at most 60; other senders
    don't wait.

    Senders that can't set a header send the workflow's trigger token as `key` in the URL.
    """
    gateway, workflow_id = request.gateway, request.path_params["id"]
    sender = request.sender
    content = await request.body()
    signature = await gateway.verifier.verify_message(
        sender, workflow_id, QUEUE, request.to_sender_request(content)
    )
    inbound = await delivery_log.describe_request(
        IngestRoute.ENQUEUE, sender, content, workflow_id=workflow_id
    )
    async with gateway.deliveries.refusals(inbound):
        value = await json_of(request, content)
        now = gateway.clock()
        body = _parse_message(value, now, request.warnings)
        own_key, idempotency_key = await offload.run(_idempotency_keys, request, value, body, signature)
        message = body.to_run_input(now, idempotency_key, body.callback_url)
        inbound.payload = message.text

        async def plan(target: RunTarget) -> RunInput:
            if signature is not None:
                await gateway.verifier.verify_again(signature, target)
            await gateway.ingestor.require_models(sender.caller, target)
            await gateway.capacity.require(request, target)
            if body.callback_url is not None:
                await request.gateway.callbacks.require_permitted(
                    body.callback_url, request.caller.organization_id, has_key=request.has_key
                )
            return message

        accepted = await gateway.ingestor.ingest_request(
            sender.caller, inbound, QUEUE, plan, idempotency_key, own_key=own_key
        )
    headers = location(gateway.settings, accepted.execution_id)
    if accepted.verdict is AcceptanceVerdict.REPEATED:
        headers |= idempotency.REPLAYED
    execution_id = accepted.execution_id
    preference = awaited_end.read_preference(request.headers, request.caller if request.has_key else None)
    if preference is not None:
        headers |= preference.headers
        # The message is committed; don't hold it in memory during the wait.
        del value, content, body, message, inbound
        request.release_body()
        outcome = await gateway.ends.wait_for_end(execution_id, request.caller, preference.seconds)
        if outcome is not None:
            ended = EndedEnqueueResult(execution_id=execution_id, **msgspec.structs.asdict(outcome))
            return JsonResponse(ended, headers=headers)
    return JsonResponse(EnqueueResult(execution_id=execution_id), status=201, headers=headers)


def _idempotency_keys(
    request: GatewayRequest, value: Json, body: EnqueueRequest, signature: VerifiedSignature | None
) -> tuple[IdempotencyKey | None, IdempotencyKey | None]:
    """Return the idempotency keys of the request and of its message, from the signature, `Idempotency-Key` and
    `deduplicationId`.

    Of those in this order, the last one that exists is the key of the message (None without any); the first is that of
    the request if there are several, else None. `value` is the decoded body.
    """
    workflow_id = request.path_params["id"]
    keys = [
        find_signed_key(signature, workflow_id),
        request.idempotency_key(value, workflow_id=workflow_id),
        idempotency.sender_key(workflow_id, body.deduplication_id)
        if body.deduplication_id is not None
        else None,
    ]
    found = [key for key in keys if key is not None]
    return found[0] if len(found) > 1 else None, found[-1] if found else None


def find_signed_key(signature: VerifiedSignature | None, workflow_id: str) -> IdempotencyKey | None:
    """Return the idempotency key that a signature covers; None if there is no signature or it covers none.

    Other keys of the request aren't signed.
    """
    if signature is None or signature.delivery_key is None:
        return None
    return idempotency.derive_key(DELIVERY, workflow_id, signature.delivery_key)


def check_message(
    value: Json,
    kind: type[Queued],
    now: datetime,
    path: str = "",
    warnings: list[dict[str, Json]] | None = None,
) -> Queued:
    """Return `value` as a message of type `kind`; raises a 422 error that lists all invalid fields, below the place
    `path`.

    A start more than a year ahead, or without a time zone, is invalid. Unknown fields are added to `warnings`, if that
    is given, except those that resemble a field or are in a batch: these are invalid.
    """
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


def _parse_message(value: Json, now: datetime, warnings: list[dict[str, Json]]) -> EnqueueRequest:
    if not isinstance(value, dict) or (value.get("message") is None and value.get("data") is None):
        return EnqueueRequest(message=value)
    return check_message(value, EnqueueRequest, now, warnings=warnings)
