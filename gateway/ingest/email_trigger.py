"""Mails for the e-mail trigger of a workflow, as JSON or in the formats of mail services and mail servers.

Mails of services are stored unparsed for a worker: the gateway recognizes, verifies and commits them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec
from msgspec.structs import replace

from concurrency import offload
from gateway.http import errors, idempotency
from gateway.http.request import BodyLimit, GatewayRequest
from gateway.http.responses import JsonResponse, location
from gateway.http.wire import GuardedWire, WireStruct, body_of, json_of
from gateway.ingest import delivery_log, mail_verification, trigger_secrets
from gateway.ingest.ingest import RunInput
from gateway.ingest.json_attachments import decode_attachments
from gateway.ingest.mail_verification import MAILGUN, VerifiedMail
from journal.blobs.blob_storage import BlobOwner, BlobsUnavailable
from journal.store import AcceptanceVerdict
from journal.unparsed_mail import StoredMailObject, UnparsedMail
from mail.mail_content import join_lines
from models import ids
from models.data_source_types import DataSourceType
from models.ingest import IngestRoute
from models.workflow_triggers import TriggerKind
from senders import mail_kinds, ses, sns
from senders.mail_kinds import MailKind
from senders.request_refusal import RequestRefused
from senders.sns import SnsMessageType

if TYPE_CHECKING:
    from engine.values import Json
    from execution.stored_data_sources import StoredDataSources
    from gateway.http.errors import ApiError
    from gateway.http.sender import RequestSender
    from gateway.ingest.ingest import RunTarget
    from gateway.ingest.mail_verification import MailTarget
    from journal.store import AcceptanceResult, IdempotencyKey, InboundRequest
    from senders.sender_request import SenderRequest
    from senders.ses import SesMail, SesStoredMail

"""Sender label of a delivery that could not be verified, since the trigger isn't ready."""
CREATED: Final = 201
OK: Final = 200
FORMS: Final = frozenset(
    {
        *(MailKind.SENDGRID_PARSED, MailKind.SENDGRID_RAW),
        *(MailKind.MAILGUN_PARSED, MailKind.MAILGUN_RAW, MailKind.MAILGUN_STORED),
    }
)
_encode = msgspec.json.Encoder().encode
MAX_INLINE_BYTES: Final = 65_536
"""Shorter content is stored in the row: base64 takes a third more space, but saves a file and its fsync."""
MAX_MAIL_SETTING: Final = "PILOTFLAME_MAX_MAIL_BYTES"
MEDIA_TYPE: Final = "application/octet-stream"
NAME: Final = "as-it-came"


class ParsedMailRequest(GuardedWire):
    """Mail that the caller has parsed already."""

    likely_others: ClassVar[frozenset[str]] = frozenset({"bcc", "headers"})

    from_: str = msgspec.field(default="", name="from")
    to: str = ""
    subject: str = ""
    body_text: str | None = msgspec.field(default=None, name="body_text")
    body_html: str | None = msgspec.field(default=None, name="body_html")
    text: str | None = None
    """Alias of `body_text`, which has precedence."""
    html: str | None = None
    """Alias of `body_html`, which has precedence."""
    cc: str = ""
    reply_to: str = msgspec.field(default="", name="reply_to")
    attachments: list[dict[str, Any]] = msgspec.field(default_factory=list)
    """Objects with `filename`, `content_type` and `content` in base64, which becomes a blob of the run."""
    email_headers: dict[str, Any] = msgspec.field(default_factory=dict, name="email_headers")

    def to_trigger_output(self, attachments: Sequence[Json]) -> dict[str, Json]:
        """Return the output of the trigger node for the mail with these stored attachments; header values are
        single lines.
        """
        return {
            "from": join_lines(self.from_),
            "to": join_lines(self.to),
            "subject": join_lines(self.subject),
            "body_text": (self.text if self.body_text is None else self.body_text) or "",
            "body_html": (self.html if self.body_html is None else self.body_html) or "",
            "cc": join_lines(self.cc),
            "reply_to": join_lines(self.reply_to),
            "attachments": list(attachments),
            "email_headers": self.email_headers,
        }


class MailReceipt(WireStruct):
    """Accepted mail with its run."""

    execution_id: str
    trigger_type: str = msgspec.field(default=TriggerKind.EMAIL.value, name="trigger_type")


class MailNotification(WireStruct):
    """Answer to a request of a mail service that contains no mail."""

    noted: str
    """Kind of the request: `subscription-confirmed`, `subscription-ended` or `no-mail`."""


