"""Calls of a provider: its answers, its faults, and the secrets that stay hidden."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from ipaddress import ip_network

import msgspec
import pytest

from engine.model_calls import (
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelCallFailed,
    ModelProvider,
    RequestedToolCall,
    TokenUsage,
)
from engine.model_prices import ModelPrice, compute_cost, show_cost
from nodes.ai import model_client
from nodes.ai.model_client import ModelClient
from nodes.ai.model_connection import ECHO_MODEL, ModelConnection
from nodes.outbound_http import OutboundClient, OutboundPolicy
from tests.fakes.model_server import KEY, ModelFault, ScriptedAnswer, serve_models

pytestmark = pytest.mark.anyio

LOOPBACK = OutboundPolicy(allowed_networks=(ip_network("127.0.0.1/32"),))
REQUEST = ChatRequest((ChatMessage(MessageRole.USER, "How is Oslo?"),), max_tokens=50)
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}


def model_at(
    url: str,
    *,
    follows_schemas: bool = False,
    calls_tools: bool = False,
    key_header: str = "",
    provider: ModelProvider = ModelProvider.OPENAI_COMPATIBLE,
) -> ModelConnection:
    return ModelConnection(
        "model_1",
        provider,
        "scripted-1",
        url,
        KEY,
        key_header,
        follows_schemas=follows_schemas,
        calls_tools=calls_tools,
    )


@asynccontextmanager
async def open_model_client(policy: OutboundPolicy = LOOPBACK) -> AsyncGenerator[ModelClient]:
    outbound = OutboundClient(policy)
    try:
        yield ModelClient(outbound)
    finally:
        await outbound.close()


async def test_an_answer_is_read_from_a_stream_with_its_usage() -> None:
    async with serve_models() as served, open_model_client() as client:
        answer = await client.complete(model_at(served.url), REQUEST, idempotency_key="exec:llm:")
    assert (answer.text, answer.finish_reason, answer.model) == ("Cold.", FinishReason.STOP, "scripted-1")
    assert answer.usage == TokenUsage(100, 20)
    assert served.billed == ["exec:llm:"]
    assert served.headers[0]["authorization"] == f"Bearer {KEY}"
    assert served.requests[0]["model"] == "scripted-1"


async def test_the_key_has_the_header_of_its_data_source() -> None:
    async with serve_models() as served, open_model_client() as client:
        await client.complete(model_at(served.url, key_header="api-key"), REQUEST, idempotency_key="k")
    assert served.headers[0]["api-key"] == KEY
    assert "authorization" not in served.headers[0]


@pytest.mark.parametrize(
    ("fault", "code", "retryable", "can_fall_back"),
    [
        (ModelFault.RATE_LIMITED, "model-rate-limited", True, True),
        (ModelFault.SERVER_ERROR, "model-unavailable", True, True),
        (ModelFault.OVERLOADED, "model-unavailable", True, True),
        (ModelFault.NO_CREDIT, "model-credit-exhausted", False, True),
        (ModelFault.KEY_REFUSED, "model-key-refused", False, True),
        (ModelFault.CONTEXT_TOO_LONG, "model-request-refused", False, False),
        (ModelFault.CUT, "model-unavailable", True, True),
        (ModelFault.HUGE, "response-too-large", False, True),
        (ModelFault.REDIRECT, "model-redirected", False, True),
    ],
)
async def test_a_fault_is_a_failure_with_its_consequence(
    fault: ModelFault, code: str, *, retryable: bool, can_fall_back: bool
) -> None:
    async with serve_models(ScriptedAnswer(fault=fault)) as served, open_model_client() as client:
        with pytest.raises(ModelCallFailed) as failed:
            await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
    failure = failed.value
    assert (failure.code, failure.retryable, failure.can_fall_back) == (code, retryable, can_fall_back)
    assert "internal page" not in failure.message
    assert len(served.requests) == 1


@pytest.mark.parametrize(
    ("provider", "path"),
    [(ModelProvider.OPENAI_COMPATIBLE, "chat/completions"), (ModelProvider.ANTHROPIC, "messages")],
)
async def test_a_redirect_to_another_server_takes_neither_the_key_nor_the_question_there(
    provider: ModelProvider, path: str
) -> None:
    async with serve_models() as other, open_model_client() as client:
        script = ScriptedAnswer(fault=ModelFault.REDIRECT, location=f"{other.url}/{path}")
        async with serve_models(script) as served:
            with pytest.raises(ModelCallFailed) as failed:
                await client.complete(model_at(served.url, provider=provider), REQUEST, idempotency_key="k")
    assert (failed.value.code, failed.value.may_be_billed) == ("model-redirected", False)
    assert (len(served.requests), other.requests) == (1, [])


async def test_anthropic_is_asked_in_its_own_protocol() -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    script = ScriptedAnswer(tool_calls=[call]), ScriptedAnswer(fault=ModelFault.OVERLOADED_LATE)
    async with serve_models(*script) as served, open_model_client() as client:
        model = model_at(served.url, provider=ModelProvider.ANTHROPIC)
        answer = await client.complete(model, REQUEST, idempotency_key="exec:llm:")
        with pytest.raises(ModelCallFailed, match="Overloaded") as failed:
            await client.complete(model, REQUEST, idempotency_key="k")
        assert await client.list_models(model) == ["scripted-1", "scripted-2"]
    assert (answer.text, answer.usage) == ("Cold.", TokenUsage(100, 20))
    assert answer.tool_calls == (RequestedToolCall("toolu_0", "get_weather", {"city": "Oslo"}),)
    assert served.headers[0]["x-api-key"] == KEY
    assert served.headers[0]["anthropic-version"] == "2023-06-01"
    assert "authorization" not in served.headers[0]
    assert (failed.value.code, failed.value.retryable) == ("model-unavailable", True)


async def test_a_model_that_calls_tools_answers_by_a_schema_through_one() -> None:
    call = {"name": "give_answer", "arguments": '{"city": "Oslo"}'}
    request = ChatRequest(REQUEST.messages, 50, output_schema=SCHEMA)
    async with serve_models(ScriptedAnswer(tool_calls=[call])) as served, open_model_client() as client:
        answers = [
            await client.complete(
                model_at(served.url, calls_tools=True, provider=provider), request, idempotency_key="k"
            )
            for provider in (ModelProvider.OPENAI_COMPATIBLE, ModelProvider.ANTHROPIC)
        ]
    for answer in answers:
        assert (answer.text, answer.finish_reason) == ('{"city":"Oslo"}', FinishReason.STOP)
        assert answer.tool_calls == ()
    assert served.requests[0]["tools"][0]["function"]["parameters"] == SCHEMA
    assert served.requests[1]["tool_choice"] == {"type": "tool", "name": "give_answer"}


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("-1", 0),
        ("Sun, 29 Nov 2026 10:00:30 GMT", 30),
        ("999999", 86_400),
        ("nan", None),
        ("soon", None),
        ("", None),
    ],
)
def test_the_time_to_wait_is_read_from_seconds_or_a_date(given: str, seconds: float | None) -> None:
    headers = {"retry-after": given, "date": "Sun, 29 Nov 2026 10:00:00 GMT"}
    assert model_client.build_status_failure(429, headers, b"").retry_after_seconds == seconds


async def test_a_rate_limit_says_when_calls_are_accepted_again() -> None:
    async with (
        serve_models(ScriptedAnswer(fault=ModelFault.RATE_LIMITED)) as served,
        open_model_client() as client,
    ):
        with pytest.raises(ModelCallFailed, match="429 Too Many Requests: Rate limit reached") as failed:
            await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
    assert failed.value.retry_after_seconds == 7


@pytest.mark.parametrize("fault", [ModelFault.SLOW_FIRST_BYTE, ModelFault.STALL])
async def test_a_provider_that_stalls_is_given_up(fault: ModelFault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_client, "IDLE_SECONDS", 0.2)
    async with serve_models(ScriptedAnswer(fault=fault)) as served, open_model_client() as client:
        with pytest.raises(ModelCallFailed) as failed:
            await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
    assert (failed.value.code, failed.value.retryable) == ("model-unavailable", True)


async def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pauses are short, so that the limit of a pause never ends it."""
    monkeypatch.setattr(model_client, "TOTAL_SECONDS", 0.5)
    async with (
        serve_models(ScriptedAnswer(fault=ModelFault.NEVER_ENDS)) as served,
        open_model_client() as client,
    ):
        with pytest.raises(ModelCallFailed, match=r"within 0\.5 s") as failed:
            await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
    failure = failed.value
    assert (failure.code, failure.retryable, failure.may_be_billed) == ("model-unavailable", True, True)


