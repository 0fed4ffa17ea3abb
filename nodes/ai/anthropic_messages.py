"""Messages as Anthropic defined them: requests, and answers as a stream of content blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.model_calls import (
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelCallFailed,
    ProviderContent,
    RequestedToolCall,
    TokenUsage,
    estimate_input_tokens,
    estimate_tokens,
)
from nodes.ai import answer_schemas, call_ids, provider_json
from nodes.ai.provider_json import MAX_NAME_CHARACTERS, read_count, read_text

if TYPE_CHECKING:
    from nodes.ai.model_connection import ModelConnection

PATH: Final = "messages"
JSON_MODE: Final[Mapping[str, Any] | None] = None
VERSION: Final = "2023-06-01"
KEY_HEADER: Final = "x-api-key"
_FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "end_turn": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "max_tokens": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.REFUSAL,
}
_PLAIN_BLOCKS: Final = frozenset({"text", "tool_use"})
"""Content blocks of which text and tool calls hold everything."""


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def build_key_headers(model: ModelConnection) -> dict[str, str]:
    """Return the headers with the key of the provider, if any, and the version of the protocol."""
    key = {model.key_header or KEY_HEADER: model.key} if model.key else {}
    return {"anthropic-version": VERSION, **key}


def build_body(model: ModelConnection, request: ChatRequest) -> dict[str, Any]:
    """Return the body of a request; a schema is sent only if the model is known to follow it, and the provider enforces
    it.

    The temperature of the request is left out: the protocol has none any more.
    """
    body: dict[str, Any] = {
        "model": model.vendor_model_id,
        "max_tokens": request.max_tokens,
        "messages": _build_messages(call_ids.unify(request.messages, model.id), model.id),
        "stream": True,
    }
    system = [message.content for message in request.messages if message.role is MessageRole.SYSTEM]
    if system:
        body["system"] = "\n\n".join(system)
    wanted = request.output_schema if model.follows_schemas else None
    if wanted is not None and (schema := _narrow_schema(wanted)) is not None:
        body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    if request.tools:
        body["tools"] = [
            {
                "name": tool.name,
                "description": tool.description,
                "input_schema": {"type": "object", **tool.parameters},
            }
            for tool in request.tools
        ]
    elif called := dict.fromkeys(call.name for message in request.messages for call in message.tool_calls):
        # The protocol refuses calls and results without their tools: these are named, and can't be called.
        body["tools"] = [{"name": name, "input_schema": {"type": "object"}} for name in called]
        body["tool_choice"] = {"type": "none"}
    if request.forced_tool:
        body["tool_choice"] = {"type": "tool", "name": request.forced_tool}
    elif request.tools:
        # The conversation goes on with the next turn, which reads its beginning from the cache.
        body["cache_control"] = {"type": "ephemeral"}
    return body


def build_image_question(text: str, image: str) -> Sequence[Mapping[str, Any]]:
    """Return the blocks of a text and a PNG image in Base64, as the parts of `ProviderContent`."""
    source = {"type": "base64", "media_type": "image/png", "data": image}
    return [{"type": "image", "source": source}, {"type": "text", "text": text}]


def accepts_schema(schema: Mapping[str, Any]) -> bool:
    """Return whether the provider accepts a schema of an answer; it refuses a schema that it doesn't enforce as a
    whole.
    """
    return _narrow_schema(schema) is not None


def _narrow_schema(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a schema as the provider enforces it, without bounds; None if it doesn't enforce it."""
    closed = answer_schemas.close_objects(schema, keeps_bounds=False)
    is_enforced = closed is not None and answer_schemas.is_enforced(closed, needs_all_fields=False)
    return closed if is_enforced else None


def adapt_body(body: Mapping[str, Any], refusal: str) -> dict[str, Any] | None:
    """Return a body without `cache_control` if the server's message `refusal` names that field, as older servers do;
    else None.
    """
    if "cache_control" in refusal and "cache_control" in body:
        return {name: value for name, value in body.items() if name != "cache_control"}
    return None