async def receive(request: GatewayRequest) -> JsonResponse:
    """Run a workflow on a mail, through its e-mail trigger.

    Accepts the body below, a whole mail as `message/rfc822`, and the forms and messages that SendGrid Inbound
    Parse, Mailgun routes and Amazon SES (through SNS) post. The trigger token as `key` in the URL
    authenticates them, or their signature, if the trigger's config has its key. Mailgun gets 200, or 406 for
    a final refusal.
    """
    known = None if request.known_sender is None else request.sender
    return await receive_for(request, request.path_params["id"], known)


async def receive_for(request: GatewayRequest, workflow_id: str, known: RequestSender | None) -> JsonResponse:
    """Run a workflow on the mail in a request of the sender `known`, or of an anonymous one if the mail can
    be verified.

    Return the answer. Raises the API errors of verification, limits and ingest, in the form that the mail
    service understands; the deliveries of refusals are stored.
    """
    gateway = request.gateway
    target = await gateway.mail_verifier.find_target(workflow_id, known)
    body = await request.body_up_to(BodyLimit(gateway.settings.max_mail_bytes, MAX_MAIL_SETTING))
    content = request.to_sender_request(body, path=request.url.path)
    sender = target.build_sender(mail_verification.UNVERIFIED) if known is None else known
    inbound = await delivery_log.describe_request(IngestRoute.EMAIL, sender, body, workflow_id=workflow_id)
    request.scope["content_hash"] = inbound.content_hash
    is_noted = nullcontext() if known is None else gateway.deliveries.refusals(inbound)
    redrivable = partial(_add_redrive_content, inbound, target, content)
    async with is_noted, gateway.deliveries.unverified(inbound, redrivable):
        address = request.client.host if request.client else ""
        mail = await gateway.mail_verifier.verify(target, content, known, address=address)
    if known is None:
        inbound = msgspec.structs.replace(
            inbound, user_id=mail.sender.caller.user_id, sender=mail.sender.label
        )
    with mail_verification.refuse_until_later(mail.kind):
        async with gateway.deliveries.refusals(inbound):
            with mail_verification.refuse_for_good(mail.kind):
                match mail.kind:
                    case MailKind.NATIVE:
                        return await _ingest_native(request, mail, inbound)
                    case MailKind.SNS:
                        return await _process_sns_message(request, mail, inbound)
                    case MailKind.RAW:
                        return await _ingest_raw(request, mail, inbound)
                    case MailKind.MAILGUN_EVENT:
                        raise mail_verification.no_mail()
                    case _:
                        return await _ingest_form(request, mail, inbound)


async def _add_redrive_content(inbound: InboundRequest, target: MailTarget, content: SenderRequest) -> None:
    """Set the payload of an unverified mail and its deduplication key, so that its delivery can be redriven.

    Nothing happens for other mails than forms of a mail service, and for bodies over 64 kB.
    """
    kind = await mail_verification.recognize_service(content)
    if kind not in FORMS or len(content.body) > MAX_INLINE_BYTES:
        return
    key = await offload.run(mail_kinds.deduplication_key, content, kind)
    if key is not None:
        inbound.deduplication_key = idempotency.derive_key("mail", target.workflow.id, key)
    unparsed = await offload.run(
        _build_unparsed_mail, target.build_mail(content, kind, None), body=content.body
    )
    inbound.payload = _encode(unparsed.as_json()).decode()


def _build_unparsed_mail(mail: VerifiedMail, body: bytes = b"") -> UnparsedMail:
    """Return the posted form of a mail service as an unparsed mail, which a worker parses later; raises
    `RequestRefused` for a malformed form.

    `body` is the posted form, empty if it is stored as a blob.
    """
    envelope = mail_kinds.parse_envelope(mail.content.form, mail.kind)
    content_type = mail.content.headers.single("Content-Type") or ""
    return mail.to_unparsed(
        content_type=content_type, content=body, sender=envelope.sender, recipients=envelope.recipients
    )


async def _ingest_native(
    request: GatewayRequest, mail: VerifiedMail, inbound: InboundRequest
) -> JsonResponse:
    """Run the workflow on a mail in the API's own JSON form, and return the answer; attachments become blobs of its
    run.

    Raises API errors for invalid fields, a body over the limit and an unavailable blob storage, and the errors of
    `_ingest`.
    """
    content = mail.content.body
    if len(content) > (most := request.gateway.settings.max_body_bytes):
        raise BodyLimit(most).exceeded()
    value = await json_of(request, content)
    parsed = body_of(request, value, ParsedMailRequest)
    attachments = await offload.run(decode_attachments, parsed.attachments)
    idempotency_key = None
    if request.known_sender is not None:
        idempotency_key = await offload.run(
            request.idempotency_key, value, workflow_id=mail.target.workflow.id
        )

    blobs, organization_id = request.gateway.blobs, mail.target.workflow.organization_id
    are_kept = any(one.content is not None for one in attachments)

    async def message(execution_id: str) -> RunInput:
        owner = BlobOwner(organization_id, execution_id)
        try:
            kept = [await one.store(blobs, owner) for one in attachments]
        except BlobsUnavailable as error:
            raise errors.not_ready(f"{error}: try again") from error
        return RunInput(parsed.to_trigger_output(kept), execution_id=execution_id)

    return await _ingest(request, mail, inbound, message, idempotency_key, is_large=are_kept)


