"""Client of the providers of language models, over the outbound HTTP client with its address checks and limits.

An answer is streamed, so that a broken provider is told from a slow one, and a cancelled node closes the connection at
once. No redirect is followed: a key goes to the address of its data source alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import responses as reasons
from typing import TYPE_CHECKING, Final

import msgspec

from engine.model_calls import (
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    MessageRole,
    ModelCallFailed,
    ModelProvider,
)
from nodes import redaction
from nodes.ai import echo_model, openai_chat
from nodes.ai.event_stream import EventStreamParser, EventTooLarge
from nodes.ai.openai_chat import ChatAnswerParser
from nodes.outbound_http import (
    OutboundClient,
    OutboundError,
    OutboundPolicy,
    OutboundRefused,
    OutboundUnavailable,
)

if TYPE_CHECKING:
    from typing import Any

    from nodes.ai.model_connection import ModelConnection
    from nodes.outbound_http import IpNetwork, OutboundStream

IDLE_SECONDS: Final = 60.0
MAX_ERROR_BYTES: Final = 65_536
MAX_RETRY_AFTER_SECONDS: Final = 86_400.0
_RATE_LIMITED: Final = 429
_KEY_REFUSED: Final = frozenset({401, 403})
_NOT_FOUND: Final = frozenset({404, 410})
_REDIRECTS: Final = range(300, 400)
_REPEATABLE: Final = frozenset({408, 409, 425})
_FIRST_SERVER_ERROR: Final = 500
_OK: Final = range(200, 300)


def open_model_outbound(networks: Sequence[IpNetwork], hosts: Collection[str]) -> OutboundClient:
    """Return the HTTP client for providers: public ones, and those that the operator allows by network or host."""
    return OutboundClient(OutboundPolicy(tuple(networks), allowed_hosts=frozenset(hosts)))


class ModelClient:
    """Client of all providers."""

    def __init__(self, outbound: OutboundClient) -> None:
        self._outbound = outbound

    async def complete(
        self, model: ModelConnection, request: ChatRequest, *, idempotency_key: str
    ) -> ChatAnswer:
        """Send a request and return the complete answer; raises `ModelCallFailed`, whose message has no secrets.

        No provider promises that a repeated request is not billed again. The key is for gateways that honor it.
        """
        if model.provider is ModelProvider.ECHO:
            return echo_model.answer_request(request)
        has_native = model.follows_schemas
        if request.output_schema is not None and not has_native:
            request = _ask_for_schema(request, request.output_schema)
        body = openai_chat.build_body(model.vendor_model_id, request, has_native_schemas=has_native)
        with _redact_key(model):
            answer = await self._send_adapting(model, request, body, idempotency_key)
        return msgspec.structs.replace(answer, text=redaction.redact_text(answer.text, [model.key]))

    async def _send_adapting(
        self, model: ModelConnection, request: ChatRequest, body: dict[str, Any], idempotency_key: str
    ) -> ChatAnswer:
        """Send a body and return the answer; a field that the server refuses by its name is removed, and the
        rest sent again.

        Raises `ModelCallFailed` for any other failure.
        """
        while True:
            try:
                return await self._send(model, request, body, idempotency_key)
            except ModelCallFailed as failure:
                adapted = openai_chat.adapt_body(body, failure.message) if failure.code == REFUSED else None
                if adapted is None:
                    raise
                body = adapted

    async def _send(
        self, model: ModelConnection, request: ChatRequest, body: Mapping[str, Any], idempotency_key: str
    ) -> ChatAnswer:
        url = f"{model.base_url.rstrip('/')}/chat/completions"
        headers = {**build_headers(model), "Idempotency-Key": idempotency_key, "Accept": "text/event-stream"}
        content = msgspec.json.encode(body)
        try:
            async with self._outbound.stream(
                "POST", url, headers=headers, body=content, idle_seconds=IDLE_SECONDS
            ) as stream:
                if stream.status not in _OK:
                    raise build_status_failure(stream.status, stream.headers, await _read_error(stream))
                return await _read_answer(stream, ChatAnswerParser(request))
        except OutboundError as error:
            raise _build_transport_failure(error) from error

    async def list_models(self, model: ModelConnection) -> Sequence[str]:
        """Return the names of the models that a provider lists; raises `ModelCallFailed`.

        Empty if it lists none.
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
            return openai_chat.read_model_names(response.body)


