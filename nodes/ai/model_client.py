"""Client of the providers of language models, over the outbound HTTP client with its address checks and limits.

An answer is streamed, so that a broken provider is told from a slow one, and a cancelled node closes the connection at
once. No redirect is followed: a key goes to the address of its data source alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http.client import responses as reasons
from math import isfinite
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from engine.model_calls import (
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelCallFailed,
    ModelProvider,
    ToolDescription,
)
from nodes import redaction
from nodes.ai import anthropic_messages, echo_model, openai_chat, provider_json
from nodes.ai.event_stream import EventStreamParser, EventTooLarge
from nodes.outbound_http import (
    OutboundClient,
    OutboundError,
    OutboundOutageCode,
    OutboundPolicy,
    OutboundRefusalCode,
    OutboundRefused,
    OutboundUnavailable,
)

if TYPE_CHECKING:
    from nodes.ai.model_connection import ModelConnection
    from nodes.outbound_http import IpNetwork, OutboundStream

IDLE_SECONDS: Final = 60.0
TOTAL_SECONDS: Final = 900.0
"""Time of the longest answers. Servers that send comments to keep a connection open would never pause."""
MAX_ERROR_BYTES: Final = 65_536
MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
ANSWER_TOOL: Final = "give_answer"
"""Tool with the schema of an answer, for models that call tools and know no schemas."""
_TOO_MANY_REQUESTS: Final = 429
_PAYMENT_REQUIRED: Final = 402
_NO_CREDIT: Final = frozenset({"insufficient_quota", "billing_error"})
"""Codes of errors that no waiting mends: the account has no credit left."""
_KEY_REFUSED: Final = frozenset({401, 403})
_NOT_FOUND: Final = frozenset({404, 410})
_REDIRECTS: Final = range(300, 400)
_REPEATABLE: Final = frozenset({408, 409, 425})
_FIRST_SERVER_ERROR: Final = 500
_OK: Final = range(200, 300)
_NEVER_SENT: Final = frozenset({OutboundOutageCode.NAME_NOT_RESOLVED, OutboundOutageCode.NOT_CONNECTED})
"""Outages before the first byte of a request. A kept connection that breaks is none of them: its server may have read
the request, so that neither a silent repetition nor the end of the reservation would be safe.
"""


def open_model_outbound(networks: Sequence[IpNetwork], hosts: Collection[str]) -> OutboundClient:
    """Return a new HTTP client that reaches only public providers, and those that the operator allows by network or
    host.
    """
    return OutboundClient(OutboundPolicy(tuple(networks), frozenset(hosts), "model_hosts"))


class AnswerParser(Protocol):
    """Parser of one answer."""

    def feed(self, data: bytes) -> str:
        """Add the data of one event, and return the text that it adds to the answer, possibly empty.

        Raises `ModelCallFailed` for an error of the provider and invalid data.
        """

    def finish(self) -> ChatAnswer:
        """Return the complete answer; raises `ModelCallFailed` if the stream has ended before it."""


class ProviderProtocol(Protocol):
    """Requests and answers in the form of one kind of provider."""

    @property
    def PATH(self) -> str:  # noqa: N802 - a constant of the modules that implement it
        """Path of the requests for answers, after the address of the provider."""

    @property
    def JSON_MODE(self) -> Mapping[str, Any] | None:  # noqa: N802 - as above
        """Fields of a body that restrict the answer to a JSON object; None if the protocol has no such mode."""

    def build_key_headers(self, model: ModelConnection) -> dict[str, str]:
        """Return the headers that authenticate a request."""

    def build_body(self, model: ModelConnection, request: ChatRequest) -> dict[str, Any]:
        """Return the body of a request."""

    def build_image_question(self, text: str, image: str) -> Sequence[Mapping[str, Any]]:
        """Return the content of a message with a text and a PNG image in Base64, as `ProviderContent` has it."""

    def accepts_schema(self, schema: Mapping[str, Any]) -> bool:
        """Return whether requests for an answer may have this schema, if the model follows schemas."""

    def adapt_body(self, body: Mapping[str, Any], refusal: str) -> dict[str, Any] | None:
        """Return a body in which the field that a server has refused by name is removed or renamed; None if it named
        none.

        `refusal` is the message of the server.
        """

    def create_parser(self, model: ModelConnection, request: ChatRequest) -> AnswerParser:
        """Return a parser for the answer to a request."""


PROTOCOLS: Final[Mapping[ModelProvider, ProviderProtocol]] = {
    ModelProvider.OPENAI_COMPATIBLE: openai_chat,
    ModelProvider.ANTHROPIC: anthropic_messages,
}


class ModelClient:
    """Client of all providers."""

    def __init__(self, outbound: OutboundClient) -> None:
        self._outbound = outbound

    async def complete(
        self,
        model: ModelConnection,
        request: ChatRequest,
        *,
        idempotency_key: str,
        on_text: Callable[[str], None] | None = None,
    ) -> ChatAnswer:
        """Send a request and return the complete answer; raises `ModelCallFailed`, whose message has no secrets.

        `on_text` gets the text of the answer while it is written, without the key of the provider.

        No provider promises that a repeated request is not billed again. `idempotency_key` is for gateways that honor
        it.
        """
        if model.provider is ModelProvider.ECHO:
            answer = echo_model.answer_request(request)
            if on_text is not None:
                on_text(answer.text)
            return answer
        protocol = PROTOCOLS[model.provider]
        sent = _adapt_to_abilities(model, request)
        body = protocol.build_body(model, sent)
        if _uses_json_mode(model, request):
            body |= protocol.JSON_MODE or {}
        with _redact_key(model):
            written = _WrittenText(on_text, [model.key])
            answer = await self._send_adapting(model, sent, body, idempotency_key, written)
        if sent.forced_tool == ANSWER_TOOL:
            answer = _take_answer_from_tool(answer)
        return _redact_answer(answer, model)

    async def _send_adapting(
        self,
        model: ModelConnection,
        request: ChatRequest,
        body: dict[str, Any],
        idempotency_key: str,
        written: _WrittenText,
    ) -> ChatAnswer:
        """Send a body and return the answer; a field that the server refuses by name is removed or renamed, and the
        rest sent again.

        Raises `ModelCallFailed` for any other failure.
        """
        while True:
            try:
                return await self._send(model, request, body, idempotency_key, written)
            except ModelCallFailed as failure:
                adapted = None
                if failure.code == REFUSED:
                    adapted = PROTOCOLS[model.provider].adapt_body(body, failure.message)
                if adapted is None:
                    raise
                body = adapted

    async def _send(
        self,
        model: ModelConnection,
        request: ChatRequest,
        body: Mapping[str, Any],
        idempotency_key: str,
        written: _WrittenText,
    ) -> ChatAnswer:
        """Send a body once and return the answer, whose text goes to `written` while it arrives; raises
        `ModelCallFailed`.
        """
        protocol = PROTOCOLS[model.provider]
        url = f"{model.base_url.rstrip('/')}/{protocol.PATH}"
        headers = {**build_headers(model), "Idempotency-Key": idempotency_key, "Accept": "text/event-stream"}
        content = msgspec.json.encode(body)
        try:
            async with self._outbound.stream(
                "POST",
                url,
                headers=headers,
                body=content,
                idle_seconds=IDLE_SECONDS,
                total_seconds=TOTAL_SECONDS,
                # llama.cpp closes connections that it has promised to keep, after three requests, and a call that
                # breaks may be billed. Without TLS, as in a network of one's own, a new one costs next to nothing.
                is_alone=url.startswith("http:"),
            ) as stream:
                if stream.status not in _OK:
                    raise build_status_failure(stream.status, stream.headers, await _read_error(stream))
                return await _read_answer(stream, protocol.create_parser(model, request), written)
        except OutboundError as error:
            raise _build_transport_failure(error) from error

    async def list_models(self, model: ModelConnection) -> Sequence[str]:
        """Return the names of the models that a provider lists; empty if it lists none, or answers with something else.

        Raises `ModelCallFailed` if it can't be reached or answers with an error.
        """
        url = f"{model.base_url.rstrip('/')}/models"
        with _redact_key(model):
            try:
                response = await self._outbound.request(
                    "GET",
                    url,
                    headers=build_headers(model),
                    timeout_seconds=IDLE_SECONDS,
                    follow_redirects=False,
                )
            except OutboundError as error:
                raise _build_transport_failure(error) from error
            if response.status not in _OK:
                raise build_status_failure(response.status, response.headers, response.body)
            return provider_json.read_model_names(response.body)


@contextmanager
def _redact_key(model: ModelConnection) -> Iterator[None]:
    """Redact the key of a model in the message of a `ModelCallFailed` that the block raises."""
    try:
        yield
    except ModelCallFailed as failure:
        raise failure.with_message(redaction.redact_excerpt(failure.message, [model.key])) from None


def _redact_answer(answer: ChatAnswer, model: ModelConnection) -> ChatAnswer:
    """Return an answer without the key of its model, which a provider may repeat in texts and arguments.

    The content in the provider's own form is left out if it would repeat the key, or is
    nested too deep to be searched: it may be signed, so it isn't changed.
    """
    secrets = [model.key]
    calls = tuple(
        msgspec.structs.replace(
            call,
            arguments=None
            if call.arguments is None
            else redaction.redact_value(dict(call.arguments), secrets),
            problem=redaction.redact_excerpt(call.problem, secrets),
        )
        for call in answer.tool_calls
    )
    content = answer.provider_content
    if content is not None:
        try:
            repeats_key = any(redaction.redact_value(dict(part), secrets) != part for part in content.parts)
        except RecursionError:
            repeats_key = True
        content = None if repeats_key else content
    return msgspec.structs.replace(
        answer,
        text=redaction.redact_text(answer.text, secrets),
        model=redaction.redact_text(answer.model, secrets),
        tool_calls=calls,
        provider_content=content,
    )


def build_headers(model: ModelConnection) -> dict[str, str]:
    """Return the headers of a request, with the key of the provider."""
    return {
        "Content-Type": "application/json",
        **model.headers,
        **PROTOCOLS[model.provider].build_key_headers(model),
    }


def _adapt_to_abilities(model: ModelConnection, request: ChatRequest) -> ChatRequest:
    """Return a request for a value of a schema in the best form that the model supports: the schema itself; else words,
    with the JSON mode of the provider; else a tool; else words alone. Unchanged without a schema.
    """
    schema = request.output_schema
    if schema is None or _follows_schema(model, schema):
        return request
    if _uses_json_mode(model, request):
        return _ask_for_schema(request, schema)
    if model.calls_tools and not request.tools and schema.get("type") == "object":
        tool = ToolDescription(ANSWER_TOOL, "Gives the answer.", schema)
        return msgspec.structs.replace(request, output_schema=None, tools=(tool,), forced_tool=tool.name)
    return _ask_for_schema(request, schema)


def _follows_schema(model: ModelConnection, schema: Mapping[str, Any]) -> bool:
    """Return whether the schema of an answer is sent to the provider as a schema, because model and
    provider follow it.
    """
    return model.follows_schemas and PROTOCOLS[model.provider].accepts_schema(schema)


def _uses_json_mode(model: ModelConnection, request: ChatRequest) -> bool:
    """Return whether the provider restricts the answer to a JSON object, whose schema the model gets in words.

    Providers refuse that mode beside tools, or ignore it.
    """
    schema = request.output_schema
    return (
        schema is not None
        and schema.get("type") == "object"
        and not request.tools
        and model.has_json_mode
        and PROTOCOLS[model.provider].JSON_MODE is not None
        and not _follows_schema(model, schema)
    )


def _take_answer_from_tool(answer: ChatAnswer) -> ChatAnswer:
    """Return an answer with the arguments of the tool `ANSWER_TOOL` as its text; unchanged if the model hasn't called
    that.
    """
    called = next((call for call in answer.tool_calls if call.name == ANSWER_TOOL), None)
    if called is None:
        return answer
    text = "" if called.arguments is None else msgspec.json.encode(called.arguments).decode()
    reason = FinishReason.STOP if answer.finish_reason is FinishReason.TOOL_CALLS else answer.finish_reason
    return msgspec.structs.replace(
        answer, text=text, finish_reason=reason, tool_calls=(), provider_content=None
    )


def _ask_for_schema(request: ChatRequest, schema: Mapping[str, Any]) -> ChatRequest:
    """Return a request whose system prompt asks for one JSON value of the schema, for models that don't
    follow schemas.
    """
    wanted = (
        "Answer with one JSON value that is valid by this JSON Schema, and with nothing else:"
        f" {msgspec.json.encode(schema).decode()}"
    )
    messages = list(request.messages)
    if messages and messages[0].role is MessageRole.SYSTEM:
        messages[0] = ChatMessage(MessageRole.SYSTEM, f"{messages[0].content}\n\n{wanted}")
    else:
        messages.insert(0, ChatMessage(MessageRole.SYSTEM, wanted))
    return msgspec.structs.replace(request, messages=tuple(messages))


class _WrittenText:
    """Text of an answer, passed on while it is written, without secrets that arrive in several pieces."""

    def __init__(self, on_text: Callable[[str], None] | None, secrets: Sequence[str]) -> None:
        self._on_text = on_text
        self._redactor = redaction.PieceRedactor(secrets)

    def add(self, text: str) -> None:
        if self._on_text is not None and text:
            self._pass_on(self._redactor.feed(text))

    def finish(self) -> None:
        """Pass on the end of the text that was held back; the answer has ended."""
        if self._on_text is not None:
            self._pass_on(self._redactor.finish())

    def _pass_on(self, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(text)


async def _read_answer(stream: OutboundStream, parser: AnswerParser, written: _WrittenText) -> ChatAnswer:
    """Read the answer from a stream of events, or one JSON document of a server that doesn't stream, and return it
    whole.

    The text of the answer goes to `written` while it arrives. Raises `ModelCallFailed` for an event of over 4 MB and an
    invalid answer, and `OutboundError` if the stream breaks off.
    """
    if stream.headers.get("content-type", "").lower().startswith("application/json"):
        written.add(parser.feed(b"".join([piece async for piece in stream])))
        written.finish()
        return parser.finish()
    events = EventStreamParser()
    try:
        async for piece in stream:
            for data in events.feed(piece):
                written.add(parser.feed(data))
        for data in events.finish():
            written.add(parser.feed(data))
    except EventTooLarge as error:
        message = "The provider sent an event that is too large"
        raise ModelCallFailed(
            message, code="model-invalid-answer", retryable=False, can_fall_back=True, may_be_billed=True
        ) from error
    finished = parser.finish()
    written.finish()
    return msgspec.structs.replace(finished, is_streamed=True)


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED: Final = "model-request-refused"
RATE_LIMITED: Final = "model-rate-limited"


async def _read_error(stream: OutboundStream) -> bytes:
    """Return the start of the body of an error response, about 64 KiB."""
    found = bytearray()
    async for piece in stream:
        found += piece
        if len(found) >= MAX_ERROR_BYTES:
            break
    return bytes(found)


def build_status_failure(status: int, headers: Mapping[str, str], body: bytes) -> ModelCallFailed:
    """Return the failure for an error status, with the provider's message if the body is JSON.

    It is retryable for a rate limit, 408, 409, 425 and errors of the server. Another model may do better except after a
    refusal of the request itself, the code `model-request-refused`.
    """
    said, error_code = provider_json.read_error(body)
    answered = f"The provider answered {status} {reasons.get(status, '')}".rstrip()
    message = f"{answered}: {said}" if said else answered
    if status in _KEY_REFUSED:
        return ModelCallFailed(message, code="model-key-refused", retryable=False, can_fall_back=True)
    if status in _NOT_FOUND:
        return ModelCallFailed(message, code="model-not-available", retryable=False, can_fall_back=True)
    if status in _REDIRECTS:
        return ModelCallFailed(
            f"{answered}: redirects are not followed. Correct `baseUrl` in the data source of the model",
            code="model-redirected",
            retryable=False,
            can_fall_back=True,
        )
    if status == _PAYMENT_REQUIRED or error_code in _NO_CREDIT:
        return ModelCallFailed(message, code="model-credit-exhausted", retryable=False, can_fall_back=True)
    if status == _TOO_MANY_REQUESTS:
        return ModelCallFailed(
            message,
            code=RATE_LIMITED,
            retryable=True,
            can_fall_back=True,
            retry_after_seconds=_read_retry_after(headers),
        )
    if status in _REPEATABLE or status >= _FIRST_SERVER_ERROR:
        return ModelCallFailed(
            message,
            code="model-unavailable",
            retryable=True,
            can_fall_back=True,
            retry_after_seconds=_read_retry_after(headers),
        )
    return ModelCallFailed(message, code=REFUSED, retryable=False, can_fall_back=False)


def _read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of `Retry-After`, up to a day; None without a valid value.

    A date counts from the `Date` of the response, since the clocks of providers differ from this one.
    """
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            until, now = (parsedate_to_datetime(each) for each in (text, headers.get("date", "")))
            seconds = (until - now).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS) if isfinite(seconds) else None


def _build_transport_failure(error: OutboundError) -> ModelCallFailed:
    """Return the failure of a request without a complete response: retryable, unless the client has refused the request
    or its response.
    """
    match error:
        case OutboundUnavailable():
            return ModelCallFailed(
                f"The provider can't be reached: {error.message}",
                code="model-unavailable",
                retryable=True,
                can_fall_back=True,
                may_be_billed=error.code not in _NEVER_SENT,
            )
        case OutboundRefused():
            return ModelCallFailed(
                f"The provider can't be used: {error.message}",
                code=error.code.value,
                retryable=False,
                can_fall_back=True,
                may_be_billed=error.code is OutboundRefusalCode.RESPONSE_TOO_LARGE,
            )
    return ModelCallFailed(
        str(error), code="model-unavailable", retryable=True, can_fall_back=True, may_be_billed=True
    )