def _build_messages(messages: Sequence[ChatMessage], model_id: str) -> list[dict[str, Any]]:
    """Return the messages in the form of the protocol, without system messages, which are apart in its body.

    Messages in a row with the same role are joined: all results of the tool calls of an answer have to be in the next
    message, before any text.
    """
    built: list[dict[str, Any]] = []
    for message in messages:
        if message.role is MessageRole.SYSTEM:
            continue
        role = "assistant" if message.role is MessageRole.ASSISTANT else "user"
        blocks = _build_blocks(message, model_id)
        if built and built[-1]["role"] == role:
            built[-1]["content"] += blocks
        elif blocks:
            built.append({"role": role, "content": blocks})
    return built


def _build_blocks(message: ChatMessage, model_id: str) -> list[Any]:
    """Return the content blocks of a message, as the model itself has sent them if it wrote the message.

    An empty text is left out, since the provider refuses it.
    """
    if message.role is MessageRole.TOOL:
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content}]
    own = message.provider_content
    if own is not None and own.model_id == model_id:
        return list(own.parts)
    blocks: list[Any] = [{"type": "text", "text": message.content}] if message.content else []
    blocks.extend(
        {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments or {}}
        for call in message.tool_calls
    )
    return blocks


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


class _BlockDraft(msgspec.Struct):
    """Content block whose pieces arrive one by one."""

    block: dict[str, Any]
    """Block as it began; pieces of text, thoughts and signatures are added."""
    json: str = ""
    """JSON of the input of a tool, as far as it has arrived."""

    def extend(self, field: str, piece: object) -> str:
        """Append a piece to the text `field` of the block, and return the piece; a piece that is no text adds and
        returns an empty text.
        """
        text = read_text(piece)
        self.block[field] = read_text(self.block.get(field)) + text
        return text


def create_parser(model: ModelConnection, request: ChatRequest) -> AnthropicAnswerParser:
    """Return a parser for the answer to a request."""
    return AnthropicAnswerParser(model, request)


