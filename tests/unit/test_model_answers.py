"""Answers of models as servers are known to send them: one file for each form, in `model_answers`."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from nodes.ai import openai_chat, provider_json, structured_answers
from nodes.ai.event_stream import EventStreamParser
from nodes.ai.model_connection import ModelConnection

FOLDER = Path(__file__).parent / "model_answers/openai"
MODEL = ModelConnection("model_1", ModelProvider.OPENAI_COMPATIBLE, "m")
FOLLOWER = msgspec.structs.replace(MODEL, follows_schemas=True)
REQUEST = ChatRequest((ChatMessage(MessageRole.USER, "How is Oslo?"),), max_tokens=100)
OSLO = {"city": "Oslo"}
ESTIMATED = TokenUsage(4, 1, is_estimated=True)


def parse_file(name: str) -> ChatAnswer:
    return parse_answer((FOLDER / f"{name}.txt").read_bytes())


def parse_answer(stream: bytes, piece_bytes: int = 7) -> ChatAnswer:
    events, answer = EventStreamParser(), openai_chat.OpenAiAnswerParser(MODEL, REQUEST)
    pieces = [stream[at : at + piece_bytes] for at in range(0, len(stream), piece_bytes)]
    for data in [data for piece in pieces for data in events.feed(piece)] + events.finish():
        answer.feed(data)
    return answer.finish()


def calls_of(name: str) -> list[RequestedToolCall]:
    answer = parse_file(name)
    assert answer.finish_reason is FinishReason.TOOL_CALLS
    return list(answer.tool_calls)


def test_an_answer_has_text_usage_and_model() -> None:
    usage = TokenUsage(12, 3, cache_read_tokens=8, reasoning_tokens=1)
    assert parse_file("plain") == ChatAnswer("Cold.", FinishReason.STOP, usage, "gpt-5-mini-2026")


def test_an_answer_in_json_mode_may_have_white_space_around_its_object() -> None:
    answer = parse_file("json_mode")
    found = structured_answers.read_answer(answer.text, {"type": "object", "required": ["city"]})
    assert (found.value, found.problems) == (OSLO, ())


def test_a_missing_usage_is_estimated_and_marked() -> None:
    assert parse_file("no_usage").usage == TokenUsage(4, 2, is_estimated=True)
    assert parse_file("zero_usage").usage.is_estimated


@pytest.mark.parametrize(
    "name",
    ["arguments_in_pieces", "arguments_as_object", "no_type_in_first_piece", "no_index", "stop_with_calls"],
)
def test_a_tool_call_is_read_from_every_form(name: str) -> None:
    assert calls_of(name) == [RequestedToolCall("call_a1", "get_weather", OSLO)]


@pytest.mark.parametrize("name", ["arguments_null", "arguments_empty"])
def test_missing_arguments_are_none_at_all(name: str) -> None:
    assert calls_of(name) == [RequestedToolCall("call_a1", "get_weather", {})]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("arguments_broken", "The arguments are not valid JSON"),
        ("arguments_list", "The arguments are no JSON object"),
    ],
)
def test_unusable_arguments_are_a_problem_for_the_model(name: str, problem: str) -> None:
    assert calls_of(name) == [RequestedToolCall("call_a1", "get_weather", None, problem)]


@pytest.mark.parametrize("name", ["no_id", "double_id", "double_made_id"])
def test_calls_without_an_id_of_their_own_get_one_of_nine_characters(name: str) -> None:
    first, second = calls_of(name)
    assert first.id != second.id
    assert len(second.id) == 9
    assert second.id.isalnum()


def test_signed_thoughts_go_back_to_the_model_that_signed_them_alone() -> None:
    answer = parse_file("signed_thoughts")
    message = ChatMessage(
        MessageRole.ASSISTANT, answer.text, answer.tool_calls, provider_content=answer.provider_content
    )
    request = ChatRequest((message,), 100)
    (own,) = openai_chat.build_body(MODEL, request)["messages"]
    (other,) = openai_chat.build_body(msgspec.structs.replace(MODEL, id="model_2"), request)["messages"]
    signed = own["tool_calls"][0].pop("extra_content")
    assert signed == {"google": {"thought_signature": "EpwC"}}
    assert own["tool_calls"][0].pop("id") == answer.tool_calls[0].id
    assert other["tool_calls"][0].pop("id") == "call00000"
    assert own == other


def test_an_answer_that_ignores_the_tools_is_a_text() -> None:
    answer = parse_file("tools_ignored")
    assert (answer.tool_calls, answer.finish_reason) == ((), FinishReason.STOP)


@pytest.mark.parametrize(
    ("name", "reason", "text"),
    [
        ("length", FinishReason.LENGTH, "Cold and"),
        ("refusal", FinishReason.REFUSAL, "I can't help with that."),
        ("content_filter", FinishReason.REFUSAL, ""),
        ("whole_message", FinishReason.STOP, "Cold."),
        ("content_parts", FinishReason.STOP, "Cold."),
        ("no_done", FinishReason.STOP, "Cold."),
        ("no_finish_reason", FinishReason.STOP, "Cold."),
        ("crlf_and_comments", FinishReason.STOP, "Cold."),
    ],
)
def test_the_end_of_an_answer_is_recognized(name: str, reason: FinishReason, text: str) -> None:
    answer = parse_file(name)
    assert (answer.finish_reason, answer.text) == (reason, text)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("cut", "model-interrupted", "The model's answer broke off before its end"),
        ("error_in_stream", "model-interrupted", "The provider ended the answer with an error: overloaded"),
        ("not_json", "model-invalid-answer", "The provider sent an event that is not JSON"),
    ],
)
def test_an_incomplete_answer_is_a_failure_that_may_be_repeated(name: str, code: str, message: str) -> None:
    with pytest.raises(ModelCallFailed) as failed:
        parse_file(name)
    assert (failed.value.code, failed.value.message) == (code, message)
    assert failed.value.retryable
    assert failed.value.can_fall_back


@given(st.integers(1, 400))
def test_an_answer_does_not_depend_on_the_pieces_it_comes_in(piece_bytes: int) -> None:
    stream = (FOLDER / "crlf_and_comments.txt").read_bytes().replace(b"\n", b"\r\n")
    assert parse_answer(stream, piece_bytes) == parse_answer(stream, len(stream))


def test_a_request_is_streamed_and_its_tools_always_have_parameters() -> None:
    request = ChatRequest(
        REQUEST.messages, 100, temperature=0.5, tools=(ToolDescription("now", "The time.", {}),)
    )
    assert openai_chat.build_body(FOLLOWER, request) == {
        "model": "m",
        "messages": [{"role": "user", "content": "How is Oslo?"}],
        "max_tokens": 100,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "now",
                    "description": "The time.",
                    "parameters": {"type": "object", "properties": {}},
                },
            }
        ],
    }


def test_a_schema_is_passed_on_only_to_a_model_that_follows_it() -> None:
    request = ChatRequest(REQUEST.messages, 100, output_schema={"type": "object"})
    native = openai_chat.build_body(FOLLOWER, request)["response_format"]["json_schema"]
    assert (native["schema"], native["strict"]) == ({"type": "object"}, False)
    assert "response_format" not in openai_chat.build_body(MODEL, request)


def test_a_field_that_a_server_refuses_by_name_is_replaced() -> None:
    body = openai_chat.build_body(MODEL, REQUEST)
    refusal = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    adapted = openai_chat.adapt_body(body, refusal)
    assert adapted is not None
    assert ("max_tokens" in adapted, adapted["max_completion_tokens"]) == (False, 100)
    assert openai_chat.adapt_body(adapted, refusal) is None
    warm = openai_chat.build_body(MODEL, msgspec.structs.replace(REQUEST, temperature=0))
    assert openai_chat.adapt_body(warm, "'temperature' does not support 0 with this model") == body
    assert openai_chat.adapt_body(body, "Unknown model") is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "No such model"}}', "No such model"),
        (b'{"error": "No such model"}', "No such model"),
        (b'[{"error": {"message": "No such model"}}]', "No such model"),
        (b'{"detail": "No such model"}', "No such model"),
        (b"<html>internal page</html>", ""),
        (b'{"error": {"message": "%b"}}' % (b"x" * 900), "x" * 500),
    ],
)
def test_errors_of_providers_are_quoted_in_part_and_pages_never(body: bytes, message: str) -> None:
    assert provider_json.read_error(body)[0] == message


def test_answers_and_tool_calls_can_be_stored() -> None:
    arguments = json.dumps({"city": "Os\0lo"})
    call = {"id": "a\0b", "function": {"name": "look\0" + "x" * 1_000, "arguments": arguments}}
    choice = {"message": {"content": "N\0L", "tool_calls": [call]}, "finish_reason": "tool_calls"}
    parser = openai_chat.OpenAiAnswerParser(MODEL, REQUEST)
    parser.feed(msgspec.json.encode({"choices": [choice]}))
    answer = parser.finish()
    (found,) = answer.tool_calls
    assert (answer.text, found.arguments) == ("N\ufffdL", {"city": "Os\ufffdlo"})
    assert (found.id, found.name[:6], len(found.name)) == ("a\ufffdb", "look\ufffdx", 200)


def test_counts_of_tokens_can_be_stored() -> None:
    parser = openai_chat.OpenAiAnswerParser(MODEL, REQUEST)
    usage = {"prompt_tokens": 10**30, "completion_tokens": 10**30}
    choice = {"message": {"content": "Hi"}, "finish_reason": "stop"}
    parser.feed(
        msgspec.json.encode({"choices": [choice]})[:-1] + b',"usage":' + json.dumps(usage).encode() + b"}"
    )
    found = parser.finish().usage
    assert msgspec.convert(msgspec.to_builtins(found), TokenUsage) == found


@pytest.mark.parametrize("depth", [60, 4_000])
def test_arguments_that_are_nested_too_deeply_are_refused(depth: int) -> None:
    nested = f'{{"a":{"[" * depth}{"]" * depth}}}'
    arguments, problem = provider_json.read_tool_arguments(nested)
    assert arguments is None
    assert "can't be stored" in problem
    assert provider_json.read_tool_arguments('{"a":[[1]]}') == ({"a": [[1]]}, "")
