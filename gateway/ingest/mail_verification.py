"""Verification of mails: by key or token, or by the mail services and credentials in the trigger's config.

The saved config counts, not the deployed one, so that changes apply at once. Secrets come from data sources
that the workflow's owner may read. Without configuration, no anonymous mail is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias, TypeVar

import msgspec
import structlog

from concurrency import offload
from gateway.http import errors
from gateway.http.client_address import client_of
from gateway.http.errors import ApiError
from gateway.http.sender import RequestSender, refuse_sender
from gateway.ingest import trigger_secrets
from journal.unparsed_mail import ScreeningRules
from models.access import ApiCaller, KeyScope, UserRole
from models.workflow_triggers import TriggerKind
from senders import basic_auth, mail_kinds, mailgun, sendgrid, sns
from senders import signatures as sent_signatures
from senders.mail_kinds import MailKind
from senders.request_refusal import RequestRefused

if TYPE_CHECKING:
    from gateway.state import GatewayState
    from journal.definition_snapshot import LoadedWorkflow
    from senders.sender_request import SenderRequest
    from senders.signatures import SignatureResult

log = structlog.get_logger()

T = TypeVar("T")
NonEmptyText: TypeAlias = Annotated[str, msgspec.Meta(min_length=1)]

SENDGRID: Final = frozenset({MailKind.SENDGRID_PARSED, MailKind.SENDGRID_RAW})
MAILGUN: Final = frozenset(
    {
        MailKind.MAILGUN_PARSED,
        MailKind.MAILGUN_RAW,
        MailKind.MAILGUN_STORED,
        MailKind.MAILGUN_EVENT,
    }
)
FIRST_REFUSAL: Final = 400
FIRST_SERVER_ERROR: Final = 500
TOO_MANY: Final = 429
_OF_SIGNATURES: Final = frozenset({"missing-signature", "invalid-signature", "stale-signature", "no-secret"})
_FINAL: Final = 406
"""The only code that keeps Mailgun from retrying for eight hours."""


class _SendGrid(msgspec.Struct, frozen=True, rename="camel"):
    public_key: NonEmptyText | list[NonEmptyText]

    @property
    def public_keys(self) -> Sequence[str]:
        return [self.public_key] if isinstance(self.public_key, str) else self.public_key


class _Mailgun(msgspec.Struct, frozen=True, rename="camel"):
    signing_key: NonEmptyText


class _Ses(msgspec.Struct, frozen=True, rename="camel"):
    topics: list[str] = []
    objects: str = ""


class MailTrigger(msgspec.Struct, frozen=True, rename="camel"):
    """Config of an e-mail trigger; secrets are named by the ids of data sources."""

    sendgrid: _SendGrid | None = None
    mailgun: _Mailgun | None = None
    ses: _Ses | None = None
    basic_auth: str = ""
    bearer: str = ""
    require_signature: bool = False
    reject_on: list[str] = []
    max_spam_score: float | None = None
    accept_automatic: bool = False

    @property
    def screening(self) -> ScreeningRules:
        """Rules that the worker applies after it has parsed a mail."""
        return ScreeningRules(self.reject_on, self.max_spam_score, self.accept_automatic)

    @property
    def accepts_anonymous(self) -> bool:
        """Whether mails without a key or token can be accepted."""
        return bool(self.sendgrid or self.mailgun or self.ses or self.basic_auth or self.bearer)


@dataclass(frozen=True, slots=True)
class MailTarget:
    """Workflow that receives a mail, with the config of its trigger."""

    workflow: LoadedWorkflow
    trigger: MailTrigger

    def sender(self, label: str) -> RequestSender:
        """Return the sender of a verified mail service; it acts for the owner, and may only execute."""
        workflow = self.workflow
        caller = ApiCaller(
            key_id="",
            user_id=workflow.owner_id,
            organization_id=workflow.organization_id,
            shard=workflow.shard,
            role=UserRole.MEMBER,
            scopes=frozenset({KeyScope.WORKFLOWS_EXECUTE}),
        )
        return RequestSender(caller, label)


@dataclass(frozen=True, slots=True)
class MailVerification:
    """Verification result of a mail, for mails without a key or token and for signed mails."""

    label: str
    """Verified sender: `sendgrid`, `mailgun`, `sns`, `basic-auth` or `bearer`; empty when none was needed."""
    delivery_key: str | None = None
    """The sender's own id of the delivery."""


