"""Trace spans of calls of language models and tools: a text of a model or person is in them only by a setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import structs

from engine.agents.agent_steps import AgentStep, StepKind, StepStatus
from engine.model_calls import (
    CalledModel,
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelCallRecord,
    ModelProvider,
    RequestedToolCall,
    TokenUsage,
)
from execution import gen_ai_spans
from telemetry.tracing import RunTrace, Tracer

NOW = datetime(2026, 11, 29, tzinfo=UTC)


@pytest.mark.parametrize("text", ["the customer is Ada", "a\nb", "", "x" * 129, "straße"])
def test_an_invented_name_is_in_no_span(text: str) -> None:
    step = AgentStep(
        *("agent", "", 1, 1, StepKind.TOOL, text, StepStatus.FAILED, NOW), ended_at=NOW, call_id=text
    )
    tool = gen_ai_spans.describe_tool(step, "conversation")
    assert (tool.name, tool.error) == ("execute_tool unknown", "tool-error")
    names = [tool.attributes[f"gen_ai.tool.{name}"] for name in ("name", "call.id")]
    record = ModelCallRecord("model_1", model=text or " ")
    called = gen_ai_spans.describe_call(record, CalledModel(ModelProvider.ANTHROPIC, text), None)
    assert called.name == "chat unknown"
    names += [called.attributes[f"gen_ai.{side}.model"] for side in ("request", "response")]
    assert names == ["unknown"] * 4


def read_messages(attributes: Mapping[str, str], side: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(attributes[f"gen_ai.{side}.messages"])
    return found


def test_the_texts_of_a_call_have_the_form_of_the_conventions() -> None:
    call = RequestedToolCall("c1", "look", {"city": "Oslo", "apiKey": "s3cr3t-value"})
    request = ChatRequest(
        [
            ChatMessage(MessageRole.SYSTEM, "Be short."),
            ChatMessage(MessageRole.USER, "How cold is it?"),
            ChatMessage(MessageRole.ASSISTANT, "", tool_calls=[call]),
            ChatMessage(MessageRole.TOOL, '{"degrees":-3,"token":"s3cr3t-value"}', tool_call_id="c1"),
        ],
        max_tokens=10,
    )
    answer = ChatAnswer("-3", FinishReason.STOP, TokenUsage(1, 1), "first-1")
    attributes = gen_ai_spans.describe_messages(request, answer)
    assert read_messages(attributes, "input") == [
        {"role": "system", "parts": [{"type": "text", "content": "Be short."}]},
        {"role": "user", "parts": [{"type": "text", "content": "How cold is it?"}]},
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "c1", "name": "look", "arguments": {"city": "Oslo"}}],
        },
        {
            "role": "tool",
            "parts": [{"type": "tool_call_response", "id": "c1", "response": {"degrees": -3}}],
        },
    ]
    assert read_messages(attributes, "output") == [
        {"role": "assistant", "parts": [{"type": "text", "content": "-3"}], "finish_reason": "stop"}
    ]


def test_the_newest_messages_are_kept_within_the_limit() -> None:
    messages = [ChatMessage(MessageRole.USER, f"{number} " + "ü" * 100_000) for number in range(50)]
    answer = ChatAnswer("x" * 100_000, FinishReason.LENGTH, TokenUsage(1, 1), "first-1")
    attributes = gen_ai_spans.describe_messages(ChatRequest(messages, max_tokens=10), answer)
    assert all(len(text.encode()) <= gen_ai_spans.MAX_CONTENT_BYTES for text in attributes.values())
    told = [each["parts"][0]["content"] for each in read_messages(attributes, "input")]
    assert [text.partition(" ")[0] for text in told] == ["47", "48", "49"]
    assert told[-1].endswith("… 95,907 more characters")


def test_arguments_and_results_are_shown_as_far_as_they_are_recorded() -> None:
    step = AgentStep("agent", "", 1, 1, StepKind.TOOL, "look", StepStatus.COMPLETED, NOW, ended_at=NOW)
    assert gen_ai_spans.describe_result(step) == {}
    told = structs.replace(step, arguments=b'{"city":"Oslo","password":"hunter2"}', result=b'"cold"')
    assert gen_ai_spans.describe_result(told) == {
        "gen_ai.tool.call.arguments": '{"city":"Oslo"}',
        "gen_ai.tool.call.result": '"cold"',
    }
    deep = structs.replace(step, arguments=b'{"a":' * 900 + b"1" + b"}" * 900)
    assert len(gen_ai_spans.describe_result(deep)["gen_ai.tool.call.arguments"]) > 0


@pytest.mark.parametrize(
    ("tracer", "is_sampled", "is_kept"),
    [
        (Tracer(lambda _: None, sends_content=True), True, True),
        (Tracer(lambda _: None, sends_content=True), False, False),
        (Tracer(lambda _: None), True, False),
    ],
)
def test_contents_are_held_for_traces_that_carry_them_alone(
    tracer: Tracer, *, is_sampled: bool, is_kept: bool
) -> None:
    run = RunTrace(tracer, "exec_1", "wf_1", "1" * 32, "2" * 16, is_sampled, NOW)
    run.hold_content("call", "text")
    assert run.take_content("call") == ("text" if is_kept else None)
    assert run.take_content("call") is None
