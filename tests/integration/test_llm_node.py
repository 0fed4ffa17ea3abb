"""The node `llm`: answers, costs, corrections, and other models where one does not answer."""

from __future__ import annotations

from typing import Any

import pytest

from engine.model_prices import ModelPrice
from engine.run_errors import NodeError
from engine.values import Json
from nodes.lazy_models import LazyModels
from tests.fakes.model_lookup import LOOPBACK, PRICE, ServedModels, open_served_models
from tests.fakes.model_server import ModelFault, ScriptedAnswer, serve_models
from tests.node_calls import CallRecord, call

pytestmark = pytest.mark.anyio

SCHEMA: dict[str, Json] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
CONFIG: dict[str, Json] = {"model": "first", "prompt": "How is {{ data.city }}?"}
OSLO: Json = {"city": "Oslo"}


async def ask(
    urls: dict[str, str], price: ModelPrice | None = PRICE, **config: Json
) -> tuple[dict[str, Any], CallRecord]:
    models = open_served_models(urls, price)
    try:
        called = await call("llm", {**CONFIG, **config}, OSLO, models=models)
    finally:
        await models.close()
    assert isinstance(called.output, dict)
    return called.output, called


async def test_the_answer_has_the_usage_and_the_exact_cost() -> None:
    async with serve_models() as served:
        output, _ = await ask({"first": served.url}, system="Be short.", temperature=0.5)
    assert output == {
        "response": "Cold.",
        "model": "first",
        "finishReason": "stop",
        "usage": {
            "inputTokens": 100,
            "outputTokens": 20,
            "cacheReadTokens": 0,
            "cacheWriteTokens": 0,
            "reasoningTokens": 0,
            "isEstimated": False,
        },
        "cost": "0.0003",
    }
    assert served.requests[0]["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "How is Oslo?"},
    ]
    assert (served.requests[0]["temperature"], served.requests[0]["max_tokens"]) == (0.5, 1000)


async def test_without_a_price_the_cost_is_unknown_and_not_zero() -> None:
    async with serve_models() as served:
        output, _ = await ask({"first": served.url}, None)
    assert output["cost"] is None


async def test_an_answer_is_validated_and_corrected_at_the_cost_of_both_calls() -> None:
    async with serve_models(ScriptedAnswer('{"city": 1}'), ScriptedAnswer('{"city": "Oslo"}')) as served:
        output, _ = await ask({"first": served.url}, outputSchema=SCHEMA)
    assert output["data"] == {"city": "Oslo"}
    assert (output["usage"]["inputTokens"], output["cost"]) == (200, "0.0006")
    correction = served.requests[1]["messages"][-1]["content"]
    assert 'city: 1 is not of type "string"' in correction
    assert len(set(served.billed)) == 2


async def test_an_answer_that_never_fits_fails_with_its_text() -> None:
    async with serve_models(ScriptedAnswer("Cold, I think.")) as served:
        with pytest.raises(NodeError, match=r"after 2 corrections: .*Cold, I think\.") as failed:
            await ask({"first": served.url}, outputSchema=SCHEMA)
    assert failed.value.code == "invalid-answer"
    assert not failed.value.retryable
    assert len(served.billed) == 3


@pytest.mark.parametrize(
    ("fault", "reason"), [(ModelFault.LENGTH, "length"), (ModelFault.REFUSAL, "refusal")]
)
async def test_an_incomplete_answer_is_not_corrected(fault: ModelFault, reason: str) -> None:
    async with serve_models(ScriptedAnswer('{"city": ', fault)) as served:
        output, _ = await ask({"first": served.url}, outputSchema=SCHEMA)
    assert (output["data"], output["finishReason"], output["response"]) == (None, reason, '{"city": ')
    assert len(served.billed) == 1


@pytest.mark.parametrize("fault", [ModelFault.RATE_LIMITED, ModelFault.SERVER_ERROR, ModelFault.CUT])
async def test_another_model_answers_where_one_does_not(fault: ModelFault) -> None:
    async with serve_models(ScriptedAnswer(fault=fault)) as first, serve_models() as second:
        output, called = await ask({"first": first.url, "second": second.url}, fallbackModelIds=["second"])
    assert (output["model"], output["response"]) == ("second", "Cold.")
    ((level, line),) = called.lines
    assert level == "warning"
    assert line.endswith("second is asked instead")


async def test_a_refused_request_is_given_to_no_other_model() -> None:
    refusing = ScriptedAnswer(fault=ModelFault.CONTEXT_TOO_LONG)
    async with serve_models(refusing) as first, serve_models() as second:
        with pytest.raises(NodeError, match=r"first: .*maximum context length") as failed:
            await ask({"first": first.url, "second": second.url}, fallbackModelIds=["second"])
    assert failed.value.code == "model-request-refused"
    assert second.requests == []


async def test_the_last_failure_is_that_of_the_node() -> None:
    limited = ScriptedAnswer(fault=ModelFault.RATE_LIMITED)
    async with serve_models(limited) as served:
        with pytest.raises(NodeError) as failed:
            await ask({"first": served.url, "second": served.url}, fallbackModelIds=["second"])
    assert (failed.value.code, failed.value.retryable) == ("model-rate-limited", True)


async def test_earlier_messages_come_before_the_prompt() -> None:
    earlier: Json = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    async with serve_models() as served:
        await ask({"first": served.url}, messages=earlier)
    assert [message["role"] for message in served.requests[0]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"prompt": ""}, "missing-config"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid-config"),
        ({"outputSchema": {"type": "strange"}}, "invalid-schema"),
        ({"outputSchema": {"$ref": "https://example.com/schema"}}, "invalid-schema"),
        ({"model": "unknown"}, "model-not-found"),
    ],
)
async def test_wrong_configs_fail_with_their_reason(config: dict[str, Json], code: str) -> None:
    async with serve_models(ScriptedAnswer("{}")) as served:
        with pytest.raises(NodeError) as failed:
            await ask({"first": served.url}, PRICE, **config)
    assert (failed.value.code, failed.value.retryable) == (code, False)