async def _ingest_form(request: GatewayRequest, mail: VerifiedMail, inbound: InboundRequest) -> JsonResponse:
    unparsed = await offload.run(_build_unparsed_mail, mail)
    return await _ingest_unparsed(request, mail, inbound, unparsed, mail.content.body)


async def _ingest_raw(request: GatewayRequest, mail: VerifiedMail, inbound: InboundRequest) -> JsonResponse:
    envelope = mail_kinds.parse_raw_envelope(mail.content)
    unparsed = mail.to_unparsed(sender=envelope.sender, recipients=envelope.recipients)
    return await _ingest_unparsed(request, mail, inbound, unparsed, mail.content.body)


async def _process_sns_message(
    request: GatewayRequest, mail: VerifiedMail, inbound: InboundRequest
) -> JsonResponse:
    """Confirm or end a subscription of SNS, or run the workflow on the mail that the message reports; return the
    answer.

    Messages without a mail are recorded as deliveries. Raises `RequestRefused` for a malformed message, and for a
    subscription to a topic that the trigger doesn't name; also the errors of `confirm`, `_find_stored_mail` and
    `_ingest_unparsed`.
    """
    message = await offload.run(sns.parse_sns_message, mail.content)
    match message.type:
        case SnsMessageType.SUBSCRIPTION:
            if mail.verified_by != "sns":
                raise RequestRefused(
                    "unknown-topic",
                    "The trigger doesn't name this topic, so its subscription is not confirmed",
                )
            await request.gateway.certificates.confirm(sns.confirmation_url(message))
            return await _record_other(request, inbound, "subscription-confirmed", message.topic_arn)
        case SnsMessageType.UNSUBSCRIPTION:
            return await _record_other(request, inbound, "subscription-ended", message.topic_arn)
    received = await offload.run(ses.parse_ses_mail, message)
    if received is None:
        return await _record_other(
            request, inbound, "no-mail", "The message of the topic reports no received mail"
        )
    unparsed = mail.to_unparsed(
        sender=received.sender, recipients=received.recipients, verdicts=received.verdicts
    )
    if received.stored is not None:
        stored = await _find_stored_mail(request.gateway.pod_services.sources, mail, received.stored)
        unparsed = msgspec.structs.replace(unparsed, stored=stored)
        return await _ingest_unparsed(request, mail, inbound, unparsed, ses_id=received.mail_id)
    content = _require_content(received)
    return await _ingest_unparsed(request, mail, inbound, unparsed, content, ses_id=received.mail_id)


def _require_content(mail: SesMail) -> bytes:
    if mail.content is None:
        raise RequestRefused(
            "malformed-mail", "The message of SES neither contains the mail nor names where it is stored"
        )
    return mail.content


async def _find_stored_mail(
    sources: StoredDataSources, mail: VerifiedMail, place: SesStoredMail
) -> StoredMailObject:
    """Return the data source of a mail that SES has stored, and the key of its object below the source's prefix, if the
    trigger's config allows its bucket and prefix.

    Raises a 503 error otherwise: SNS treats a 4xx as final, and the owner may correct the config meanwhile.
    """
    config = mail.target.trigger.ses
    if config is None or not config.objects or mail.verified_by != "sns":
        raise errors.trigger_not_ready("The trigger names no data source to read stored mails from")
    source = await trigger_secrets.find_secret_source(
        sources, mail.target.workflow, config.objects, {DataSourceType.S3}
    )
    prefix = str(source.settings.get("prefix") or "").strip("/")
    prefix = f"{prefix}/" if prefix else ""
    if place.bucket != source.settings.get("bucket") or not place.key.startswith(prefix):
        raise errors.trigger_not_ready(
            "The mail is stored outside the bucket or prefix of the trigger's data source"
        )
    return StoredMailObject(source.id, place.key.removeprefix(prefix))


# ── ingest ──────────────────────────────────────────────────────────────────────────────────────────────────


async def _record_other(
    request: GatewayRequest, inbound: InboundRequest, kind: str, detail: str
) -> JsonResponse:
    """Store a delivery of a request without a mail, with its kind and detail as reason, and return the answer 200."""
    gateway = request.gateway
    await gateway.deliveries.note(
        delivery_log.noted_delivery(inbound, gateway.clock(), status=OK, reason=f"{kind}: {detail}")
    )
    return JsonResponse(MailNotification(noted=kind))


