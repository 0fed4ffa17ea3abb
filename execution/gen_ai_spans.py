"""Trace spans of calls of language models and of agents, named by OpenTelemetry's conventions for generative AI.

The names (`gen_ai.*`) are still in development there: this module alone maps them
(https://github.com/open-telemetry/semantic-conventions-genai). The texts of conversations are in spans only if the
operator wants them there, cut, and without values that look like credentials.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from engine import inline_secrets, values
from engine.agents.agent_steps import StepStatus
from engine.model_calls import FinishReason, MessageRole, ModelProvider
from engine.values import InvalidJson
from json_text import decoding

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.model_calls import (
        CalledModel,
        ChatAnswer,
        ChatMessage,
        ChatRequest,
        ModelCallRecord,
        RequestedToolCall,
    )
    from engine.values import Json
    from telemetry.tracing import Attributes, SpanKind

TOOL_ERROR: Final = "tool-error"
"""Code of a failed tool call, whose own error is a text for the model."""
UNNAMED: Final = "unknown"
"""Name in place of one that a model has invented, and that may be any text."""

MAX_CONTENT_BYTES: Final = 32_768
"""Maximum size of an attribute with texts."""
MAX_TEXT_CHARACTERS: Final = 4_096
"""Maximum length of one text in it."""

_PROVIDERS: Final[Mapping[ModelProvider, str]] = {
    ModelProvider.OPENAI_COMPATIBLE: "openai",
    ModelProvider.ANTHROPIC: "anthropic",
    ModelProvider.ECHO: "echo",
}
_FINISH_REASONS: Final[Mapping[FinishReason, str]] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_call",
    FinishReason.REFUSAL: "content_filter",
    FinishReason.OTHER: "other",
}
_NAME: Final = re.compile(r"[A-Za-z0-9_.:/@+-]{1,128}")


class GenAiSpan(Struct, frozen=True):
    """Name, kind and attributes of a span."""

    name: str
    kind: SpanKind
    attributes: Attributes
    error: str | None = None
    """Code of the error that ended it."""


def describe_agent(node_id: str, conversation: str) -> GenAiSpan:
    """Return the span of one attempt of an agent, which is named by its node, since labels are no part of traces."""
    attributes = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": node_id,
        "gen_ai.conversation.id": conversation,
    }
    return GenAiSpan(f"invoke_agent {node_id}", "internal", attributes)


def describe_call(record: ModelCallRecord, called: CalledModel, conversation: str | None) -> GenAiSpan:
    """Return the span of one call of a model; `conversation` is the id of an agent's conversation, None for other
    nodes.
    """
    requested = _limit_name(called.name)
    attributes: dict[str, str | int | tuple[str, ...]] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": _PROVIDERS[called.provider],
        "gen_ai.request.model": requested,
        "pilotflame.model.id": record.model_id,
    }
    if conversation is not None:
        attributes["gen_ai.conversation.id"] = conversation
    if record.model:
        attributes["gen_ai.response.model"] = _limit_name(record.model)
    if record.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = (_FINISH_REASONS[record.finish_reason],)
    if record.usage is not None:
        usage = record.usage
        attributes["gen_ai.usage.input_tokens"] = usage.input_tokens
        attributes["gen_ai.usage.output_tokens"] = usage.output_tokens
        attributes["gen_ai.usage.cache_read.input_tokens"] = usage.cache_read_tokens
        attributes["gen_ai.usage.cache_creation.input_tokens"] = usage.cache_write_tokens
    return GenAiSpan(f"chat {requested}", "client", attributes, record.error or None)


def describe_tool(step: AgentStep, conversation: str) -> GenAiSpan:
    """Return the span of an ended tool call of an agent."""
    name = _limit_name(step.name)
    attributes = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": name,
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": _limit_name(step.call_id),
        "gen_ai.conversation.id": conversation,
    }
    error = TOOL_ERROR if step.status is StepStatus.FAILED else None
    return GenAiSpan(f"execute_tool {name}", "internal", attributes, error)


def describe_messages(request: ChatRequest, answer: ChatAnswer) -> Mapping[str, str]:
    """Return the attributes with the texts of a call of a model: the newest messages that fit, and the answer."""
    parts = [_build_text(answer.text)] if answer.text else []
    parts += map(_build_call, answer.tool_calls)
    reason = _FINISH_REASONS[answer.finish_reason]
    message: Json = {"role": "assistant", "parts": parts, "finish_reason": reason}
    return {
        "gen_ai.input.messages": _encode_newest([_build_message(each) for each in request.messages]),
        "gen_ai.output.messages": _encode_newest([message]),
    }


def describe_result(step: AgentStep) -> Mapping[str, str]:
    """Return the attributes for arguments and result of a tool call, for its span; what the step doesn't have is left
    out.
    """
    texts: dict[str, str] = {}
    if step.arguments is not None:
        texts["gen_ai.tool.call.arguments"] = _encode(values.restore_json(step.arguments))
    if step.result is not None:
        texts["gen_ai.tool.call.result"] = _encode(_read_result(decoding.decode(step.result, str)))
    return texts


def _read_result(text: str) -> Json:
    """Return the decoded value of a result that is JSON, so that credentials are found by their names; else the text
    itself.
    """
    try:
        return values.decode_json(text.encode())
    except InvalidJson:
        return text


def _build_message(message: ChatMessage) -> Json:
    """Return a message in the form of OpenTelemetry's conventions."""
    if message.role is MessageRole.TOOL:
        response: Json = {
            "type": "tool_call_response",
            "id": message.tool_call_id,
            "response": _read_result(message.content),
        }
        return {"role": "tool", "parts": [response]}
    parts = [_build_text(message.content)] if message.content else []
    return {"role": message.role.value, "parts": [*parts, *map(_build_call, message.tool_calls)]}


