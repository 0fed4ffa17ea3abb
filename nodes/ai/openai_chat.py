"""Chat completions as OpenAI defined them: requests, and answers of the many servers that speak them differently.

Azure, vLLM, Ollama, llama.cpp, Mistral, Groq and Gemini's compatible endpoint follow the same form with exceptions.
An answer is accepted in every form that leaves no doubt about its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from engine.model_calls import (
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelCallFailed,
    RequestedToolCall,
    TokenUsage,
    ToolDescription,
    estimate_input_tokens,
    estimate_tokens,
)
from json_text import decoding

END: Final = b"[DONE]"
SCHEMA_NAME: Final = "answer"
MAX_QUOTED_CHARACTERS: Final = 500
_FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "end_turn": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.REFUSAL,
    "refusal": FinishReason.REFUSAL,
}


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def build_body(model: str, request: ChatRequest, *, has_native_schemas: bool) -> dict[str, Any]:
    """Return the body of a request; a schema is passed on only to models that are known to follow it."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [_build_message(message) for message in request.messages],
        "max_tokens": request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.output_schema is not None and has_native_schemas:
        named = {"name": SCHEMA_NAME, "strict": True, "schema": request.output_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    if request.tools:
        body["tools"] = [_build_tool(tool) for tool in request.tools]
    if request.forced_tool:
        body["tool_choice"] = {"type": "function", "function": {"name": request.forced_tool}}
    return body


def adapt_body(body: Mapping[str, Any], refusal: str) -> dict[str, Any] | None:
    """Return a body without the field that a server has refused by name; None if it named none.

    Newer models of OpenAI call `max_tokens` otherwise, and older servers know no `stream_options`. Such a refusal
    costs nothing.
    """
    if "max_completion_tokens" in refusal and "max_tokens" in body:
        rest = {name: value for name, value in body.items() if name != "max_tokens"}
        return {**rest, "max_completion_tokens": body["max_tokens"]}
    if "stream_options" in refusal and "stream_options" in body:
        return {name: value for name, value in body.items() if name != "stream_options"}
    return None


def _build_message(message: ChatMessage) -> dict[str, Any]:
    built: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.role is MessageRole.TOOL:
        built["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        built["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": msgspec.json.encode(call.arguments or {}).decode(),
                },
            }
            for call in message.tool_calls
        ]
    return built


def _build_tool(tool: ToolDescription) -> dict[str, Any]:
    # llama.cpp refuses a tool without `parameters`, so they are sent even if they are empty.
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


class _ToolCallDraft(msgspec.Struct):
    """Tool call whose pieces arrive one by one."""

    index: int | None
    id: str = ""
    name: str = ""
    text: str = ""
    """JSON of the arguments, as far as it has arrived."""
    value: Any = None
    """Arguments of servers that send an object instead of a text."""


class ChatAnswerParser:
    """Parser of one answer, fed with the data of its events."""

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._texts: list[str] = []
        self._refusals: list[str] = []
        self._drafts: list[_ToolCallDraft] = []
        self._finish_reason: FinishReason | None = None
        self._usage: TokenUsage | None = None
        self._model = ""
        self._has_ended = False

    def feed(self, data: bytes) -> str:
        """Add the data of one event, and return the text that it adds to the answer.

        Raises `ModelCallFailed` for an error of the provider, and for data that is no JSON object.
        """
        if data.strip() == END:
            self._has_ended = True
            return ""
        try:
            event = decoding.decode(data)
        except (ValueError, RecursionError) as error:
            raise _build_invalid_answer("an event that is not JSON") from error
        if not isinstance(event, dict):
            raise _build_invalid_answer("an event that is no object")
        if event.get("error"):
            raise build_stream_failure(event["error"])
        self._model = _read_text(event.get("model")) or self._model
        self._usage = _read_usage(event.get("usage")) or self._usage
        choices = event.get("choices")
        added = [self._take_choice(choice) for choice in choices] if isinstance(choices, list) else []
        return "".join(added)

    def finish(self) -> ChatAnswer:
        """Return the complete answer; raises `ModelCallFailed` if the stream has ended before it."""
        if self._finish_reason is None and not self._has_ended:
            raise ModelCallFailed(
                "The model's answer broke off before its end",
                code="model-interrupted",
                retryable=True,
                can_fall_back=True,
            )
        calls = _complete_tool_calls(self._drafts)
        text = "".join(self._texts)
        reason = self._finish_reason or FinishReason.STOP
        refusal = "".join(self._refusals)
        if refusal and not text:
            text, reason = refusal, FinishReason.REFUSAL
        if calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS  # Several servers say `stop` for an answer with calls.
        return ChatAnswer(text, reason, self._usage or self._estimate_usage(text), self._model, calls)

    def _take_choice(self, choice: object) -> str:
        if not isinstance(choice, dict) or choice.get("index", 0) not in {0, None}:
            return ""
        # Servers that ignore `stream` answer with a whole message.
        delta = choice.get("delta") or choice.get("message") or {}
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self._finish_reason = _FINISH_REASONS.get(reason, FinishReason.OTHER)
        if not isinstance(delta, dict):
            return ""
        text = _read_content(delta.get("content"))
        self._texts.append(text)
        self._refusals.append(_read_text(delta.get("refusal")))
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                self._take_tool_call(call)
        return text

    def _take_tool_call(self, piece: Mapping[str, Any]) -> None:
        """Add a piece of a tool call: to the draft with its index, or without one to the last draft.

        `type` is not needed: vLLM leaves it out of the first piece.
        """
        function = piece.get("function")
        function = function if isinstance(function, dict) else {}
        draft = self._find_draft(piece, _read_text(function.get("name")))
        draft.id = draft.id or _read_text(piece.get("id"))
        draft.name = draft.name or _read_text(function.get("name"))
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            draft.text += arguments
        elif arguments is not None:
            draft.value = arguments

    def _find_draft(self, piece: Mapping[str, Any], name: str) -> _ToolCallDraft:
        index = piece.get("index")
        index = index if isinstance(index, int) else None
        for draft in self._drafts:
            if index is not None and draft.index == index:
                return draft
        last = self._drafts[-1] if self._drafts else None
        begins = bool(name) and last is not None and bool(last.name)
        if last is None or index is not None or begins:
            last = _ToolCallDraft(index)
            self._drafts.append(last)
        return last

    def _estimate_usage(self, text: str) -> TokenUsage:
        written = text + "".join(draft.text for draft in self._drafts)
        return TokenUsage(estimate_input_tokens(self._request), estimate_tokens(written), is_estimated=True)


