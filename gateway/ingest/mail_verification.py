"""Verification of mails: by key or token, or by the mail services and credentials in the trigger's config.

The saved config counts, not the deployed one, so that changes apply at once. Secrets come from data sources
that the workflow's owner may read. Without configuration, no anonymous mail is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from concurrency import offload
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.http.request_origin import client_of
from gateway.http.sender import RequestSender, refuse_sender
from gateway.ingest import trigger_secrets
from journal.unparsed_mail import ScreeningRules, UnparsedMail
from models.access import ApiCaller, KeyScope, UserRole
from models.workflow_triggers import TriggerKind
from senders import basic_auth, mail_kinds, mailgun, sendgrid, sns
from senders import signatures as sent_signatures
from senders.mail_kinds import MailKind
from senders.request_refusal import RequestRefused

if TYPE_CHECKING:
    from execution.stored_data_sources import StoredDataSources
    from gateway.http.failed_attempts import PasswordAttempts
    from gateway.ingest.sns_certificates import SnsCertificateCache
    from gateway.workflows.workflow_cache import WorkflowCache
    from journal.definition_snapshot import LoadedWorkflow
    from senders.sender_request import SenderRequest
    from senders.signatures import SignatureResult

log = structlog.get_logger()

T = TypeVar("T")
NonEmptyText: TypeAlias = Annotated[str, msgspec.Meta(min_length=1)]

MAILGUN: Final = frozenset(
    {
        MailKind.MAILGUN_PARSED,
        MailKind.MAILGUN_RAW,
        MailKind.MAILGUN_STORED,
        MailKind.MAILGUN_EVENT,
    }
)
UNVERIFIED: Final = "unverified"
"""Label of a sender before the verification of its mail."""
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


class MailTarget(Struct, frozen=True):
    """Workflow that receives a mail, with the config of its trigger."""

    workflow: LoadedWorkflow
    trigger: MailTrigger

    def build_sender(self, label: str) -> RequestSender:
        """Return the sender of a mail without key or token; `label` names the way in which the mail was verified.

        It acts for the workflow's owner, and may only execute.
        """
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

    def build_mail(self, content: SenderRequest, kind: MailKind, known: RequestSender | None) -> VerifiedMail:
        """Return a mail for this target, not verified yet; its sender is `known`, or an unverified one if
        that is None.
        """
        return VerifiedMail(self, content, kind, self.build_sender(UNVERIFIED) if known is None else known)


class VerifiedMail(Struct, frozen=True):
    """Mail of a verified sender, and the workflow that it is for."""

    target: MailTarget
    content: SenderRequest
    kind: MailKind
    sender: RequestSender
    verified_by: str = ""
    """`sendgrid`, `mailgun`, `sns`, `basic-auth` or `bearer`; empty for an unsigned mail with a key or token.
    """
    delivery_key: str | None = None
    """The sender's own id of the delivery."""

    def to_unparsed(self, **fields: Any) -> UnparsedMail:  # noqa: ANN401 - fields of any type
        """Return the mail as it is stored for a worker to parse, with the trigger's rules of screening and
        these further fields.
        """
        screening = self.target.trigger.screening
        return UnparsedMail(self.kind, self.content.received_at, screening=screening, **fields)


