"""Chat completions as OpenAI defined them: requests, and answers of the many servers that speak them differently.

Azure, vLLM, Ollama, llama.cpp, Mistral, Groq and Gemini's compatible endpoint follow the same form with exceptions.
An answer is accepted in every form that leaves no doubt about its meaning.
"""

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
    ProviderContent,
    RequestedToolCall,
    TokenUsage,
    ToolDescription,
    estimate_input_tokens,
    estimate_tokens,
)
from nodes.ai import answer_schemas, call_ids, provider_json
from nodes.ai.provider_json import MAX_NAME_CHARACTERS, read_count, read_text

if TYPE_CHECKING:
    from nodes.ai.model_connection import ModelConnection

PATH: Final = "chat/completions"
JSON_MODE: Final[Mapping[str, Any] | None] = {"response_format": {"type": "json_object"}}
END: Final = b"[DONE]"
SCHEMA_NAME: Final = "answer"
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


def build_key_headers(model: ModelConnection) -> dict[str, str]:
    """Return the header with the key of the provider; empty without a key."""
    if not model.key:
        return {}
    return {model.key_header: model.key} if model.key_header else {"Authorization": f"Bearer {model.key}"}


def build_body(model: ModelConnection, request: ChatRequest) -> dict[str, Any]:
    """Return the body of a request; a schema is sent only to models that are known to follow it."""
    body: dict[str, Any] = {
        "model": model.vendor_model_id,
        "messages": [
            _build_message(message, model.id) for message in call_ids.unify(request.messages, model.id)
        ],
        "max_tokens": request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.output_schema is not None and model.follows_schemas:
        body["response_format"] = {"type": "json_schema", "json_schema": _build_schema(request.output_schema)}
    if request.tools:
        body["tools"] = [_build_tool(tool) for tool in request.tools]
    if request.forced_tool:
        body["tool_choice"] = {"type": "function", "function": {"name": request.forced_tool}}
    return body


def build_image_question(text: str, image: str) -> Sequence[Mapping[str, Any]]:
    """Return the message of a text and a PNG image in Base64, as the only part of `ProviderContent`."""
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, shown]}]


def accepts_schema(schema: Mapping[str, Any]) -> bool:  # noqa: ARG001 - the protocol's parameter
    """Return True: the provider accepts any schema of an answer, and treats a schema that it doesn't
    enforce as a wish.
    """
    return True