def _complete_tool_calls(drafts: list[_ToolCallDraft]) -> tuple[RequestedToolCall, ...]:
    """Return the tool calls of an answer, each with an id of its own.

    Made ids have nine letters and digits, since templates of Mistral's models accept no others.
    """
    ids: set[str] = set()
    calls = []
    for number, draft in enumerate(drafts):
        call_id = draft.id if draft.id and draft.id not in ids else f"call{number:05}"
        ids.add(call_id)
        arguments, problem = _read_arguments(draft)
        calls.append(RequestedToolCall(call_id, draft.name, arguments, problem))
    return tuple(calls)


def _read_arguments(draft: _ToolCallDraft) -> tuple[Mapping[str, Any] | None, str]:
    """Return the arguments of a tool call and an empty text; or None and the problem, if they are no JSON object.

    Null and an empty text count as no arguments.
    """
    value = draft.value
    if draft.text.strip():
        try:
            value = decoding.decode(draft.text)
        except (ValueError, RecursionError):
            return None, "The arguments are not valid JSON"
    if value is None:
        return {}, ""
    if isinstance(value, dict):
        return value, ""
    return None, "The arguments are no JSON object"


def _read_text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _read_content(value: object) -> str:
    """Return the text of a content, which is a text or a list of parts."""
    if isinstance(value, list):
        return "".join(_read_text(part.get("text")) for part in value if isinstance(part, dict))
    return _read_text(value)


def _read_usage(value: object) -> TokenUsage | None:
    if not isinstance(value, dict):
        return None
    read, written = _read_count(value, "prompt_tokens"), _read_count(value, "completion_tokens")
    if not read and not written:
        return None  # Servers without a count send zeros.
    prompt, completion = value.get("prompt_tokens_details"), value.get("completion_tokens_details")
    return TokenUsage(
        read,
        written,
        cache_read_tokens=min(_read_count(prompt, "cached_tokens"), read),
        reasoning_tokens=min(_read_count(completion, "reasoning_tokens"), written),
    )


def _read_count(value: object, name: str) -> int:
    count = value.get(name) if isinstance(value, dict) else None
    return max(count, 0) if isinstance(count, int) else 0


def read_model_names(body: bytes) -> list[str]:
    """Return the names in a list of models; empty for any other body."""
    try:
        value = decoding.decode(body)
    except (ValueError, RecursionError):
        return []
    listed = value.get("data", value.get("models")) if isinstance(value, dict) else value
    rows = listed if isinstance(listed, list) else []
    names = [_read_text(row.get("id") or row.get("name")) for row in rows if isinstance(row, dict)]
    return [name for name in names if name]


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


def read_error_message(body: bytes) -> str:
    """Return the message of an error as JSON, up to 500 characters; empty for other bodies, which may be
    internal pages.
    """
    try:
        value = decoding.decode(body)
    except (ValueError, RecursionError):
        return ""
    value = value[0] if isinstance(value, list) and value else value
    error = value.get("error", value) if isinstance(value, dict) else None
    return _quote_error(error)


def build_stream_failure(error: object) -> ModelCallFailed:
    """Return the failure of an error that arrives in the middle of an answer."""
    said = _quote_error(error)
    message = (
        f"The provider ended the answer with an error: {said}" if said else "The provider ended the answer"
    )
    return ModelCallFailed(message, code="model-interrupted", retryable=True, can_fall_back=True)


def _quote_error(error: object) -> str:
    """Return up to 500 characters of an error, or of its `message` or `detail`, on one line; empty for
    anything else.
    """
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return " ".join(error.split())[:MAX_QUOTED_CHARACTERS] if isinstance(error, str) else ""


def _build_invalid_answer(what: str) -> ModelCallFailed:
    return ModelCallFailed(
        f"The provider sent {what}", code="model-invalid-answer", retryable=True, can_fall_back=True
    )