class MailVerifier:
    """Verifies mails by the configs of their triggers, with the secrets that these name."""

    def __init__(
        self,
        workflows: WorkflowCache,
        sources: StoredDataSources,
        certificates: SnsCertificateCache,
        attempts: PasswordAttempts,
    ) -> None:
        self._workflows = workflows
        self._sources = sources
        self._certificates = certificates
        self._attempts = attempts

    async def find_target(self, workflow_id: str, known: RequestSender | None) -> MailTarget:
        """Return the workflow that a mail is for, with its trigger's config.

        Raises a 404 error when a known sender may not read the workflow. For unknown senders it raises 401
        when the workflow does not exist or its trigger accepts no anonymous mail.
        """
        if known is not None:
            workflow = await self._workflows.load(workflow_id, known.caller)
            return MailTarget(workflow, _trigger_config(workflow))
        found = await self._workflows.load_for_sender(workflow_id)
        if found is None or not (config := _trigger_config(found)).accepts_anonymous:
            raise refuse_sender()
        return MailTarget(found, config)

    async def verify(
        self, target: MailTarget, content: SenderRequest, known: RequestSender | None, *, address: str
    ) -> VerifiedMail:
        """Verify a mail by signature or credentials, and return it with its sender; raises `ApiError` when it is
        refused.

        `known` is the sender with a key or token, None without. A signature is checked whenever the mail has one and
        the trigger has its key, even for authenticated callers. Wrong passwords are limited by the client's `address`.
        A trigger that isn't ready is loaded again, since its owner may have corrected it a moment ago.
        """
        kind = await recognize_service(content)
        try:
            return await self._verify(target.build_mail(content, kind, known), known, address)
        except ApiError as error:
            if not error.is_for_owner:
                raise
            workflow = target.workflow
            self._workflows.forget(workflow.organization_id, workflow.id)
            current = await self.find_target(workflow.id, known)
            if current.trigger == target.trigger:
                raise
            return await self._verify(current.build_mail(content, kind, known), known, address)

    async def _verify(self, mail: VerifiedMail, known: RequestSender | None, address: str) -> VerifiedMail:
        """Verify a mail by its signature, its known sender or its credentials, the first of these that there is, and
        return it with the result.

        If the trigger requires a signature, the others don't suffice. Raises `ApiError` for a refused mail, with a
        status that its mail service understands.
        """
        with refuse_until_later(mail.kind), refuse_for_good(mail.kind):
            signed = await self._verify_signature(mail)
            if signed is not None:
                label, verified = signed
                sender = mail.target.build_sender(label) if known is None else known
                return replace(mail, sender=sender, verified_by=label, delivery_key=verified.delivery_key)
            if mail.target.trigger.require_signature:
                raise sent_signatures.missing_signature("a signature that the trigger can check")
            if known is not None:
                return mail
            label = await self._try_credentials(mail, client=client_of(address))
            return replace(mail, sender=mail.target.build_sender(label), verified_by=label)

    async def _verify_signature(self, mail: VerifiedMail) -> tuple[str, SignatureResult] | None:
        """Verify a mail's signature; return the kind of its sender, and the result.

        None when the trigger has no key for its format, and for an unsigned mail of SendGrid. Raises `RequestRefused`
        for a wrong one, and if Mailgun or SNS has not signed; 503 while the key or certificate can't be read.
        """
        trigger = mail.target.trigger
        if mail.kind in mail_kinds.SENDGRID_KINDS and trigger.sendgrid is not None:
            if (
                sendgrid.SIGNATURE_HEADER not in mail.content.headers
                and sendgrid.TIME_HEADER not in mail.content.headers
            ):
                return None
            verified = await offload.run(sendgrid.verify, mail.content, trigger.sendgrid.public_keys)
            return "sendgrid", verified
        if mail.kind in MAILGUN and trigger.mailgun is not None:
            source = await trigger_secrets.find_secret_source(
                self._sources, mail.target.workflow, trigger.mailgun.signing_key, {"webhook-secret"}
            )
            verified = await offload.run(mailgun.verify, mail.content, [source.secrets.get("secret", "")])
            return "mailgun", verified
        if mail.kind is MailKind.SNS and trigger.ses is not None:
            return "sns", await self._verify_sns(mail.content, trigger.ses.topics)
        return None

    async def _verify_sns(self, sent: SenderRequest, topics: Sequence[str]) -> SignatureResult:
        message = await offload.run(sns.parse_sns_message, sent)
        # Anybody can have a topic: fetch nothing for topics that the trigger doesn't name.
        sns.require_topic(message, topics)
        pem = await self._certificates.get(sns.signing_certificate_url(message), sent.received_at)
        return sns.verify(message, pem, topics, sent.received_at)

    async def _try_credentials(self, mail: VerifiedMail, *, client: str) -> str:
        """Verify user and password, or the bearer token, of a mail, and return their kind; wrong ones are counted for
        `client`.

        Raises a 401 error without credentials that the trigger accepts, `RequestRefused` for wrong ones, and 429 for a
        client with too many of them.
        """
        attempt = f"{mail.target.workflow.id} {client}"
        offered = f"{mail.target.workflow.id} {mail.content.headers.single('Authorization')}"
        self._attempts.require_allowed(attempt, offered)
        try:
            label = await self._verify_credentials(mail)
        except RequestRefused:
            self._attempts.note(attempt, offered, is_right=False)
            raise
        if label is None:
            raise refuse_sender()
        self._attempts.note(attempt, offered, is_right=True)
        return label

    async def _verify_credentials(self, mail: VerifiedMail) -> str | None:
        """Verify a mail's `Authorization`, and return its kind; None when it has none, or none are configured.

        Raises `RequestRefused` for wrong ones, and 503 while the expected ones can't be read.
        """
        trigger = mail.target.trigger
        scheme, _, given = (mail.content.headers.single("Authorization") or "").partition(" ")
        if scheme.lower() == "basic" and trigger.basic_auth:
            source = await trigger_secrets.find_secret_source(
                self._sources, mail.target.workflow, trigger.basic_auth, {"http-basic"}
            )
            username, password = source.settings.get("username"), source.secrets.get("password", "")
            basic_auth.verify(mail.content, [basic_auth.BasicCredentials(str(username), password)])
            return "basic-auth"
        if scheme.lower() == "bearer" and trigger.bearer:
            source = await trigger_secrets.find_secret_source(
                self._sources, mail.target.workflow, trigger.bearer, {"http-bearer"}
            )
            expected = sent_signatures.usable_secrets([source.secrets.get("token", "")])
            sent_signatures.require_match([sent_signatures.header_bytes(given.strip())], expected)
            return "bearer"
        return None