def _build_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `json_schema` of a request; it is `strict` only if OpenAI enforces the schema as a whole.

    OpenAI refuses other strict schemas, while the answer is validated here in any case.
    """
    closed = answer_schemas.close_objects(schema)
    is_strict = closed is not None and answer_schemas.is_enforced(closed, needs_all_fields=True)
    return {"name": SCHEMA_NAME, "strict": is_strict, "schema": closed if is_strict else schema}


def adapt_body(body: Mapping[str, Any], refusal: str) -> dict[str, Any] | None:
    """Return a body without the field that a server has refused by name, or with another name for it; None if it named
    none.

    Newer models of OpenAI call `max_tokens` otherwise, those that reason know no `temperature`, and older servers no
    `stream_options`. Such a refusal costs nothing.
    """
    if "max_completion_tokens" in refusal and "max_tokens" in body:
        rest = {name: value for name, value in body.items() if name != "max_tokens"}
        return {**rest, "max_completion_tokens": body["max_tokens"]}
    for field in ("stream_options", "temperature"):
        if field in refusal and field in body:
            return {name: value for name, value in body.items() if name != field}
    return None


def _build_message(message: ChatMessage, model_id: str) -> dict[str, Any]:
    own = message.provider_content
    if own is not None and own.model_id == model_id:
        return dict(own.parts[0])
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
    extra: Any = None
    """`extra_content`, in which Gemini signs its thoughts."""


def create_parser(model: ModelConnection, request: ChatRequest) -> OpenAiAnswerParser:
    """Return a parser for the answer to a request."""
    return OpenAiAnswerParser(model, request)


class OpenAiAnswerParser:
    """Parser of one answer, fed with the data of its events."""

    def __init__(self, model: ModelConnection, request: ChatRequest) -> None:
        self._model_id = model.id
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
        event = provider_json.read_event(data)
        if event.get("error"):
            raise provider_json.build_interruption(event["error"])
        self._model = read_text(event.get("model")) or self._model
        self._usage = _read_usage(event.get("usage")) or self._usage
        choices = event.get("choices")
        added = [self._take_choice(choice) for choice in choices] if isinstance(choices, list) else []
        return "".join(added)

    def finish(self) -> ChatAnswer:
        """Return the complete answer; raises `ModelCallFailed` if the stream has ended before it."""
        if self._finish_reason is None and not self._has_ended:
            raise provider_json.build_broken_answer()
        calls = _complete_tool_calls(self._drafts)
        text = "".join(self._texts)
        reason = self._finish_reason or FinishReason.STOP
        refusal = "".join(self._refusals)
        if refusal and not text:
            text, reason = refusal, FinishReason.REFUSAL
        if calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS  # Several servers say `stop` for an answer with calls.
        usage = self._usage or self._estimate_usage(text)
        return ChatAnswer(text, reason, usage, self._model, calls, self._keep_content(text, calls))

    def _keep_content(self, text: str, calls: Sequence[RequestedToolCall]) -> ProviderContent | None:
        """Return the answer as a message for later requests to the same model, with the fields that the provider has
        added to its tool calls; None if it has added none.
        """
        extras = [draft.extra for draft in self._drafts]
        if not any(extras):
            return None
        message = _build_message(ChatMessage(MessageRole.ASSISTANT, text, calls), self._model_id)
        for shown, extra in zip(message["tool_calls"], extras, strict=True):
            if extra:
                shown["extra_content"] = extra
        return ProviderContent(self._model_id, (message,))

    def _take_choice(self, choice: object) -> str:
        """Add a choice in an event to the answer, and return its text; choices other than the first are ignored."""
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
        self._refusals.append(read_text(delta.get("refusal")))
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                self._take_tool_call(call)
        return text

    def _take_tool_call(self, piece: Mapping[str, Any]) -> None:
        """Add a piece of a tool call to the draft with its index; without an index to the last draft, or to a new one
        if the piece begins another call by a name.

        `type` is not needed: vLLM leaves it out of the first piece.
        """
        function = piece.get("function")
        function = function if isinstance(function, dict) else {}
        draft = self._find_draft(piece, read_text(function.get("name")))
        draft.id = draft.id or read_text(piece.get("id"))
        draft.name = draft.name or read_text(function.get("name"))[:MAX_NAME_CHARACTERS]
        draft.extra = piece.get("extra_content") or draft.extra
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
    """Return the tool calls of an answer, each with a unique id, and with its arguments or the problem with them.

    A missing or repeated id is replaced.
    """
    ids: set[str] = set()
    calls = []
    for number, draft in enumerate(drafts):
        call_id = draft.id if draft.id and draft.id not in ids else call_ids.make_free_id(number, ids)
        ids.add(call_id)
        arguments, problem = provider_json.read_tool_arguments(draft.text, draft.value)
        calls.append(RequestedToolCall(call_id, draft.name, arguments, problem))
    return tuple(calls)


def _read_content(value: object) -> str:
    """Return the text of a content, which is a text or a list of parts; empty for anything else."""
    if isinstance(value, list):
        return "".join(read_text(part.get("text")) for part in value if isinstance(part, dict))
    return read_text(value)


def _read_usage(value: object) -> TokenUsage | None:
    if not isinstance(value, dict):
        return None
    read, written = read_count(value, "prompt_tokens"), read_count(value, "completion_tokens")
    if not read and not written:
        return None  # Servers without a count send zeros.
    prompt, completion = value.get("prompt_tokens_details"), value.get("completion_tokens_details")
    return TokenUsage(
        read,
        written,
        cache_read_tokens=min(read_count(prompt, "cached_tokens"), read),
        reasoning_tokens=min(read_count(completion, "reasoning_tokens"), written),
    )