async def test_a_provider_that_was_never_reached_bills_nothing() -> None:
    """Nothing was sent: the port of a server that has ended refuses connections."""
    async with serve_models() as served:
        url = served.url
    async with open_model_client() as client:
        with pytest.raises(ModelCallFailed) as failed:
            await client.complete(model_at(url), REQUEST, idempotency_key="k")
    failure = failed.value
    assert (failure.code, failure.retryable, failure.may_be_billed) == ("model-unavailable", True, False)


async def test_a_call_on_a_broken_connection_is_not_repeated_here() -> None:
    """The provider may have read and billed it, so that only the retry of the node repeats it, visibly."""
    async with serve_models() as served, open_model_client() as client:
        model = model_at(served.url)
        await client.complete(model, REQUEST, idempotency_key="1")
        served.script[:] = [ScriptedAnswer(fault=ModelFault.CLOSED)]
        with pytest.raises(ModelCallFailed) as failed:
            await client.complete(model, REQUEST, idempotency_key="2")
        first, second = served.connections
        assert first is not second, "servers of one's own close connections that they have promised to keep"
    failure = failed.value
    assert (failure.code, failure.retryable, failure.may_be_billed) == ("model-unavailable", True, True)
    assert len(served.requests) == 2


async def test_a_cancelled_call_closes_the_connection() -> None:
    async with (
        serve_models(ScriptedAnswer(fault=ModelFault.STALL)) as served,
        open_model_client() as client,
    ):
        begun = asyncio.Event()
        served.on_request = begun.set
        call = asyncio.create_task(client.complete(model_at(served.url), REQUEST, idempotency_key="k"))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert client._outbound._open == set()  # noqa: SLF001 - nothing else tells an open connection