class AnthropicAnswerParser:
    """Parser of one answer, fed with the data of its events."""

    def __init__(self, model: ModelConnection, request: ChatRequest) -> None:
        self._model_id = model.id
        self._request = request
        self._drafts: dict[object, _BlockDraft] = {}
        self._finish_reason: FinishReason | None = None
        self._usage: dict[str, Any] = {}
        self._model = ""

    def feed(self, data: bytes) -> str:
        """Add the data of one event, and return the text that it adds to the answer; unknown events add nothing.

        Raises `ModelCallFailed` for an error of the provider, and for data that is no JSON object.
        """
        event = provider_json.read_event(data)
        match event.get("type"):
            case "message_start":
                self._take_message(event.get("message"))
            case "message":  # Servers that ignore `stream` answer with a whole message.
                self._take_message(event)
                return "".join(self._list_texts())
            case "content_block_start":
                return self._begin_block(event.get("index"), event.get("content_block"))
            case "content_block_delta":
                return self._take_delta(event.get("index"), event.get("delta"))
            case "message_delta":
                self._take_end(event.get("delta"))
                self._take_usage(event.get("usage"))
            case "error":
                raise build_stream_failure(event.get("error"))
        return ""

    def finish(self) -> ChatAnswer:
        """Return the complete answer; raises `ModelCallFailed` if the stream has ended before it."""
        if self._finish_reason is None:
            raise provider_json.build_broken_answer()
        calls = tuple(self._list_calls())
        text = "".join(self._list_texts())
        return ChatAnswer(
            text, self._finish_reason, self._read_usage(text), self._model, calls, self._keep_content(calls)
        )

    def _take_message(self, message: object) -> None:
        if not isinstance(message, dict):
            return
        self._model = read_text(message.get("model"))
        content = message.get("content")
        for index, block in enumerate(content if isinstance(content, list) else ()):
            self._begin_block(index, block)
        self._take_end(message)
        self._take_usage(message.get("usage"))

    def _take_end(self, delta: object) -> None:
        reason = delta.get("stop_reason") if isinstance(delta, dict) else None
        if isinstance(reason, str) and reason:
            self._finish_reason = _FINISH_REASONS.get(reason, FinishReason.OTHER)

    def _take_usage(self, usage: object) -> None:
        """Update the token counts by the totals in an event; counts that are missing or null in it stay."""
        if isinstance(usage, dict):
            self._usage |= {name: value for name, value in usage.items() if value is not None}

    def _begin_block(self, index: object, block: object) -> str:
        if not isinstance(block, dict):
            return ""
        self._drafts[index] = _BlockDraft(dict(block))
        return read_text(block.get("text")) if block.get("type") == "text" else ""

    def _take_delta(self, index: object, delta: object) -> str:
        """Add a piece to the block with this index, and return the text that it adds to the answer; unknown pieces add
        nothing.
        """
        draft = self._drafts.get(index)
        if draft is None or not isinstance(delta, dict):
            return ""
        match delta.get("type"):
            case "text_delta":
                return draft.extend("text", delta.get("text"))
            case "input_json_delta":
                draft.json += read_text(delta.get("partial_json"))
            case "thinking_delta":
                draft.extend("thinking", delta.get("thinking"))
            case "signature_delta":
                draft.extend("signature", delta.get("signature"))
        return ""

    def _list_texts(self) -> list[str]:
        blocks = [draft.block for draft in self._drafts.values()]
        return [read_text(block.get("text")) for block in blocks if block.get("type") == "text"]

    def _list_calls(self) -> list[RequestedToolCall]:
        """Return the tool calls of the answer, each with a unique id, and with its arguments or the problem
        with them.
        """
        calls: list[RequestedToolCall] = []
        ids: set[str] = set()
        for draft in self._drafts.values():
            block = draft.block
            if block.get("type") == "tool_use":
                arguments, problem = provider_json.read_tool_arguments(draft.json, block.get("input"))
                call_id = read_text(block.get("id"))
                call_id = (
                    call_id if call_id and call_id not in ids else call_ids.make_free_id(len(calls), ids)
                )
                ids.add(call_id)
                name = read_text(block.get("name"))[:MAX_NAME_CHARACTERS]
                calls.append(RequestedToolCall(call_id, name, arguments, problem))
        return calls

    def _keep_content(self, calls: Sequence[RequestedToolCall]) -> ProviderContent | None:
        """Return the content blocks for later requests to the same model; None if the answer has only texts and tool
        calls.
        """
        blocks = [draft.block for draft in self._drafts.values()]
        if all(block.get("type") in _PLAIN_BLOCKS for block in blocks):
            return None
        made = iter(calls)
        parts = [
            _complete_block(block, next(made)) if block.get("type") == "tool_use" else block
            for block in blocks
            if block.get("type") != "text" or block.get("text")
        ]
        return ProviderContent(self._model_id, tuple(parts))

    def _read_usage(self, text: str) -> TokenUsage:
        """Return the token usage with tokens of the provider's cache as input; an estimate, from the answer's `text`
        and tool calls, if the provider gives no count of input or output.
        """
        read = read_count(self._usage, "cache_read_input_tokens")
        written = read_count(self._usage, "cache_creation_input_tokens")
        plain = read_count(self._usage, "input_tokens")
        output = read_count(self._usage, "output_tokens")
        if not (read or written or plain) or not output:
            inputs = "".join(draft.json for draft in self._drafts.values())
            return TokenUsage(
                estimate_input_tokens(self._request), estimate_tokens(text + inputs), is_estimated=True
            )
        thoughts = read_count(self._usage.get("output_tokens_details"), "thinking_tokens")
        return TokenUsage(
            plain + read + written,
            output,
            cache_read_tokens=read,
            cache_write_tokens=written,
            reasoning_tokens=min(thoughts, output),
        )


def _complete_block(block: Mapping[str, Any], call: RequestedToolCall) -> dict[str, Any]:
    """Return `block`, that of a tool call, with the id and the arguments of `call`."""
    return {**block, "id": call.id, "input": call.arguments or {}}


def build_stream_failure(error: object) -> ModelCallFailed:
    """Return the failure of an error that arrives in the middle of an answer, by its type; retryable unless the
    provider refuses the request itself.
    """
    kind = read_text(error.get("type")) if isinstance(error, dict) else ""
    failure = provider_json.build_interruption(error)
    match kind:
        case "rate_limit_error":
            code = "model-rate-limited"
        case "overloaded_error" | "api_error" | "timeout_error":
            code = "model-unavailable"
        case "invalid_request_error":
            return ModelCallFailed(
                failure.message, code="model-request-refused", retryable=False, can_fall_back=False
            )
        case _:
            return failure
    return ModelCallFailed(failure.message, code=code, retryable=True, can_fall_back=True, may_be_billed=True)