@pytest.mark.parametrize(
    ("fault", "is_kept"),
    [(ModelFault.CUT, True), (ModelFault.RATE_LIMITED, False), (ModelFault.CONTEXT_TOO_LONG, False)],
)
async def test_the_reservation_of_a_call_that_may_be_billed_stands(
    fault: ModelFault, *, is_kept: bool
) -> None:
    async with serve_models(ScriptedAnswer(fault=fault)) as served:
        lookup = ServedModels({"first": served.url})
        models = LazyModels(lambda: lookup, LOOPBACK, ())
        with pytest.raises(NodeError):
            await call("llm", {"model": "first", "prompt": "Hi", "maxTokens": 50}, None, models=models)
        await models.close()
    kept = list(lookup.ledger.reserved.values())
    assert len(kept) == is_kept
    if is_kept:
        # All of the input and the longest answer, at the price of the model.
        assert (kept[0].tokens, kept[0].cost) == (1 + 100 + 50, 101 * 1_000 + 50 * 10_000)


async def test_an_answer_settles_its_reservation() -> None:
    async with serve_models() as served:
        lookup = ServedModels({"first": served.url})
        models = LazyModels(lambda: lookup, LOOPBACK, ())
        budget: Json = {"maxCost": "1", "maxTokens": 1000}
        config: dict[str, Json] = {"model": "first", "prompt": "Hi", "budget": budget}
        await call("llm", config, None, models=models)
        await models.close()
    (settled,) = lookup.ledger.settled.values()
    assert (settled.cost, settled.node, lookup.ledger.reserved) == (100 * 1_000 + 20 * 10_000, "node:", {})
    assert settled.key.startswith(served.billed[0])


async def test_a_call_that_is_repeated_under_its_key_is_charged_again() -> None:
    async with serve_models() as served:
        lookup = ServedModels({"first": served.url})
        models = LazyModels(lambda: lookup, LOOPBACK, ())
        for _ in range(2):
            await call("llm", {"model": "first", "prompt": "Hi"}, None, models=models)
        await models.close()
    assert len(set(served.billed)) == 1
    assert len(lookup.ledger.settled) == 2


async def call_served(
    node_type: str, config: dict[str, Json], *answers: ScriptedAnswer
) -> tuple[CallRecord, list[dict[str, Any]]]:
    """Call a node with a scripted model; return the call, and the requests that the model got."""
    async with serve_models(*answers) as served:
        models = open_served_models({"first": served.url})
        try:
            called = await call(node_type, {"model": "first", **config}, OSLO, models=models)
        finally:
            await models.close()
    return called, served.requests


ROUTES: dict[str, Json] = {
    "prompt": "{{ data.city }}",
    "routes": [{"port": "north", "description": "Cold places."}, {"port": "south"}],
}


@pytest.mark.parametrize(
    ("threshold", "answer", "port"),
    [
        ({}, '{"port": "north", "reason": "It is cold."}', "north"),
        ({}, '{"port": "default", "reason": "It is cold."}', "default"),
        ({"threshold": 0.8}, '{"port": "north", "reason": "It is cold.", "confidence": 0.9}', "north"),
        ({"threshold": 0.8}, '{"port": "north", "reason": "It is cold.", "confidence": 0.7}', "default"),
    ],
)
async def test_a_router_takes_the_port_that_the_model_has_chosen(
    threshold: dict[str, Json], answer: str, port: str
) -> None:
    called, requests = await call_served("llm-router", {**ROUTES, **threshold}, ScriptedAnswer(answer))
    assert isinstance(called.output, dict)
    assert (called.port, called.output["port"], called.output["reason"]) == (port, port, "It is cold.")
    (schema,) = [each["response_format"]["json_schema"]["schema"] for each in requests]
    assert schema["properties"]["port"] == {"enum": ["default", "north", "south"]}


async def test_a_router_takes_no_port_that_it_does_not_have() -> None:
    wrong = [ScriptedAnswer('{"port": "east", "reason": "It is there."}')] * 3
    called, requests = await call_served("llm-router", ROUTES, *wrong)
    assert isinstance(called.output, dict)
    assert (called.port, len(requests), called.output["cost"]) == ("default", 3, "0.0009")
    assert called.output["reason"] == "The model has named no port"


async def test_an_incomplete_answer_of_a_router_takes_the_default_port() -> None:
    called, requests = await call_served("llm-router", ROUTES, ScriptedAnswer(fault=ModelFault.LENGTH))
    assert (called.port, len(requests)) == ("default", 1)


async def test_an_ai_gateway_asks_with_both_prompts_and_counts_all_tokens() -> None:
    config: dict[str, Json] = {"userPrompt": "How is {{ data.city }}?", "systemPrompt": "Be short."}
    called, requests = await call_served("ai-gateway", config)
    output = called.output
    assert isinstance(output, dict)
    milliseconds = output.pop("responseTimeMs")
    assert isinstance(milliseconds, int)
    assert milliseconds >= 0
    assert output == {
        "response": "Cold.",
        "model": "first",
        "usage": {"promptTokens": 100, "completionTokens": 20, "totalTokens": 120},
        "finishReason": "stop",
        "cost": "0.0003",
    }
    assert [message["content"] for message in requests[0]["messages"]] == ["Be short.", "How is Oslo?"]
    assert (requests[0]["temperature"], requests[0]["max_tokens"]) == (0.7, 1000)
