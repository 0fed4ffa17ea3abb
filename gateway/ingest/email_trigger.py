"""Mails for the e-mail trigger of a workflow, as JSON or in the formats of mail services and mail servers.

Mails of services are stored unparsed for a worker: the gateway recognizes, verifies and commits them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from concurrency import offload
from gateway.http import errors, idempotency
from gateway.http.body_limit import BodyLimit
from gateway.http.errors import ApiError
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, location
from gateway.http.wire import GuardedWire, WireStruct, body_of, json_of
from gateway.ingest import deduplication_keys, inbound_request, ingest, mail_verification, trigger_secrets
from gateway.ingest.ingest import RunInput
from gateway.ingest.json_attachments import decode_attachments
from gateway.ingest.mail_verification import MAILGUN
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
from senders.sender_request import RequestHeaders, SenderRequest
from senders.sns import SnsMessageType

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.http.sender import RequestSender
    from gateway.ingest.inbound_request import InboundRequest
    from gateway.ingest.ingest import RunTarget
    from gateway.ingest.mail_verification import MailTarget, MailVerification
    from journal.store import AcceptanceResult, IdempotencyKey
    from senders.ses import SesMail, SesStoredMail

UNVERIFIED: Final = "unverified"
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

    def given(self, attachments: Sequence[Json]) -> dict[str, Json]:
        """Return the output of the trigger node; header values are single lines, as in a parsed mail."""
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
    """Run a workflow on a mail of an authenticated sender, or of an anonymous one if it can be verified."""
    gateway = request.gateway
    addressee = await mail_verification.find_target(gateway, workflow_id, known)
    content = await request.body_up_to(BodyLimit(gateway.settings.max_mail_bytes, MAX_MAIL_SETTING))
    headers = RequestHeaders(request.scope["headers"])
    arrival = SenderRequest(request.method, request.url.path, {}, headers, content, gateway.clock())
    sender = addressee.sender(UNVERIFIED) if known is None else known
    note = await inbound_request.describe_request(IngestRoute.EMAIL, sender, content, workflow_id=workflow_id)
    request.scope["content_hash"] = note.content_hash
    is_noted = nullcontext() if known is None else gateway.deliveries.refusals(note)
    async with (
        is_noted,
        gateway.deliveries.unverified(note, partial(_add_redrive_content, note, arrival, addressee)),
    ):
        addressee, kind, proof = await _verify_sender(request, addressee, arrival, known)
    if known is None:
        note = replace(note, sender=addressee.sender(proof.label))
    with mail_verification.refuse_until_later(kind):
        async with gateway.deliveries.refusals(note):
            with mail_verification.answer_once(kind):
                verified = VerifiedMail(request, addressee, arrival, kind, proof, note)
                match kind:
                    case MailKind.NATIVE:
                        return await _ingest_native(verified)
                    case MailKind.SNS:
                        return await _process_sns_message(verified)
                    case MailKind.RAW:
                        return await _ingest_raw(verified)
                    case MailKind.MAILGUN_EVENT:
                        raise mail_verification.no_mail()
                    case _:
                        return await _ingest_form(verified)


async def _verify_sender(
    request: GatewayRequest, addressee: MailTarget, arrival: SenderRequest, known: RequestSender | None
) -> tuple[MailTarget, MailKind, MailVerification]:
    """Return the target, format and verification of a mail; raises `ApiError`.

    A trigger that isn't ready is loaded again, since its owner may have corrected it a moment ago.
    """
    kind = await mail_verification.recognize_service(arrival)
    gateway, address = request.gateway, request.client.host if request.client else ""

    async def prove(addressee: MailTarget) -> MailVerification:
        with mail_verification.refuse_until_later(kind), mail_verification.answer_once(kind):
            return await mail_verification.verify_mail(
                gateway, addressee, arrival, kind, address=address, is_known=known is not None
            )

    try:
        return addressee, kind, await prove(addressee)
    except ApiError as error:
        workflow = addressee.workflow
        if not error.is_for_owner:
            raise
        gateway.workflows.forget(workflow.organization_id, workflow.id)
        current = await mail_verification.find_target(gateway, workflow.id, known)
        if current.trigger == addressee.trigger:
            raise
        return current, kind, await prove(current)


async def _add_redrive_content(note: InboundRequest, arrival: SenderRequest, addressee: MailTarget) -> None:
    """Add to a delivery the content that a redrive of an unverified mail needs, and its deduplication key."""
    kind = await mail_verification.recognize_service(arrival)
    if kind not in FORMS or len(arrival.body) > MAX_INLINE_BYTES:
        return
    key = await offload.run(mail_kinds.deduplication_key, arrival, kind)
    if key is not None:
        note.deduplication_key = deduplication_keys.derive_key("mail", addressee.workflow.id, key)
    unparsed = await offload.run(_unparsed_form, arrival, kind, addressee, content=arrival.body)
    note.payload = _encode(unparsed.as_json()).decode()


def _unparsed_form(
    arrival: SenderRequest, kind: MailKind, addressee: MailTarget, content: bytes = b""
) -> UnparsedMail:
    """Return the unparsed form of a mail service, for a worker; raises `RequestRefused`."""
    envelope = mail_kinds.parse_envelope(arrival.form, kind)
    return UnparsedMail(
        kind,
        arrival.received_at,
        content_type=arrival.headers.single("Content-Type") or "",
        content=content,
        sender=envelope.sender,
        recipients=envelope.recipients,
        screening=addressee.trigger.screening,
    )


@dataclass(frozen=True, slots=True)
class VerifiedMail:
    """Accepted mail with its target, format and verification."""

    request: GatewayRequest
    addressee: MailTarget
    arrival: SenderRequest
    kind: MailKind
    proof: MailVerification
    note: InboundRequest

    @property
    def workflow_id(self) -> str:
        return self.addressee.workflow.id

    def unread(self, **fields: Any) -> UnparsedMail:  # noqa: ANN401 - fields of any type
        """Return the unparsed mail, for a worker."""
        return UnparsedMail(
            self.kind, self.arrival.received_at, screening=self.addressee.trigger.screening, **fields
        )


async def _ingest_native(verified: VerifiedMail) -> JsonResponse:
    request, content = verified.request, verified.arrival.body
    if len(content) > (most := request.gateway.settings.max_body_bytes):
        raise BodyLimit(most).exceeded()
    value = await json_of(request, content)
    mail = body_of(request, value, ParsedMailRequest)
    attachments = await offload.run(decode_attachments, mail.attachments)
    idempotency_key = None
    if request.known_sender is not None:
        idempotency_key = await offload.run(request.idempotency_key, value, workflow_id=verified.workflow_id)

    blobs, organization_id = request.gateway.blobs, verified.addressee.workflow.organization_id
    are_kept = any(one.content is not None for one in attachments)

    async def message(execution_id: str) -> RunInput:
        owner = BlobOwner(organization_id, execution_id)
        try:
            kept = [await one.as_json(blobs, owner) for one in attachments]
        except BlobsUnavailable as error:
            raise errors.not_ready(f"{error}: try again") from error
        return RunInput(mail.given(kept), execution_id=execution_id)

    return await _ingest(verified, message, idempotency_key, is_large=are_kept)


async def _ingest_form(verified: VerifiedMail) -> JsonResponse:
    unparsed = await offload.run(_unparsed_form, verified.arrival, verified.kind, verified.addressee)
    return await _ingest_unparsed(verified, unparsed, verified.arrival.body)


async def _ingest_raw(verified: VerifiedMail) -> JsonResponse:
    envelope = mail_kinds.parse_raw_envelope(verified.arrival)
    unparsed = verified.unread(sender=envelope.sender, recipients=envelope.recipients)
    return await _ingest_unparsed(verified, unparsed, verified.arrival.body)


async def _process_sns_message(verified: VerifiedMail) -> JsonResponse:
    """Process an SNS message: confirm or end a subscription, or run the workflow on the mail that it reports."""
    message = await offload.run(sns.parse_sns_message, verified.arrival)
    match message.type:
        case SnsMessageType.SUBSCRIPTION:
            if verified.proof.label != "sns":
                raise RequestRefused(
                    "unknown-topic",
                    "The trigger doesn't name this topic, so its subscription is not confirmed",
                )
            await verified.request.gateway.certificates.confirm(sns.confirmation_url(message))
            return await _record_other(verified, "subscription-confirmed", message.topic_arn)
        case SnsMessageType.UNSUBSCRIPTION:
            return await _record_other(verified, "subscription-ended", message.topic_arn)
    mail = await offload.run(ses.parse_ses_mail, message)
    if mail is None:
        return await _record_other(verified, "no-mail", "The message of the topic reports no received mail")
    unparsed = verified.unread(sender=mail.sender, recipients=mail.recipients, verdicts=mail.verdicts)
    if mail.stored is not None:
        stored = await _store_content(verified, mail.stored)
        unparsed = msgspec.structs.replace(unparsed, stored=stored)
        return await _ingest_unparsed(verified, unparsed, ses_id=mail.mail_id)
    return await _ingest_unparsed(verified, unparsed, _require_content(mail), ses_id=mail.mail_id)


def _require_content(mail: SesMail) -> bytes:
    if mail.content is None:
        raise RequestRefused(
            "malformed-mail", "The message of SES neither contains the mail nor names where it is stored"
        )
    return mail.content


async def _store_content(verified: VerifiedMail, place: SesStoredMail) -> StoredMailObject:
    """Return the object of a mail that SES has stored; the trigger's config must allow its bucket and prefix.

    Raises 503 otherwise: SNS treats a 4xx as final, and the owner may correct the config.
    """
    config = verified.addressee.trigger.ses
    if config is None or not config.objects or verified.proof.label != "sns":
        raise errors.trigger_not_ready("The trigger names no data source to read stored mails from")
    source = await trigger_secrets.find_secret_source(
        verified.request.gateway, verified.addressee.workflow, config.objects, {DataSourceType.S3}
    )
    prefix = str(source.settings.get("prefix") or "").strip("/")
    prefix = f"{prefix}/" if prefix else ""
    if place.bucket != source.settings.get("bucket") or not place.key.startswith(prefix):
        raise errors.trigger_not_ready(
            "The mail is stored outside the bucket or prefix of the trigger's data source"
        )
    return StoredMailObject(source.id, place.key.removeprefix(prefix))


# ── ingest ──────────────────────────────────────────────────────────────────────────────────────────────────


async def _record_other(verified: VerifiedMail, kind: str, detail: str) -> JsonResponse:
    gateway = verified.request.gateway
    await gateway.deliveries.note(
        verified.note.noted_delivery(gateway.clock(), status=OK, reason=f"{kind}: {detail}")
    )
    return JsonResponse(MailNotification(noted=kind))


async def _ingest_unparsed(
    verified: VerifiedMail, unparsed: UnparsedMail, content: bytes | None = None, *, ses_id: str = ""
) -> JsonResponse:
    """Ingest a mail that a worker parses; large content is durable before its run."""
    blobs, organization_id = verified.request.gateway.blobs, verified.addressee.workflow.organization_id
    if content is not None and len(content) <= MAX_INLINE_BYTES:
        unparsed = msgspec.structs.replace(unparsed, content=content)
        content = None
        verified.note.payload = _encode(unparsed.as_json()).decode()
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

    return await _ingest(verified, message, is_large=content is not None, ses_id=ses_id)


async def _ingest(
    verified: VerifiedMail,
    message: Callable[[str], Awaitable[RunInput]],
    idempotency_key: IdempotencyKey | None = None,
    *,
    is_large: bool = False,
    ses_id: str = "",
) -> JsonResponse:
    """Run the workflow on a mail, or repeat the answer to the same mail; `message` makes the run's input.

    `ses_id` is the id that Amazon SES has given the mail.
    """
    gateway, workflow = verified.request.gateway, verified.addressee.workflow
    await gateway.rates.take(verified.request, workflow.id, key=verified.note.sender.caller.key_id)
    key = await offload.run(mail_kinds.deduplication_key, verified.arrival, verified.kind)
    if idempotency_key is None and key is not None:
        idempotency_key = verified.note.deduplication_key = deduplication_keys.derive_key(
            "mail", workflow.id, key
        )
    own_key = _own_key(verified, key, ses_id)
    status = OK if verified.kind in MAILGUN else CREATED
    # A repetition needs no second copy of its content. But a delivery's own key must be used up first.
    if is_large and idempotency_key is not None and own_key is None:
        earlier = await ingest.find_repetition(gateway, verified.note, idempotency_key, status=status)
        if earlier is not None:
            return _answer(verified, earlier, status)
    execution_id = ids.new_id("exec")

    request = verified.request

    async def plan(_ground: RunTarget) -> RunInput:
        await request.gateway.backlog.require_capacity(workflow.organization_id, workflow.id)
        made = await message(execution_id)
        return replace(made, idempotency_key=idempotency_key)

    accepted = await ingest.ingest_request(
        gateway,
        verified.note,
        TriggerKind.EMAIL,
        plan,
        idempotency_key,
        status=status,
        own_key=own_key,
        reused=errors.conflict(
            "replayed-delivery", "The signature of this delivery was used for another one before"
        ),
    )
    return _answer(verified, accepted, status)


def _own_key(verified: VerifiedMail, key: str | None, ses_id: str) -> IdempotencyKey | None:
    """Return the key of the delivery itself, so that a signature of one mail is valid for no other.

    Several actions of an SES rule may report the same mail, with the same id.
    """
    if ses_id:
        return deduplication_keys.derive_key("ses", verified.workflow_id, ses_id)
    if verified.proof.delivery_key is None:
        return None
    return deduplication_keys.derive_key(
        verified.proof.label, verified.workflow_id, verified.proof.delivery_key, content=key or ""
    )


def _answer(verified: VerifiedMail, accepted: AcceptanceResult, status: int) -> JsonResponse:
    headers = location(verified.request.gateway.settings, accepted.execution_id)
    if accepted.verdict is AcceptanceVerdict.REPEATED:
        headers |= idempotency.REPLAYED
    return JsonResponse(MailReceipt(execution_id=accepted.execution_id), status=status, headers=headers)
