"""Node that asks a language model for a text, with the names of fields that AI gateways commonly have."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from engine.model_calls import ChatMessage, ChatRequest, MessageRole, sum_cost, sum_usage
from engine.model_prices import show_cost
from nodes import config_fields
from nodes.ai import conversation

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    config = call.config
    system = str(config.get("systemPrompt") or "")
    request = ChatRequest(
        (
            *([ChatMessage(MessageRole.SYSTEM, system)] if system else []),
            ChatMessage(MessageRole.USER, config_fields.read_text(config, "userPrompt")),
        ),
        int(config_fields.read_number(config, "maxTokens", minimum=1, maximum=8_000)),
        temperature=config_fields.read_number(config, "temperature", minimum=0, maximum=2),
    )
    began = monotonic()
    answer = await conversation.ask_models(call, [config_fields.read_text(config, "model")], request)
    milliseconds = round((monotonic() - began) * 1_000)
    records = call.model_calls.recorded
    used = sum_usage(records)
    return {
        "response": answer.text,
        "model": answer.model_id,
        "usage": {
            "promptTokens": used.input_tokens,
            "completionTokens": used.output_tokens,
            "totalTokens": used.input_tokens + used.output_tokens,
        },
        "finishReason": answer.finish_reason.value,
        "responseTimeMs": milliseconds,
        "cost": show_cost(sum_cost(records)),
    }
