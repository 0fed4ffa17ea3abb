"""Webhooks: requests of other systems to the address of a workflow's webhook trigger."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

from msgspec import Struct
from msgspec.structs import replace

from concurrency import offload
from engine.values import InvalidJson
from gateway.executions.request_limits import RateLimit
from gateway.http import errors, idempotency, limits
from gateway.http.errors import ApiError
from gateway.http.request import BodyLimit, GatewayRequest, read_idempotency_key
from gateway.http.responses import JsonResponse, NoContent, location
from gateway.http.wire import WireStruct
from gateway.ingest import delivery_log, event_signatures, webhook_responses, webhook_triggers
from gateway.ingest.ingest import RunInput
from gateway.ingest.verification import SigningProvider
from gateway.ingest.webhook_responses import WorkflowAnswer
from gateway.ingest.webhook_triggers import ResponseMode
from journal.blobs import large_values
from journal.blobs.blob_storage import BlobOwner, BlobsUnavailable
from journal.blobs.large_values import EncodedTrigger
from journal.store import AcceptanceVerdict, ExecutionKey
from messages.token_buckets import BucketRate
from models import ids
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.ingest import IngestRoute
from senders import signatures
from senders.request_refusal import RequestRefused
from senders.sender_event import UrlChallenge

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from engine.values import Json
    from gateway.http.sender import RequestSender
    from gateway.ingest.ingest import RunTarget
    from gateway.ingest.verification import VerifiedSignature
    from gateway.ingest.webhook_triggers import WebhookTrigger
    from journal.definition_snapshot import LoadedWorkflow
    from journal.store import AcceptanceResult, IdempotencyKey, InboundRequest
    from senders.sender_request import SenderRequest

DELIVERY: Final = "hook"
NAMED: Final = "hook-idempotency-key"
ACCEPTED: Final = 202
OK: Final = 200
MAX_HOOK_SETTING: Final = "PILOTFLAME_MAX_HOOK_BYTES"
KEY: Final = "key"
METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
"""Methods that a webhook trigger may accept."""
_OPENS_NOTHING: Final = frozenset({404, 422})
"""Statuses for an unknown address, and for a workflow without a webhook trigger."""


class WebhookStatus(StrEnum):
    """Outcome of a webhook request."""

    ACCEPTED = "accepted"
    """The run is in progress or pending."""
    COMPLETED = "completed"
    """The run has ended, without an answer of its own."""
    IGNORED = "ignored"
    """The request has no event type, or one that the trigger doesn't accept."""


class WebhookReceipt(WireStruct, omit_defaults=True):
    """Outcome of a webhook request that the workflow doesn't answer itself."""

    status: WebhookStatus
    execution_id: str | None = None
    challenge: str | None = None
    """Challenge that the sender wants back, to check the address."""


class VerifiedWebhookRequest(Struct, frozen=True):
    """Verified request of a sender of the webhook."""

    sender: RequestSender
    hook: WebhookTrigger
    signature: VerifiedSignature

    @property
    def sent(self) -> SenderRequest:
        """Request as the sender has sent it, with its verified body."""
        return self.signature.request


async def receive(request: GatewayRequest) -> ASGIApp:
    """Run a workflow on a webhook request, with any method that its trigger accepts.

    The address contains the trigger token, and the trigger's config says how to verify senders; without
    `verification`, all requests are refused. The workflow answers with its own status, headers and body if
    the trigger waits for that.
    """
    started = asyncio.get_running_loop().time()
    for name, value in webhook_responses.POLICY.items():
        request.send_with_answer(name, value)
    sender = await _find_sender(request)
    verified = await _verify_sender(request, sender)
    inbound = await delivery_log.describe_request(
        IngestRoute.HOOK, sender, verified.sent.body, workflow_id=sender.token_workflow_id
    )
    async with request.gateway.deliveries.refusals(inbound):
        await request.gateway.rates.take(
            request, inbound.workflow_id, key=sender.caller.key_id, also=_extra_limits(verified)
        )
        try:
            return await _answer_request(request, inbound, verified, started)
        except RequestRefused as error:
            raise event_signatures.refusal_error(error) from error


async def options(request: GatewayRequest) -> NoContent:
    """List the methods that a webhook accepts.

    An address that opens no webhook gets the list of all methods, so that strangers learn nothing. Requests
    with unknown tokens count as failed attempts here too.
    """
    methods: Collection[str] = METHODS
    try:
        sender = await _find_sender(request)
        methods = await request.gateway.verifier.use_current_trigger(
            sender.caller, sender.token_workflow_id, _list_accepted_methods
        )
    except ApiError as error:
        if error.status not in _OPENS_NOTHING:
            raise
    return NoContent({"Allow": ", ".join(sorted({*methods, "OPTIONS"}))})