async def _ingest_unparsed(
    request: GatewayRequest,
    mail: VerifiedMail,
    inbound: InboundRequest,
    unparsed: UnparsedMail,
    content: bytes | None = None,
    *,
    ses_id: str = "",
) -> JsonResponse:
    """Ingest a mail that a worker parses, and return the answer; content over 64 kB is durable as a blob before its
    run.

    Shorter content is part of the input, and of the delivery if the mail is refused. `content` None means that it is
    stored elsewhere. Raises a 503 error if the blob storage does not answer, and the errors of `_ingest`.
    """
    blobs, organization_id = request.gateway.blobs, mail.target.workflow.organization_id
    if content is not None and len(content) <= MAX_INLINE_BYTES:
        unparsed = msgspec.structs.replace(unparsed, content=content)
        content = None
        inbound.payload = _encode(unparsed.as_json()).decode()
    kept: UnparsedMail | None = None

    async def message(execution_id: str) -> RunInput:
        nonlocal kept
        if kept is None and content is not None:
            try:
                blob = await blobs.put(
                    BlobOwner(organization_id, execution_id), content, media_type=MEDIA_TYPE, name=NAME
                )
            except BlobsUnavailable as error:
                raise errors.not_ready(f"{error}: try again") from error
            kept = msgspec.structs.replace(unparsed, blob=blob)
        return RunInput((kept or unparsed).as_json(), is_read=False, execution_id=execution_id)

    return await _ingest(request, mail, inbound, message, is_large=content is not None, ses_id=ses_id)


async def _ingest(
    request: GatewayRequest,
    mail: VerifiedMail,
    inbound: InboundRequest,
    message: Callable[[str], Awaitable[RunInput]],
    idempotency_key: IdempotencyKey | None = None,
    *,
    is_large: bool = False,
    ses_id: str = "",
) -> JsonResponse:
    """Run the workflow on a mail, or repeat the answer to the same mail; `message(execution_id)` returns the input of
    the run.

    Without an `idempotency_key`, one is derived from the mail if it has an id. `is_large` looks for a repetition before
    content is stored. `ses_id` is the id that Amazon SES has given the mail. Raises the API errors of limits and
    ingest.
    """
    gateway, workflow = request.gateway, mail.target.workflow
    await gateway.rates.take(request, workflow.id, key=mail.sender.caller.key_id)
    key = await offload.run(mail_kinds.deduplication_key, mail.content, mail.kind)
    if idempotency_key is None and key is not None:
        idempotency_key = inbound.deduplication_key = idempotency.derive_key("mail", workflow.id, key)
    own_key = _derive_request_key(mail, key, ses_id)
    status = OK if mail.kind in MAILGUN else CREATED
    # A repetition needs no second copy of its content. But a delivery's own key must be used up first.
    if is_large and idempotency_key is not None and own_key is None:
        earlier = await gateway.ingestor.find_repetition(inbound, idempotency_key, status=status)
        if earlier is not None:
            return _answer(request, earlier, status)
    execution_id = ids.new_id("exec")

    async def plan(_target: RunTarget) -> RunInput:
        await gateway.capacity.require_backlog(workflow)
        made = await message(execution_id)
        return replace(made, idempotency_key=idempotency_key)

    accepted = await gateway.ingestor.ingest_request(
        mail.sender.caller,
        inbound,
        TriggerKind.EMAIL,
        plan,
        idempotency_key,
        status=status,
        own_key=own_key,
        refuse_reuse=_refuse_replay,
    )
    return _answer(request, accepted, status)


def _refuse_replay() -> ApiError:
    return errors.conflict(
        "replayed-delivery", "The signature of this delivery was used for another one before"
    )


def _derive_request_key(mail: VerifiedMail, key: str | None, ses_id: str) -> IdempotencyKey | None:
    """Return a second idempotency key, of the request instead of the mail, by which a signature is accepted for one
    mail only.

    It is derived from the SES id, or from the signed id and the mail's deduplication key `key`; None without either id.
    Several actions of an SES rule may report the same mail, with the same id.
    """
    if ses_id:
        return idempotency.derive_key("ses", mail.target.workflow.id, ses_id)
    if mail.delivery_key is None:
        return None
    return idempotency.derive_key(
        mail.verified_by, mail.target.workflow.id, mail.delivery_key, content=key or ""
    )


def _answer(request: GatewayRequest, accepted: AcceptanceResult, status: int) -> JsonResponse:
    """Return the receipt of an accepted mail with the location of its run, marked as replayed if it was
    accepted before.
    """
    headers = location(request.gateway.settings, accepted.execution_id)
    if accepted.verdict is AcceptanceVerdict.REPEATED:
        headers |= idempotency.REPLAYED
    return JsonResponse(MailReceipt(execution_id=accepted.execution_id), status=status, headers=headers)
