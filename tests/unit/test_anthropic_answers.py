"""Answers of Anthropic's models as its API sends them: one file for each form, in `model_answers/anthropic`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.model_calls import (
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelCallFailed,
    ModelProvider,
    RequestedToolCall,
    TokenUsage,
    ToolDescription,
)
from nodes.ai import anthropic_messages
from nodes.ai.event_stream import EventStreamParser
from nodes.ai.model_connection import ModelConnection

FOLDER = Path(__file__).parent / "model_answers/anthropic"
MODEL = ModelConnection("model_1", ModelProvider.ANTHROPIC, "claude-sonnet-5", key="sk-test")
REQUEST = ChatRequest((ChatMessage(MessageRole.USER, "How is Oslo?"),), max_tokens=100)
OSLO = {"city": "Oslo"}
WEATHER = ToolDescription("get_weather", "Tells the weather.", {"properties": {"city": {"type": "string"}}})


def parse_file(name: str) -> ChatAnswer:
    stream = (FOLDER / f"{name}.txt").read_bytes()
    events, answer = EventStreamParser(), anthropic_messages.AnthropicAnswerParser(MODEL, REQUEST)
    texts = [answer.feed(data) for data in [*events.feed(stream), *events.finish()]]
    done = answer.finish()
    assert "".join(texts) == done.text
    return done


def build_messages(*messages: ChatMessage, model: ModelConnection = MODEL) -> list[Any]:
    found: list[Any] = anthropic_messages.build_body(model, ChatRequest(messages, 100))["messages"]
    return found


def test_an_answer_has_text_usage_and_model() -> None:
    expected = ChatAnswer("Cold.", FinishReason.STOP, TokenUsage(12, 3), "claude-sonnet-5")
    assert parse_file("plain") == parse_file("whole_message") == expected
    assert parse_file("unknown_events") == expected


def test_tokens_of_the_cache_are_parts_of_the_input() -> None:
    usage = TokenUsage(2104, 30, cache_read_tokens=2000, cache_write_tokens=100, reasoning_tokens=20)
    assert parse_file("cached").usage == usage


def test_a_missing_usage_is_estimated_and_marked() -> None:
    assert parse_file("no_usage").usage == TokenUsage(4, 2, is_estimated=True)


@pytest.mark.parametrize(
    ("name", "reason", "text"),
    [
        ("stop_sequence", FinishReason.STOP, "Cold."),
        ("max_tokens", FinishReason.LENGTH, "Cold and"),
        ("context_full", FinishReason.LENGTH, "Cold and"),
        ("refusal", FinishReason.REFUSAL, ""),
        ("pause_turn", FinishReason.OTHER, "Cold."),
        ("tool_use", FinishReason.TOOL_CALLS, "I look."),
    ],
)
def test_the_end_of_an_answer_is_recognized(name: str, reason: FinishReason, text: str) -> None:
    answer = parse_file(name)
    assert (answer.finish_reason, answer.text) == (reason, text)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("tool_use", [RequestedToolCall("toolu_a1", "get_weather", OSLO)]),
        (
            "two_tools",
            [
                RequestedToolCall("toolu_a1", "get_weather", OSLO),
                RequestedToolCall("toolu_a2", "get_weather", {"city": "Rome"}),
            ],
        ),
        ("tool_without_input", [RequestedToolCall("toolu_a1", "get_weather", {})]),
        (
            "tool_cut_by_length",
            [RequestedToolCall("toolu_a1", "get_weather", None, "The arguments are not valid JSON")],
        ),
        ("arguments_as_object", [RequestedToolCall("toolu_a1", "get_weather", OSLO)]),
        (
            "arguments_broken",
            [
                RequestedToolCall("toolu_a1", "get_weather", OSLO),
                RequestedToolCall("toolu_a2", "get_weather", None, "The arguments are not valid JSON"),
            ],
        ),
        (
            "arguments_list",
            [
                RequestedToolCall("toolu_a1", "get_weather", OSLO),
                RequestedToolCall("toolu_a2", "get_weather", None, "The arguments are no JSON object"),
            ],
        ),
    ],
)
def test_tool_calls_are_read_from_their_pieces(name: str, calls: list[RequestedToolCall]) -> None:
    assert list(parse_file(name).tool_calls) == calls


@pytest.mark.parametrize("name", ["no_id", "double_id", "double_made_id"])
def test_calls_without_an_id_of_their_own_get_one_of_nine_characters(name: str) -> None:
    first, second = parse_file(name).tool_calls
    assert first.id != second.id
    assert len(second.id) == 9
    assert second.id.isalnum()


@pytest.mark.parametrize(
    ("name", "code", "retryable"),
    [
        ("overloaded", "model-unavailable", True),
        ("rate_limited", "model-rate-limited", True),
        ("invalid_request", "model-request-refused", False),
        ("cut", "model-interrupted", True),
    ],
)
def test_an_incomplete_answer_is_a_failure_by_its_error(name: str, code: str, *, retryable: bool) -> None:
    with pytest.raises(ModelCallFailed) as failed:
        parse_file(name)
    failure = failed.value
    assert (failure.code, failure.retryable, failure.can_fall_back) == (code, retryable, retryable)


def test_thoughts_go_back_unchanged_to_the_model_that_signed_them_alone() -> None:
    answer = parse_file("thinking")
    assert answer.usage == TokenUsage(12, 40, reasoning_tokens=15)
    message = ChatMessage(
        MessageRole.ASSISTANT, answer.text, answer.tool_calls, provider_content=answer.provider_content
    )
    call = {"type": "tool_use", "id": "toolu_a1", "name": "get_weather", "input": OSLO}
    plain = [{"type": "text", "text": "I look."}, call]
    (own,) = build_messages(message)
    assert own["content"] == [
        {"type": "thinking", "thinking": "They want weather.", "signature": "EqQB"},
        {"type": "redacted_thinking", "data": "Emwk"},
        *plain,
    ]
    (other,) = build_messages(message, model=msgspec.structs.replace(MODEL, id="model_2"))
    assert other["content"] == [plain[0], {**call, "id": "call00000"}]
    assert parse_file("tool_use").provider_content is None


def test_all_results_of_the_tools_of_an_answer_are_in_the_next_message() -> None:
    calls = parse_file("two_tools").tool_calls
    asked, called, told = build_messages(
        ChatMessage(MessageRole.SYSTEM, "Be short."),
        ChatMessage(MessageRole.USER, "How are Oslo and Rome?"),
        ChatMessage(MessageRole.ASSISTANT, "", calls),
        *(ChatMessage(MessageRole.TOOL, "Cold.", tool_call_id=call.id) for call in calls),
        ChatMessage(MessageRole.USER, "Go on."),
    )
    assert asked == {"role": "user", "content": [{"type": "text", "text": "How are Oslo and Rome?"}]}
    assert [block["type"] for block in called["content"]] == ["tool_use", "tool_use"]
    ids = [block["id"] for block in called["content"]]
    assert [block.get("tool_use_id") for block in told["content"]] == [*ids, None]
    assert told["role"] == "user"


def test_a_request_has_system_tools_and_cache_in_their_places() -> None:
    system = ChatMessage(MessageRole.SYSTEM, "Be short.")
    request = ChatRequest((system, *REQUEST.messages), 100, temperature=0.5, tools=(WEATHER,))
    body = anthropic_messages.build_body(MODEL, request)
    assert body == {
        "model": "claude-sonnet-5",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "How is Oslo?"}]}],
        "stream": True,
        "system": "Be short.",
        "tools": [
            {
                "name": "get_weather",
                "description": "Tells the weather.",
                "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
            }
        ],
        "cache_control": {"type": "ephemeral"},
    }
    adapted = anthropic_messages.adapt_body(body, "cache_control: Extra inputs are not permitted")
    assert adapted == {name: value for name, value in body.items() if name != "cache_control"}
    assert anthropic_messages.adapt_body(body, "prompt is too long") is None


def test_tools_that_were_called_are_named_in_a_request_without_tools() -> None:
    called = ChatMessage(MessageRole.ASSISTANT, "", [RequestedToolCall("toolu_a1", "get_weather", {})])
    told = ChatMessage(MessageRole.TOOL, "Cold.", tool_call_id="toolu_a1")
    body = anthropic_messages.build_body(MODEL, ChatRequest((*REQUEST.messages, called, told), 100))
    assert body["tools"] == [{"name": "get_weather", "input_schema": {"type": "object"}}]
    assert body["tool_choice"] == {"type": "none"}


def test_a_schema_is_passed_on_only_to_a_model_that_follows_it() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}}
    request = msgspec.structs.replace(REQUEST, output_schema=schema)
    follower = msgspec.structs.replace(MODEL, follows_schemas=True)
    native = anthropic_messages.build_body(follower, request)
    enforced = {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False}
    assert native["output_config"] == {"format": {"type": "json_schema", "schema": enforced}}
    assert "output_config" not in anthropic_messages.build_body(MODEL, request)
    other = msgspec.structs.replace(REQUEST, output_schema={"type": "object"})
    assert "output_config" not in anthropic_messages.build_body(follower, other)