async def _answer_request(
    request: GatewayRequest, inbound: InboundRequest, verified: VerifiedWebhookRequest, started: float
) -> ASGIApp:
    """Start the run of a verified request and return the HTTP answer: that it is accepted, or if the trigger waits for
    the run, the run's own answer, or that it has completed without one.

    It is answered as accepted too if the workflow is paused, its deployment refuses the start, or the run goes on at
    the deadline, which is counted from `started` by the event loop's clock. A challenge by which a sender checks the
    URL, and an event that the trigger does not allow, start no run: they are recorded as deliveries and answered with
    200. Raises `RequestRefused` for invalid content, a 500 error for a run that failed without an answer, and the API
    errors of limits and ingest.
    """
    hook, sent = verified.hook, verified.sent
    meaning = await offload.run(webhook_triggers.parse_request, hook, sent)
    if isinstance(meaning, UrlChallenge):
        await _note_only(request, inbound, "challenge: the sender checks the address")
        return JsonResponse(WebhookReceipt(status=WebhookStatus.IGNORED, challenge=meaning.text or None))
    if not hook.runs_for(meaning.event_type):
        await _note_only(request, inbound, f"event-not-allowed: {meaning.event_type or 'no event type'}")
        return JsonResponse(WebhookReceipt(status=WebhookStatus.IGNORED))
    trigger = await offload.run(webhook_triggers.build_input, hook, sent, meaning.body)
    encoded = await offload.run(_encode_trigger, trigger)
    if len(encoded.content) <= limits.KEPT_REFUSED_CHARACTERS:
        inbound.payload = encoded.content.decode()
    accepted, is_deferred = await _ingest(request, inbound, verified, trigger, encoded)
    if hook.config.respond is ResponseMode.AT_ONCE or is_deferred:
        return _answer_accepted(request, hook, accepted)
    return await _await_response(request, hook, accepted, inbound, started + hook.config.deadline_seconds)


# ── senders ─────────────────────────────────────────────────────────────────────────────────────────────────


async def _find_sender(request: GatewayRequest) -> RequestSender:
    """Return the sender of the trigger token in the path; raises a 404 error for an unknown token, 429 after
    too many failures.
    """
    return await request.gateway.sender_authenticator.by_path_token(request.scope, request.path_params["id"])


async def _verify_sender(request: GatewayRequest, sender: RequestSender) -> VerifiedWebhookRequest:
    """Return the request with its whole body, verified by the trigger's config: method, network, size and signature.

    Raises 400, 401, 403, 405, 413, 415, 422 and 503; only senders with a valid token get that far.
    """
    gateway = request.gateway
    query = _read_query(request)
    address = request.client.host if request.client else ""
    content: bytes | None = None

    async def use(workflow: LoadedWorkflow) -> VerifiedWebhookRequest:
        nonlocal content
        hook = webhook_triggers.read_webhook(workflow)
        hook.require_method(request.method)
        hook.require_network(address)
        most = BodyLimit(gateway.settings.max_hook_bytes, MAX_HOOK_SETTING)
        limit = min(hook.body_limit, most, key=lambda one: one.bytes)
        if content is None:
            content = await request.body_up_to(limit)
        elif len(content) > limit.bytes:
            raise limit.exceeded()
        sent = request.to_sender_request(content, query=query)
        signature = await gateway.verifier.verify_signature(workflow, sent)
        return VerifiedWebhookRequest(sender, hook, signature)

    return await gateway.verifier.use_current_trigger(sender.caller, sender.token_workflow_id, use)


async def _list_accepted_methods(workflow: LoadedWorkflow) -> Collection[str]:
    return webhook_triggers.read_webhook(workflow).config.methods


def _read_query(request: GatewayRequest) -> Mapping[str, Sequence[str]]:
    """Return the values of query parameters by name, without `key`, which is a token elsewhere.

    Raises a 400 error for more than 50.
    """
    try:
        query = parse_qs(
            request.scope["query_string"].decode("latin-1"),
            keep_blank_values=True,
            max_num_fields=limits.QUERY_FIELDS,
        )
    except ValueError as error:
        message = f"The query may have at most {limits.QUERY_FIELDS} parameters"
        raise errors.invalid_query("", "too-many", message) from error
    return {name: found for name, found in query.items() if name != KEY}


def _extra_limits(verified: VerifiedWebhookRequest) -> Sequence[RateLimit]:
    """Return the rate limit of a webhook without verification (five a second, 20 at once); none for a verified one."""
    if verified.hook.verification.provider is not SigningProvider.NONE:
        return ()
    rate = BucketRate(limits.UNVERIFIED_HOOK_REQUESTS, limits.UNVERIFIED_HOOK_BURST)
    return (RateLimit("hook", f"hook:{verified.sender.caller.key_id}", rate),)


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────────────────


def _encode_trigger(trigger: Mapping[str, Json]) -> EncodedTrigger:
    try:
        return EncodedTrigger.of(trigger)
    except InvalidJson as error:
        raise RequestRefused(error.code, error.message) from error


async def _note_only(request: GatewayRequest, inbound: InboundRequest, reason: str) -> None:
    """Store a delivery with status 200 for a request that starts no run, with its reason."""
    await request.gateway.deliveries.note(
        delivery_log.noted_delivery(inbound, request.gateway.clock(), status=OK, reason=reason)
    )


