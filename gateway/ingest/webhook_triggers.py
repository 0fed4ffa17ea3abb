"""Config of webhook triggers: accepted methods, networks and events, and the input of their runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from enum import StrEnum
from ipaddress import IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from engine.values import Json
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.http.request import BodyLimit
from gateway.ingest.verification import FIELD, SigningProvider, VerificationConfig, parse_config
from models.workflow_triggers import matching_patterns
from senders import github, sender_event, sender_request, slack
from senders.sender_event import UrlChallenge

if TYPE_CHECKING:
    from journal.definition_snapshot import LoadedWorkflow
    from senders.sender_request import FormPart, PostedForm, RequestHeaders, SenderRequest

KIND: Final = "webhook"
PING: Final = "ping"
_HIDDEN: Final = ("authorization", "cookie", "signature", "secret", "token", "password", "api-key")
"""Parts of the names of headers that contain secrets."""
_ENCODING: Final = "content-encoding"
"""Left out: the body of a run's input is decompressed."""
_TEXTS: Final = frozenset(
    {"application/xml", "application/javascript", "application/yaml", "application/x-ndjson"}
)


class ResponseMode(StrEnum):
    """Time of the answer to the sender."""

    AT_ONCE = "at-once"
    WHEN_DONE = "when-done"


class WebhookConfig(msgspec.Struct, frozen=True, rename="camel"):
    """Config of a webhook trigger, without its verification."""

    allowed_events: list[str] | None = None
    allowed_networks: list[str] | None = None
    methods: tuple[str, ...] = ("POST",)
    max_body_bytes: int = 1_000_000
    respond: ResponseMode = ResponseMode.AT_ONCE
    deadline_seconds: int = 30


class WebhookTrigger(Struct, frozen=True):
    """Webhook trigger with its verification."""

    verification: VerificationConfig
    config: WebhookConfig

    @property
    def body_limit(self) -> BodyLimit:
        """Largest body that the trigger accepts, in bytes, with the name of its setting for the error."""
        return BodyLimit(self.config.max_body_bytes, "`maxBodyBytes` of the trigger")

    def require_method(self, method: str) -> None:
        """Raise a 405 error for a method that the trigger doesn't accept."""
        if method not in self.config.methods:
            raise errors.method_not_allowed(self.config.methods)

    def require_network(self, address: str) -> None:
        """Raise a 403 error for an address outside the networks that the trigger allows; without a list of them, all
        are allowed.
        """
        networks = self.config.allowed_networks
        if networks is not None and not any(_is_in(address, network) for network in networks):
            message = "The trigger accepts no requests from this address"
            raise ApiError(403, "network-not-allowed", message)

    def runs_for(self, event_type: str | None) -> bool:
        """Return whether a request with this event type (None for none) runs the workflow, by the trigger's
        patterns.

        Without a list of allowed events, all do except a ping of GitHub.
        """
        allowed = self.config.allowed_events
        if allowed is None:
            return not (self.verification.provider is SigningProvider.GITHUB and event_type == PING)
        return event_type is not None and not set(matching_patterns(event_type)).isdisjoint(allowed)


def read_webhook(workflow: LoadedWorkflow) -> WebhookTrigger:
    """Return the webhook trigger of a workflow; raises a 422 error when it has none, or an invalid one."""
    trigger = workflow.trigger
    if trigger is None or trigger.kind != KIND:
        raise errors.no_such_trigger(KIND)
    verification = parse_config(trigger.config.get(FIELD))
    try:
        return WebhookTrigger(verification, msgspec.convert(trigger.config, WebhookConfig))
    except msgspec.ValidationError as error:
        message = "The config of the webhook trigger is not valid: the workflow's validation says why"
        raise ApiError(422, "validation-failed", message) from error


def _is_in(address: str, network: str) -> bool:
    """Return whether an address belongs to a network; False for invalid texts. An IPv4-mapped address counts
    as IPv4.
    """
    try:
        sender = ip_address(address)
        if isinstance(sender, IPv6Address):
            sender = sender.ipv4_mapped or sender
        return sender in ip_network(network)
    except ValueError:
        return False


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