@contextmanager
def _redact_key(model: ModelConnection) -> Iterator[None]:
    """Redact the key of a model in the message of a `ModelCallFailed` that the block raises."""
    try:
        yield
    except ModelCallFailed as failure:
        raise failure.with_message(redaction.redact_text(failure.message, [model.key])) from None


def build_headers(model: ModelConnection) -> dict[str, str]:
    """Return the headers of a request, with the key of the provider."""
    headers = {"Content-Type": "application/json", **model.headers}
    if model.key and model.key_header:
        headers[model.key_header] = model.key
    elif model.key:
        headers["Authorization"] = f"Bearer {model.key}"
    return headers


def _ask_for_schema(request: ChatRequest, schema: Mapping[str, Any]) -> ChatRequest:
    """Return a request that asks for an answer by its schema in words, for models without schemas."""
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


async def _read_answer(stream: OutboundStream, answer: ChatAnswerParser) -> ChatAnswer:
    """Return the answer in a stream of events, or in one JSON document of a server that doesn't stream.

    Raises `ModelCallFailed` for an event of over 4 MB and an invalid answer.
    """
    if stream.headers.get("content-type", "").lower().startswith("application/json"):
        answer.feed(b"".join([piece async for piece in stream]))
        return answer.finish()
    events = EventStreamParser()
    try:
        async for piece in stream:
            for data in events.feed(piece):
                answer.feed(data)
        for data in events.finish():
            answer.feed(data)
    except EventTooLarge as error:
        message = "The provider sent an event that is too large"
        raise ModelCallFailed(
            message, code="model-invalid-answer", retryable=False, can_fall_back=True
        ) from error
    return answer.finish()


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED: Final = "model-request-refused"


async def _read_error(stream: OutboundStream) -> bytes:
    """Return the start of an error's body."""
    found = bytearray()
    async for piece in stream:
        found += piece
        if len(found) >= MAX_ERROR_BYTES:
            break
    return bytes(found)


def build_status_failure(status: int, headers: Mapping[str, str], body: bytes) -> ModelCallFailed:
    """Return the failure of a status that is no success, with the provider's message if it is JSON."""
    said = openai_chat.read_error_message(body)
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
    if status == _RATE_LIMITED:
        return ModelCallFailed(
            message,
            code="model-rate-limited",
            retryable=True,
            can_fall_back=True,
            retry_after_seconds=_read_retry_after(headers),
        )
    if status in _REPEATABLE or status >= _FIRST_SERVER_ERROR:
        return ModelCallFailed(message, code="model-unavailable", retryable=True, can_fall_back=True)
    return ModelCallFailed(message, code=REFUSED, retryable=False, can_fall_back=False)


def _read_retry_after(headers: Mapping[str, str]) -> float | None:
    text = headers.get("retry-after", "").strip()
    return min(float(text), MAX_RETRY_AFTER_SECONDS) if text.isascii() and text.isdecimal() else None


def _build_transport_failure(error: OutboundError) -> ModelCallFailed:
    """Return the failure of a request without a complete response."""
    match error:
        case OutboundUnavailable():
            return ModelCallFailed(
                f"The provider can't be reached: {error.message}",
                code="model-unavailable",
                retryable=True,
                can_fall_back=True,
            )
        case OutboundRefused():
            return ModelCallFailed(
                f"The provider can't be used: {error.message}",
                code=error.code.value,
                retryable=False,
                can_fall_back=True,
            )
    return ModelCallFailed(str(error), code="model-unavailable", retryable=True, can_fall_back=True)
