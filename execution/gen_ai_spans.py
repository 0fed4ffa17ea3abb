"""Trace spans of calls of language models and of agents, named by OpenTelemetry's conventions for generative AI.

The names (`gen_ai.*`) are still in development there: this module alone maps them
(https://github.com/open-telemetry/semantic-conventions-genai). The texts of conversations are never in spans.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from engine.agents.agent_steps import StepStatus
from engine.model_calls import FinishReason, ModelProvider

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.model_calls import CalledModel, ModelCallRecord
    from telemetry.tracing import Attributes, SpanKind

TOOL_ERROR: Final = "tool-error"
"""Code of a failed tool call, whose own error is a text for the model."""
UNNAMED: Final = "unknown"
"""Name in place of one that a model has invented, and that may be any text."""

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


@dataclass(frozen=True, slots=True)
class GenAiSpan:
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
    """Return the span of one call of a model; `conversation` is the id of that of an agent, None for other nodes."""
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


def name_conversation(execution_id: str, node_id: str, iteration: str) -> str:
    """Return the id of the conversation of an agent."""
    return f"{execution_id}:{node_id}:{iteration or 0}"


def _limit_name(text: str) -> str:
    """Return a name if it is one, and no other text of a model or provider."""
    return text if _NAME.fullmatch(text) else UNNAMED