class ParsedWebhookRequest(Struct, frozen=True):
    """Event type and body of a request."""

    event_type: str | None
    """Event type in the provider's own terms, if it has one."""
    body: Json


def parse_request(hook: WebhookTrigger, request: SenderRequest) -> ParsedWebhookRequest | UrlChallenge:
    """Return the event type (None without one) and body of a request, or the challenge with which a sender
    checks the address.

    The event type comes from GitHub's header, Slack's event, or the field `type`. Raises `RequestRefused` for
    invalid content.
    """
    match hook.verification.provider:
        case SigningProvider.GITHUB:
            name = request.headers.single("X-GitHub-Event")
            return ParsedWebhookRequest(
                name, github.parse_event(request).data if name else _decode_body(request)
            )
        case SigningProvider.SLACK:
            meaning = slack.parse_event(request)
            if isinstance(meaning, UrlChallenge):
                return meaning
            return ParsedWebhookRequest(meaning.event_type.removeprefix(f"{slack.SOURCE}."), meaning.data)
    body = _decode_body(request)
    event_type = body.get("type") if isinstance(body, dict) else None
    return ParsedWebhookRequest(event_type if isinstance(event_type, str) else None, body)


def build_input(hook: WebhookTrigger, request: SenderRequest, body: Json) -> dict[str, Json]:
    """Return the output of the webhook trigger node for a request: body, headers, query, method and mode of answer.

    A query parameter with several values is a list. Headers with credentials are left out. Raises `RequestRefused` for
    a query with the character NUL.
    """
    query: dict[str, Json] = {
        sender_event.require_storable(name): _one_or_all(
            [sender_event.require_storable(value) for value in values]
        )
        for name, values in request.query.items()
    }
    return {
        "body": body,
        "headers": _select_headers(hook, request.headers),
        "query": query,
        "method": request.method,
        "respond": hook.config.respond.value,
    }


def _select_headers(hook: WebhookTrigger, headers: RequestHeaders) -> dict[str, Json]:
    """Return the headers that a run may see, without credentials, signatures and the encoding.

    Several of one name become one text, joined by commas, as HTTP defines.
    """
    own = {hook.verification.header.lower()} if hook.verification.provider is SigningProvider.HMAC else set()
    return {
        name: ", ".join(headers.values(name))
        for name in headers.names_with_prefix("")
        if name not in own and name != _ENCODING and not any(word in name for word in _HIDDEN)
    }


def _decode_body(request: SenderRequest) -> Json:
    """Return a body, decoded by its media type: JSON, form fields, text, or other bytes as base64.

    An absent one is an empty object. Raises `RequestRefused` for invalid content.
    """
    name = request.media_type.name
    if not request.body:
        return {}
    if request.media_type.is_json:
        return request.json
    if name in {sender_request.URLENCODED_TYPE, sender_request.MULTIPART_TYPE}:
        return _collect_fields(request.form)
    request.require_offloaded()
    if name.startswith("text/") or name.endswith("+xml") or name in _TEXTS:
        return sender_event.require_storable(_decode_text(request))
    return _encode_bytes(request.body, name)


def _decode_text(request: SenderRequest) -> str:
    charset = request.media_type.parameters.get("charset", "utf-8")
    try:
        return request.body.decode(charset)
    except (LookupError, ValueError):
        return sender_request.decode_value(request.body)


def _collect_fields(form: PostedForm) -> dict[str, Json]:
    fields: dict[str, list[Any]] = {}
    for part in form.parts:
        fields.setdefault(sender_event.require_storable(part.name), []).append(_decode_field(part))
    return {name: _one_or_all(values) for name, values in fields.items()}


def _decode_field(part: FormPart) -> Json:
    if not part.is_file:
        return sender_event.require_storable(sender_request.decode_value(part.value))
    return {
        **_encode_bytes(part.value, part.content_type or ""),
        "filename": sender_event.require_storable(part.filename or ""),
    }


def _encode_bytes(content: bytes | memoryview, content_type: str) -> dict[str, Json]:
    return {"base64": b64encode(content).decode(), "contentType": content_type}


def _one_or_all(values: Sequence[Any]) -> Json:
    return values[0] if len(values) == 1 else list(values)
