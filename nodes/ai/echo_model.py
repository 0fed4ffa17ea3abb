"""Built-in model without a provider: it answers with the question, or with a value of the requested schema.

It is free, needs no key, and gives the same answer to the same question, so that templates and tests run at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.model_calls import (
    ChatAnswer,
    ChatRequest,
    FinishReason,
    MessageRole,
    RequestedToolCall,
    TokenUsage,
    estimate_input_tokens,
    estimate_tokens,
)
from nodes.ai.model_connection import ECHO_MODEL_ID

if TYPE_CHECKING:
    from engine.values import Json

MAX_DEPTH: Final = 10
MAX_TEXT: Final = 2_000


def answer_request(request: ChatRequest) -> ChatAnswer:
    """Return the answer to a request: the last result of a tool, or without one the last message of the user, cut to
    the maximum length.

    Instead, a tool that the question names is called once, and a request with a schema gets a sample value of it.
    """
    asked = [message.content for message in request.messages if message.role is MessageRole.USER]
    question = asked[0] if asked and request.output_schema is not None else asked[-1] if asked else ""
    if (call := _choose_tool(request, question)) is not None:
        usage = TokenUsage(estimate_input_tokens(request), estimate_tokens(call.name))
        return ChatAnswer("", FinishReason.TOOL_CALLS, usage, ECHO_MODEL_ID, [call])
    results = [message.content for message in request.messages if message.role is MessageRole.TOOL]
    if results and request.output_schema is None:
        question = results[-1]
    if request.output_schema is not None:
        value = build_sample(request.output_schema, question)
        text, reason = msgspec.json.encode(value).decode(), FinishReason.STOP
    else:
        text = question[: request.max_tokens * 3]
        reason = FinishReason.STOP if text == question else FinishReason.LENGTH
    usage = TokenUsage(estimate_input_tokens(request), estimate_tokens(text))
    return ChatAnswer(text, reason, usage, ECHO_MODEL_ID)


def _choose_tool(request: ChatRequest, question: str) -> RequestedToolCall | None:
    """Return a call of the first tool that the question names and that was not called yet; None without one."""
    called = {call.name for message in request.messages for call in message.tool_calls}
    for tool in request.tools:
        if tool.name in question and tool.name not in called:
            arguments = build_sample(tool.parameters, question)
            given = arguments if isinstance(arguments, dict) else {}
            return RequestedToolCall(f"call_{len(called)}", tool.name, given)
    return None


def build_sample(schema: Mapping[str, Any], text: str, depth: int = 0) -> Json:
    """Return a small value of a schema: of an `enum` the first value that occurs in `text`, else the first; of `anyOf`
    and `oneOf` always the first.

    `depth` is the level of the schema within the whole; beyond level 10 the value is None.
    """
    if "const" in schema:
        found: Json = schema["const"]
        return found
    choices = schema.get("enum")
    if isinstance(choices, list) and choices:
        return _choose(choices, text)
    if depth > MAX_DEPTH:
        return None
    for keyword in ("anyOf", "oneOf"):
        variants = schema.get(keyword)
        if isinstance(variants, list) and variants and isinstance(variants[0], dict):
            return build_sample(variants[0], text, depth + 1)
    kind = schema.get("type")
    return _build_sample_of_type(kind[0] if isinstance(kind, list) and kind else kind, schema, text, depth)


def _build_sample_of_type(kind: object, schema: Mapping[str, Any], text: str, depth: int) -> Json:
    match kind:
        case "string":
            limit = schema.get("maxLength")
            return text[: min(limit, MAX_TEXT) if isinstance(limit, int) else MAX_TEXT]
        case "integer" | "number":
            least = schema.get("minimum")
            return least if isinstance(least, int | float) else 0
        case "boolean":
            return False
        case "array":
            items = schema.get("items")
            fewest = schema.get("minItems")
            count = min(fewest, MAX_DEPTH) if isinstance(fewest, int) else 1
            return [build_sample(items, text, depth + 1)] * count if isinstance(items, dict) else []
        case "null":
            return None
    properties = schema.get("properties")
    fields = properties if isinstance(properties, dict) else {}
    return {
        name: build_sample(each, text, depth + 1) for name, each in fields.items() if isinstance(each, dict)
    }


def _choose(choices: Sequence[Json], text: str) -> Json:
    lowered = text.lower()
    return next((each for each in choices if isinstance(each, str) and each.lower() in lowered), choices[0])