async def test_the_key_is_hidden_in_errors() -> None:
    async with (
        serve_models(ScriptedAnswer(fault=ModelFault.REPEATS_KEY)) as served,
        open_model_client() as client,
    ):
        with pytest.raises(ModelCallFailed) as failed:
            await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
    assert KEY not in failed.value.message
    assert "[hidden]" in failed.value.message
    assert KEY not in repr(model_at(served.url))


async def test_an_answer_that_repeats_the_key_has_it_hidden() -> None:
    async with serve_models(ScriptedAnswer(text=f"It is {KEY}.")) as served, open_model_client() as client:
        answer = await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
    assert answer.text == "It is [hidden]."


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(ModelFault.LENGTH, FinishReason.LENGTH), (ModelFault.REFUSAL, FinishReason.REFUSAL)],
)
async def test_an_end_by_length_or_refusal_is_a_result(fault: ModelFault, reason: FinishReason) -> None:
    async with serve_models(ScriptedAnswer(fault=fault)) as served, open_model_client() as client:
        answer = await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
    assert answer.finish_reason is reason


@pytest.mark.parametrize("fault", [ModelFault.NO_USAGE, ModelFault.NO_STREAM])
async def test_servers_may_leave_out_usage_or_the_stream(fault: ModelFault) -> None:
    async with serve_models(ScriptedAnswer(fault=fault)) as served, open_model_client() as client:
        answer = await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
    assert answer.text == "Cold."
    assert answer.usage.is_estimated == (fault is ModelFault.NO_USAGE)


async def test_a_model_without_schemas_is_asked_in_words() -> None:
    request = ChatRequest(REQUEST.messages, 50, output_schema=SCHEMA)
    async with serve_models() as served, open_model_client() as client:
        await client.complete(model_at(served.url), request, idempotency_key="k")
        await client.complete(model_at(served.url, follows_schemas=True), request, idempotency_key="k")
    in_words, native = served.requests
    assert "JSON Schema" in in_words["messages"][0]["content"]
    assert "response_format" not in in_words
    asked = native["response_format"]["json_schema"]
    assert (asked["schema"], asked["strict"]) == ({**SCHEMA, "additionalProperties": False}, True)
    assert len(native["messages"]) == 1