async def recognize_service(sent: SenderRequest) -> MailKind:
    """Return the format of a mail, by the service that sent it; raises the API error for a request that
    contains no mail.
    """
    try:
        return await offload.run(mail_kinds.recognize_mail, sent)
    except RequestRefused as error:
        raise refusal_error(error) from error


@contextmanager
def refuse_for_good(kind: MailKind) -> Iterator[None]:
    """Translate `RequestRefused` and API errors of the block to answers after which the mail service does not retry.

    For Mailgun, a 4xx other than 429 becomes 406, the only final one; other services get the API error as it is.
    """
    try:
        yield
    except RequestRefused as error:
        raise _final_refusal(kind, refusal_error(error)) from error
    except ApiError as error:
        raise _final_refusal(kind, error) from error


@contextmanager
def refuse_until_later(kind: MailKind) -> Iterator[None]:
    """Translate a 429 error of the block to 503 for mail services, which would drop the mail otherwise."""
    try:
        yield
    except ApiError as error:
        if kind is MailKind.NATIVE or error.status != TOO_MANY:
            raise
        raise errors.not_ready(error.message) from error


def refusal_error(error: RequestRefused) -> ApiError:
    """Return the API error for a refused mail: 401 for signatures, 413, 415, or 400 for others."""
    if error.code in _OF_SIGNATURES:
        return ApiError(401, "invalid-signature", error.message)
    if error.code == "too-large":
        return ApiError(413, "payload-too-large", error.message)
    return ApiError(415 if error.code == "unsupported-media-type" else 400, error.code, error.message)


def no_mail() -> ApiError:
    """Return the 406 error for events of Mailgun about sent mails."""
    message = "This is an event about a sent mail, not a mail: set another URL for the webhooks of Mailgun"
    return ApiError(_FINAL, "mail-refused", message)


def _final_refusal(kind: MailKind, error: ApiError) -> ApiError:
    if kind not in MAILGUN or not FIRST_REFUSAL <= error.status < FIRST_SERVER_ERROR:
        return error
    if error.status in {TOO_MANY, _FINAL}:
        return error
    return ApiError(_FINAL, "mail-refused", f"{error.code}: {error.message}", details=error.details)


def _trigger_config(workflow: LoadedWorkflow) -> MailTrigger:
    """Return the config of the workflow's e-mail trigger; an invalid one accepts no mail, a missing one no
    anonymous mail.
    """
    trigger = workflow.trigger
    if trigger is None or trigger.kind != TriggerKind.EMAIL:
        return MailTrigger()
    try:
        return msgspec.convert(trigger.config, MailTrigger)
    except msgspec.ValidationError:
        return MailTrigger(require_signature=True)