def _build_text(text: str) -> Json:
    return {"type": "text", "content": text}


def _build_call(call: RequestedToolCall) -> Json:
    arguments = None if call.arguments is None else dict(call.arguments)
    return {"type": "tool_call", "id": call.id, "name": call.name, "arguments": arguments}


def _encode_newest(messages: Sequence[Json]) -> str:
    """Return the newest of some messages as a JSON list of at most 32 kB; the last one that does not fit, and all
    before it, are left out.
    """
    kept: list[str] = []
    size = 2
    for message in reversed(messages):
        text = _encode(message, cut_at=None)
        size += len(text.encode()) + 1
        if size > MAX_CONTENT_BYTES:
            break
        kept.append(text)
    return f"[{','.join(reversed(kept))}]"


def _encode(value: Json, cut_at: int | None = MAX_CONTENT_BYTES) -> str:
    """Return a value as JSON without credentials and with its long texts cut; the JSON itself is cut off after `cut_at`
    bytes, or (None) never.
    """
    try:
        encoded = msgspec.json.encode(_cut_texts(inline_secrets.remove_secrets(value)[0]))
    except RecursionError:
        return '"nested too deep"'
    return encoded[:cut_at].decode(errors="ignore")


def _cut_texts(value: Json) -> Json:
    """Return a value with its long texts cut to 4,096 characters, each followed by the number of missing characters."""
    match value:
        case str() if len(value) > MAX_TEXT_CHARACTERS:
            left = len(value) - MAX_TEXT_CHARACTERS
            return f"{value[:MAX_TEXT_CHARACTERS]}… {left:,} more characters"
        case list():
            return [_cut_texts(each) for each in value]
        case dict():
            return {name: _cut_texts(each) for name, each in value.items()}
        case _:
            return value


def name_conversation(execution_id: str, node_id: str, iteration: str) -> str:
    """Return the id of the conversation of an agent."""
    return f"{execution_id}:{node_id}:{iteration or 0}"


def _limit_name(text: str) -> str:
    """Return a text if it is a plain name of at most 128 characters, else `unknown`: models and providers may send any
    text.
    """
    return text if _NAME.fullmatch(text) else UNNAMED
