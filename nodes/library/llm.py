"""Node that asks a language model, and returns its answer as a text or as a value of a schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from engine.model_calls import ChatMessage, ChatRequest, MessageRole, sum_cost, sum_usage
from engine.model_prices import show_cost
from engine.run_errors import NodeError
from nodes import config_fields
from nodes.ai import conversation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    config = call.config
    request = ChatRequest(
        messages=_read_messages(config),
        max_tokens=int(config_fields.read_number(config, "maxTokens", minimum=1, maximum=1_000_000)),
        temperature=_read_temperature(config),
        output_schema=_read_schema(config),
    )
    fallbacks = config_fields.read_sequence(config, "fallbackModelIds")
    model_ids = [config_fields.read_text(config, "model"), *map(str, fallbacks)]
    answer = await conversation.ask_models(call, model_ids, request)
    records = call.model_calls.recorded
    return {
        "response": answer.text,
        **({} if request.output_schema is None else {"data": answer.value}),
        "model": answer.model_id,
        "finishReason": answer.finish_reason.value,
        "usage": msgspec.to_builtins(sum_usage(records)),
        "cost": show_cost(sum_cost(records)),
    }


def _read_messages(config: Mapping[str, Json]) -> tuple[ChatMessage, ...]:
    """Return the messages of the request: the system prompt, the conversation so far, and the prompt.

    Raises `NodeError` unless the last message is of the user.
    """
    messages = []
    if system := config.get("system"):
        messages.append(ChatMessage(MessageRole.SYSTEM, str(system)))
    messages.extend(map(_read_message, config_fields.read_sequence(config, "messages")))
    if prompt := config.get("prompt"):
        messages.append(ChatMessage(MessageRole.USER, str(prompt)))
    if not messages or messages[-1].role is not MessageRole.USER:
        raise NodeError(
            "The node needs a `prompt`, or `messages` that end with one of the user", code="missing-config"
        )
    return tuple(messages)


def _read_temperature(config: Mapping[str, Json]) -> float | None:
    if config.get("temperature") is None:
        return None
    return config_fields.read_number(config, "temperature", minimum=0, maximum=2)


def _read_message(given: Json) -> ChatMessage:
    """Return one message of a conversation; raises `NodeError` for another form than `{role, content}`, and for other
    roles than `user` and `assistant`.
    """
    if isinstance(given, dict):
        role, content = given.get("role"), given.get("content")
        if role in {MessageRole.USER, MessageRole.ASSISTANT} and isinstance(content, str):
            return ChatMessage(MessageRole(role), content)
    message = "Each of `messages` is an object with `role`, `user` or `assistant`, and the text `content`"
    raise NodeError(message, code="invalid-config")


def _read_schema(config: Mapping[str, Json]) -> Mapping[str, Any] | None:
    schema = config.get("outputSchema")
    if schema is None:
        return None
    if not isinstance(schema, dict):
        raise NodeError("`outputSchema` has to be a JSON Schema", code="invalid-config")
    return schema