async def find_target(gateway: GatewayState, workflow_id: str, known: RequestSender | None) -> MailTarget:
    """Return the target workflow.

    Raises 404 for authenticated callers, and 401 when the trigger accepts no anonymous mail.
    """
    if known is not None:
        workflow = await gateway.workflows.load(workflow_id, known.caller)
        return MailTarget(workflow, _trigger_config(workflow))
    found = await gateway.workflows.load_for_sender(workflow_id)
    if found is None or not (config := _trigger_config(found)).accepts_anonymous:
        raise refuse_sender()
    return MailTarget(found, config)


async def recognize_service(arrival: SenderRequest) -> MailKind:
    """Return the format of a mail; raises the API error for a request that contains no mail."""
    try:
        return await offload.run(mail_kinds.recognize_mail, arrival)
    except RequestRefused as error:
        raise refusal_error(error) from error


async def verify_mail(
    gateway: GatewayState,
    addressee: MailTarget,
    arrival: SenderRequest,
    kind: MailKind,
    *,
    address: str,
    is_known: bool,
) -> MailVerification:
    """Verify a mail; raises `ApiError` when it is refused, and `RequestRefused` for an invalid signature.

    A signature is checked whenever the mail has one and the trigger has its key, even for authenticated
    callers. Wrong passwords are limited by the client's `address`.
    """
    signed = await _verify_signature(gateway, addressee, arrival, kind)
    if signed is not None:
        return signed
    if addressee.trigger.require_signature:
        raise sent_signatures.missing_signature("a signature that the trigger can check")
    if is_known:
        return MailVerification("")
    return MailVerification(await _try_credentials(gateway, addressee, arrival, client=client_of(address)))


async def _try_credentials(
    gateway: GatewayState, addressee: MailTarget, arrival: SenderRequest, *, client: str
) -> str:
    """Return the kind of a mail's credentials; raises 429 for a client with too many wrong ones."""
    attempt = f"{addressee.workflow.id} {client}"
    offered = f"{addressee.workflow.id} {arrival.headers.single('Authorization')}"
    gateway.mail_attempts.require_allowed(attempt, offered)
    try:
        label = await _verify_credentials(gateway, addressee, arrival)
    except RequestRefused:
        gateway.mail_attempts.note(attempt, offered, is_right=False)
        raise
    if label is None:
        raise refuse_sender()
    gateway.mail_attempts.note(attempt, offered, is_right=True)
    return label


@contextmanager
def answer_once(kind: MailKind) -> Iterator[None]:
    """Translate refusals for each mail service: Mailgun treats only 406 as final."""
    try:
        yield
    except RequestRefused as error:
        raise _final_refusal(kind, refusal_error(error)) from error
    except ApiError as error:
        raise _final_refusal(kind, error) from error


@contextmanager
def refuse_until_later(kind: MailKind) -> Iterator[None]:
    """Answer 503 instead of 429 to mail services, which would give up otherwise."""
    try:
        yield
    except ApiError as error:
        if kind is MailKind.NATIVE or error.status != TOO_MANY:
            raise
        raise errors.not_ready(error.message) from error


def refusal_error(error: RequestRefused) -> ApiError:
    """Return the API error for a refused mail."""
    if error.code in _OF_SIGNATURES:
        return ApiError(401, "invalid-signature", error.message)
    if error.code == "too-large":
        return ApiError(413, "payload-too-large", error.message)
    return ApiError(415 if error.code == "unsupported-media-type" else 400, error.code, error.message)