@pytest.mark.parametrize(
    ("abilities", "form", "has_tool", "in_words"),
    [
        (("follows_schemas", "has_json_mode", "calls_tools"), "json_schema", False, False),
        (("has_json_mode", "calls_tools"), "json_object", False, True),
        (("calls_tools",), None, True, False),
        ((), None, False, True),
    ],
)
async def test_a_value_is_asked_for_in_the_best_way_that_a_model_knows(
    abilities: tuple[str, ...], form: str | None, *, has_tool: bool, in_words: bool
) -> None:
    request = ChatRequest(REQUEST.messages, 50, output_schema=SCHEMA)
    async with serve_models() as served, open_model_client() as client:
        model = msgspec.structs.replace(model_at(served.url), **dict.fromkeys(abilities, True))
        await client.complete(model, request, idempotency_key="k")
    (sent,) = served.requests
    assert (sent.get("response_format") or {}).get("type") == form
    assert ("tools" in sent, "JSON Schema" in sent["messages"][0]["content"]) == (has_tool, in_words)


async def test_json_mode_is_for_objects_and_for_protocols_that_have_it() -> None:
    values = ChatRequest(REQUEST.messages, 50, output_schema={"type": "array"})
    request = ChatRequest(REQUEST.messages, 50, output_schema=SCHEMA)
    async with serve_models() as served, open_model_client() as client:
        model = msgspec.structs.replace(model_at(served.url), has_json_mode=True)
        await client.complete(model, values, idempotency_key="k")
        other = msgspec.structs.replace(model, provider=ModelProvider.ANTHROPIC)
        await client.complete(other, request, idempotency_key="k")
    assert not any("response_format" in sent for sent in served.requests)
    assert "JSON Schema" in served.requests[0]["messages"][0]["content"]
    assert "JSON Schema" in served.requests[1]["system"]


async def test_a_private_provider_is_reached_only_if_the_operator_names_it() -> None:
    async with serve_models() as served:
        async with open_model_client(OutboundPolicy()) as client:
            with pytest.raises(ModelCallFailed) as failed:
                await client.complete(model_at(served.url), REQUEST, idempotency_key="k")
        assert failed.value.code == "address-not-allowed"
        host = served.url.removeprefix("http://").removesuffix("/v1")
        async with open_model_client(OutboundPolicy(allowed_hosts=frozenset({host}))) as client:
            assert (await client.complete(model_at(served.url), REQUEST, idempotency_key="k")).text == "Cold."


async def test_the_models_of_a_provider_are_listed() -> None:
    async with serve_models() as served, open_model_client() as client:
        assert await client.list_models(model_at(served.url)) == ["scripted-1", "scripted-2"]


async def test_echo_answers_with_the_question_or_a_value_of_the_schema() -> None:
    async with open_model_client(OutboundPolicy()) as client:
        answer = await client.complete(ECHO_MODEL, REQUEST, idempotency_key="k")
        assert answer.text == "How is Oslo?"
        request = ChatRequest(REQUEST.messages, 50, output_schema=SCHEMA)
        assert (await client.complete(ECHO_MODEL, request, idempotency_key="k")).text == '{"city":"Oslo"}'


def test_the_cost_of_a_call_counts_cached_tokens_once() -> None:
    usage = TokenUsage(1_000, 100, cache_read_tokens=800)
    price = ModelPrice("3", "15", cache_read="0.3")
    assert compute_cost(usage, price) == 200 * 3_000 + 800 * 300 + 100 * 15_000
    assert compute_cost(TokenUsage(1, 0), ModelPrice("0.000001", "0")) == 1
    assert show_cost(2_340_000) == "0.00234"
    assert show_cost(0) == "0"
    assert show_cost(10_000_000_000) == "10"
    assert show_cost(None) is None