async def _ingest(
    request: GatewayRequest,
    inbound: InboundRequest,
    verified: VerifiedWebhookRequest,
    trigger: Json,
    encoded: EncodedTrigger,
) -> tuple[AcceptanceResult, bool]:
    """Store the run of a request; return it, or the earlier one of a repetition, and whether its start is deferred.

    `encoded` is the JSON of `trigger`, the output of the trigger node. A large body is durable as a blob before its
    run. Raises a 503 error if the blob storage does not answer, and those of limits and ingest.
    """
    gateway = request.gateway
    idempotency_key = _idempotency_key(request, inbound, verified)
    is_deferred = False
    execution_id, text = ids.new_id("exec"), None if encoded.is_large else inbound.payload
    if encoded.is_large and idempotency_key is not None:
        # A repetition needs no second copy of its body.
        earlier = await gateway.ingestor.find_repetition(inbound, idempotency_key, status=ACCEPTED)
        if earlier is not None:
            return earlier, False

    async def plan(target: RunTarget) -> RunInput:
        nonlocal is_deferred, text
        is_deferred = target.is_deferred
        await gateway.verifier.verify_again(verified.signature, target)
        await gateway.capacity.require_backlog(target.workflow)
        if text is None:
            owner = BlobOwner(target.workflow.organization_id, execution_id)
            try:
                text = await large_values.store_body(gateway.blobs, owner, encoded)
            except BlobsUnavailable as error:
                raise errors.not_ready(f"{error}: try again") from error
        return RunInput(trigger, text, idempotency_key=idempotency_key, execution_id=execution_id)

    accepted = await gateway.ingestor.ingest_request(
        verified.sender.caller, inbound, webhook_triggers.KIND, plan, idempotency_key, status=ACCEPTED
    )
    return accepted, is_deferred


def _idempotency_key(
    request: GatewayRequest, inbound: InboundRequest, verified: VerifiedWebhookRequest
) -> IdempotencyKey | None:
    """Return the idempotency key of a request: from the sender's signed id, else `Idempotency-Key`, else
    `webhook-id`.

    None without them. With `Idempotency-Key` the content must be equal. A signed id also becomes the
    deduplication key of `inbound`. Raises a 400 error for an invalid header.
    """
    workflow_id = str(inbound.workflow_id)
    if verified.signature.delivery_key is not None:
        inbound.deduplication_key = idempotency.derive_key(
            DELIVERY, workflow_id, verified.signature.delivery_key
        )
        return inbound.deduplication_key
    given = read_idempotency_key(request.headers)
    if given is not None:
        key = idempotency.derive_key(NAMED, workflow_id, given)
        return replace(key, fingerprint=inbound.content_hash, lifetime_seconds=limits.IDEMPOTENCY_SECONDS)
    name = verified.sent.headers.single("webhook-id")
    return (
        idempotency.derive_key(DELIVERY, workflow_id, signatures.delivery_key("webhook-id", name))
        if name
        else None
    )


async def _await_response(
    request: GatewayRequest,
    hook: WebhookTrigger,
    accepted: AcceptanceResult,
    inbound: InboundRequest,
    until: float,
) -> ASGIApp:
    """Return the response that the run gives; without one, report its end, or at the loop's time `until` that it
    continues.

    Raises a 500 error if the run fails without a response.
    """
    key = ExecutionKey(accepted.execution_id, inbound.shard)
    seconds = until - asyncio.get_running_loop().time()
    standing = await webhook_responses.await_answer(
        request.gateway.database, request.gateway.waiting, key, inbound, seconds
    )
    if standing is not None and standing.answer is not None:
        return WorkflowAnswer(standing.answer, _replay_headers(accepted))
    if standing is None or standing.status not in TERMINAL_STATUSES:
        return _answer_accepted(request, hook, accepted)
    if standing.status is not ExecutionStatus.COMPLETED:
        raise errors.execution_failed(accepted.execution_id)
    shape = WebhookReceipt(status=WebhookStatus.COMPLETED, execution_id=accepted.execution_id)
    return JsonResponse(shape, headers=_build_headers(request, accepted))


def _answer_accepted(
    request: GatewayRequest, hook: WebhookTrigger, accepted: AcceptanceResult
) -> JsonResponse:
    shape = WebhookReceipt(status=WebhookStatus.ACCEPTED, execution_id=accepted.execution_id)
    # Slack shows anything but 200 as a failure to the person who typed a command.
    status = OK if hook.verification.provider is SigningProvider.SLACK else ACCEPTED
    return JsonResponse(shape, status=status, headers=_build_headers(request, accepted))


def _build_headers(request: GatewayRequest, accepted: AcceptanceResult) -> Mapping[str, str]:
    return {**location(request.gateway.settings, accepted.execution_id), **_replay_headers(accepted)}


def _replay_headers(accepted: AcceptanceResult) -> Mapping[str, str]:
    return idempotency.REPLAYED if accepted.verdict is AcceptanceVerdict.REPEATED else {}