def no_mail() -> ApiError:
    """Return the refusal of Mailgun events about sent mails."""
    message = "This is an event about a sent mail, not a mail: set another URL for the webhooks of Mailgun"
    return ApiError(_FINAL, "mail-refused", message)


def _final_refusal(kind: MailKind, error: ApiError) -> ApiError:
    if kind not in MAILGUN or not FIRST_REFUSAL <= error.status < FIRST_SERVER_ERROR:
        return error
    if error.status in {TOO_MANY, _FINAL}:
        return error
    return ApiError(_FINAL, "mail-refused", f"{error.code}: {error.message}", details=error.details)


def _trigger_config(workflow: LoadedWorkflow) -> MailTrigger:
    """Return the config of the workflow's trigger; an invalid one accepts nobody."""
    trigger = workflow.trigger
    if trigger is None or trigger.kind != TriggerKind.EMAIL:
        return MailTrigger()
    try:
        return msgspec.convert(trigger.config, MailTrigger)
    except msgspec.ValidationError:
        return MailTrigger(require_signature=True)


# ── signatures ──────────────────────────────────────────────────────────────────────────────────────────────


async def _verify_signature(
    gateway: GatewayState, addressee: MailTarget, arrival: SenderRequest, kind: MailKind
) -> MailVerification | None:
    """Verify a mail's signature; None when the mail has none or the trigger has no key for it."""
    trigger = addressee.trigger
    if kind in SENDGRID and trigger.sendgrid is not None:
        if sendgrid.SIGNATURE_HEADER not in arrival.headers and sendgrid.TIME_HEADER not in arrival.headers:
            return None
        verified = await offload.run(sendgrid.verify, arrival, trigger.sendgrid.public_keys)
        return _build_verification("sendgrid", verified)
    if kind in MAILGUN and trigger.mailgun is not None:
        source = await trigger_secrets.find_secret_source(
            gateway, addressee.workflow, trigger.mailgun.signing_key, {"webhook-secret"}
        )
        verified = await offload.run(mailgun.verify, arrival, [source.secrets.get("secret", "")])
        return _build_verification("mailgun", verified)
    if kind is MailKind.SNS and trigger.ses is not None:
        return _build_verification("sns", await _verify_sns(gateway, arrival, trigger.ses.topics))
    return None


def _build_verification(label: str, verified: SignatureResult) -> MailVerification:
    return MailVerification(label, verified.delivery_key)


async def _verify_sns(
    gateway: GatewayState, arrival: SenderRequest, topics: Sequence[str]
) -> SignatureResult:
    message = await offload.run(sns.parse_sns_message, arrival)
    # Anybody can have a topic: fetch nothing for topics that the trigger doesn't name.
    sns.require_topic(message, topics)
    pem = await gateway.certificates.get(sns.signing_certificate_url(message), arrival.received_at)
    return sns.verify(message, pem, topics, arrival.received_at)


# ── credentials in a header ─────────────────────────────────────────────────────────────────────────────────


async def _verify_credentials(
    gateway: GatewayState, addressee: MailTarget, arrival: SenderRequest
) -> str | None:
    """Verify a mail's credentials and return their kind; None when it has none, or none are configured."""
    trigger = addressee.trigger
    scheme, _, given = (arrival.headers.single("Authorization") or "").partition(" ")
    if scheme.lower() == "basic" and trigger.basic_auth:
        source = await trigger_secrets.find_secret_source(
            gateway, addressee.workflow, trigger.basic_auth, {"http-basic"}
        )
        username, password = source.settings.get("username"), source.secrets.get("password", "")
        basic_auth.verify(arrival, [basic_auth.BasicCredentials(str(username), password)])
        return "basic-auth"
    if scheme.lower() == "bearer" and trigger.bearer:
        source = await trigger_secrets.find_secret_source(
            gateway, addressee.workflow, trigger.bearer, {"http-bearer"}
        )
        expected = sent_signatures.usable_secrets([source.secrets.get("token", "")])
        sent_signatures.require_match([sent_signatures.header_bytes(given.strip())], expected)
        return "bearer"
    return None
