"""Tool calls of models that know none: the model answers with JSON, which is either a call or the final answer.

The schema of that JSON is asked for like any structured output. Requests and answers are translated for one model at a
time, so that the journal and the other models of the same agent see ordinary tool calls.
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
    RequestedToolCall,
    ToolMode,
)
from nodes.ai import structured_answers

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.ai.model_connection import ModelConnection

NEXT: Final = "next"
"""Field of the answer. Some providers accept no schema that has `anyOf` at its root."""
TOOL: Final = "tool"
ARGUMENTS: Final = "arguments"
FINAL: Final = "answer"
CALL_ID: Final = "call_0"
_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


def is_needed(model: ModelConnection, request: ChatRequest) -> bool:
    """Return whether a request has to be translated for a model: it has tools, calls or their results, and the model is
    to call tools by answers with JSON.

    `tool_mode` of the request decides that; if it is `auto`, the model's test: a model that was never tested calls
    tools itself.
    """
    if request.tool_mode is ToolMode.NATIVE or (
        request.tool_mode is ToolMode.AUTO and not model.ignores_tools
    ):
        return False
    return bool(request.tools) or any(
        message.tool_calls or message.role is MessageRole.TOOL for message in request.messages
    )


def translate_request(request: ChatRequest) -> ChatRequest:
    """Return a request in which tools are a schema of the answer, and calls and results are texts.

    A request without tools, such as the last one of an agent, allows the final answer alone. If the request has an
    output schema, that stays, and only calls and results are translated.
    """
    messages = _translate_messages(request.messages)
    if request.output_schema is not None:
        return msgspec.structs.replace(request, messages=messages)
    return msgspec.structs.replace(
        request,
        messages=_add_rules(messages, _write_rules(request)),
        output_schema=_build_schema(request),
        tools=(),
    )


def translate_answer(answer: ChatAnswer, request: ChatRequest) -> ChatAnswer:
    """Return an answer to a translated request with the tool call, or the final text, that its JSON has.

    `request` is the original request; with an output schema in it, the answer is returned unchanged. Another text is
    the final answer as it is, such as a text that is no JSON, or the answer of a model that leaves out the field around
    it.
    """
    if request.output_schema is not None:
        return answer
    found = structured_answers.read_answer(answer.text, {})
    chosen, is_wrapped = found.value, False
    if isinstance(chosen, dict) and chosen.keys() == {NEXT}:
        chosen, is_wrapped = chosen[NEXT], True
    if not isinstance(chosen, dict):
        return answer
    name = chosen.get(TOOL)
    if isinstance(name, str) and request.tools and (is_wrapped or _has_tool(request, name)):
        call = _read_call(name, chosen.get(ARGUMENTS, {}))
        return msgspec.structs.replace(
            answer, text="", finish_reason=FinishReason.TOOL_CALLS, tool_calls=(call,)
        )
    if chosen.keys() == {FINAL} and (is_wrapped or request.final_schema is None):
        final = chosen[FINAL]
        text = final if isinstance(final, str) else msgspec.json.encode(final).decode()
        return msgspec.structs.replace(answer, text=text)
    return answer


def _has_tool(request: ChatRequest, name: str) -> bool:
    return any(tool.name == name for tool in request.tools)


def _read_call(name: str, arguments: Json) -> RequestedToolCall:
    if isinstance(arguments, dict):
        return RequestedToolCall(CALL_ID, name, arguments)
    return RequestedToolCall(CALL_ID, name, None, f"`{ARGUMENTS}` is no JSON object")


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def _build_schema(request: ChatRequest) -> dict[str, Any]:
    """Return the schema of an answer: either one call of one tool, or the final answer."""
    final = _build_object({FINAL: request.final_schema or {"type": "string"}})
    calls = [
        _build_object({TOOL: {"type": "string", "enum": [tool.name]}, ARGUMENTS: _embed(tool.parameters)})
        for tool in request.tools
    ]
    return _build_object({NEXT: {"anyOf": [*calls, final]} if calls else final})


def _build_object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _embed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments for use within another schema: that of any object if it has references,
    which would not resolve there.

    The arguments are validated by `parameters` in any case.
    """
    return _ANY_OBJECT if not parameters or _has_references(parameters) else parameters


def _has_references(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(key in {"$ref", "$dynamicRef"} for key in value) or any(
            map(_has_references, value.values())
        )
    return isinstance(value, list | tuple) and any(map(_has_references, value))


def _write_rules(request: ChatRequest) -> str:
    """Return the part of the system prompt that explains the tools and the form of an answer."""
    final = msgspec.json.encode({NEXT: {FINAL: "…"}}).decode()
    if not request.tools:
        return f"Answer with JSON of the form {final}."
    call = msgspec.json.encode({NEXT: {TOOL: "…", ARGUMENTS: {}}}).decode()
    tools = [
        f"- {tool.name}: {tool.description} Arguments: {msgspec.json.encode(tool.parameters or _ANY_OBJECT).decode()}"
        for tool in request.tools
    ]
    return "\n".join(
        [
            f"You can call tools. To call one, answer with JSON of the form {call}, and you get its result.",
            f"When you know enough, answer with JSON of the form {final}. The tools are:",
            *tools,
        ]
    )


def _add_rules(messages: Sequence[ChatMessage], rules: str) -> Sequence[ChatMessage]:
    """Return messages with rules at the end of the system prompt, or as a new system prompt."""
    if messages and messages[0].role is MessageRole.SYSTEM:
        first = ChatMessage(MessageRole.SYSTEM, f"{messages[0].content}\n\n{rules}")
        return (first, *messages[1:])
    return (ChatMessage(MessageRole.SYSTEM, rules), *messages)


def _translate_messages(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return messages in which each tool call is an answer with JSON, followed by its result as a text of the user.

    Texts of the user in a row become one, since templates of many models want the roles to alternate. A text beside
    tool calls, and calls without a result, are left out.
    """
    translated: list[ChatMessage] = []
    calls: dict[str, RequestedToolCall] = {}
    for message in messages:
        if message.tool_calls:
            calls = {call.id: call for call in message.tool_calls}
        elif message.role is MessageRole.TOOL and message.tool_call_id in calls:
            call = calls[message.tool_call_id]
            chosen = {NEXT: {TOOL: call.name, ARGUMENTS: call.arguments or {}}}
            translated += [
                ChatMessage(MessageRole.ASSISTANT, msgspec.json.encode(chosen).decode()),
                ChatMessage(MessageRole.USER, f"Result of {call.name}:\n{message.content}"),
            ]
        elif message.role is MessageRole.USER and translated and translated[-1].role is MessageRole.USER:
            text = f"{translated[-1].content}\n\n{message.content}"
            translated[-1] = ChatMessage(MessageRole.USER, text)
        else:
            translated.append(ChatMessage(message.role, message.content))
    return tuple(translated)
