"""Agents of models without tool calls: they answer with JSON, which is a call or the final answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, cast

import pytest

from engine.model_calls import (
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    RequestedToolCall,
    TokenUsage,
    ToolDescription,
    ToolMode,
)
from engine.values import Json
from nodes.ai import json_tools
from tests.fakes.model_lookup import open_served_models
from tests.fakes.model_server import ModelFault, ScriptedAnswer, serve_models
from tests.unit.test_agent_runs import ScriptedModel, World, compile_agent

pytestmark = pytest.mark.anyio

CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NATIVE_CALL: dict[str, Any] = {"name": "look", "arguments": '{"city": "Oslo"}'}


def chosen(**fields: Json) -> ScriptedAnswer:
    """Return an answer in the form that a model without tool calls is asked for."""
    return ScriptedAnswer(json.dumps({"next": fields}))


LOOK = chosen(tool="look", arguments={"city": "Oslo"})
DONE = chosen(answer="Cold.")


async def run_agent(
    urls: Mapping[str, str],
    ignoring_tools: Collection[str] = (),
    **config: Json,
) -> World:
    """Run an agent with the tools `look` and `send` to its end."""
    models = open_served_models(urls, ignoring_tools=ignoring_tools)
    try:
        world = World(compile_agent(**config), cast("ScriptedModel", models))
        assert await world.work() is not None
    finally:
        await models.close()
    return world


def list_choices(request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the objects that the schema of a request allows under `next`."""
    allowed = request["response_format"]["json_schema"]["schema"]["properties"]["next"]
    return cast("list[Mapping[str, Any]]", allowed.get("anyOf", [allowed]))


async def test_a_model_without_tool_calls_works_with_tools_until_the_brake() -> None:
    async with serve_models(LOOK, LOOK, LOOK, DONE) as served:
        world = await run_agent({"first": served.url}, toolMode="json")
    assert (world.output["response"], world.output["stopReason"]) == ("Cold.", "loop")
    assert world.outside.urls == ["https://a.example/Oslo"] * 3
    first, *_, last = served.requests
    assert all("tools" not in request for request in served.requests)
    look, send, final = list_choices(first)
    assert [each["properties"].get("tool", {}).get("enum") for each in (look, send)] == [["look"], ["send"]]
    assert look["properties"]["arguments"] == {**CITY, "additionalProperties": False}
    assert list(final["properties"]) == ["answer"]
    assert [list(each["properties"]) for each in list_choices(last)] == [["answer"]], (
        "the last turn has no tools"
    )
    roles = [message["role"] for message in last["messages"]]
    assert roles == ["system", "user", *["assistant", "user"] * 3]
    assert last["messages"][2]["content"] == LOOK.text.replace(" ", "")
    assert "Result of look:" in last["messages"][3]["content"]


@pytest.mark.parametrize(
    ("mode", "ignores_tools", "is_json"),
    [("auto", True, True), ("auto", False, False), ("native", True, False), ("json", False, True)],
)
async def test_the_test_of_the_model_decides_unless_the_agent_does(
    mode: str,
    ignores_tools: bool,  # noqa: FBT001 - pytest passes arguments by name
    is_json: bool,  # noqa: FBT001 - as above
) -> None:
    call = LOOK if is_json else ScriptedAnswer("", tool_calls=[NATIVE_CALL])
    async with serve_models(call, DONE if is_json else ScriptedAnswer("Cold.")) as served:
        world = await run_agent({"first": served.url}, ["first"] if ignores_tools else [], toolMode=mode)
    assert (world.output["response"], world.outside.urls) == ("Cold.", ["https://a.example/Oslo"])
    assert ["tools" in request for request in served.requests] == [not is_json] * 2


async def test_wrong_answers_go_back_to_the_model() -> None:
    unknown, wrong = chosen(tool="fly", arguments={}), chosen(tool="look", arguments="Oslo")
    async with serve_models(unknown, wrong, LOOK, DONE) as served:
        world = await run_agent({"first": served.url}, toolMode="json")
    assert [step["status"] for step in world.output["steps"] if step["kind"] == "tool"] == [
        *("failed", "failed", "completed")
    ]
    told = [request["messages"][-1]["content"] for request in served.requests[1:3]]
    assert "There is no tool 'fly'" in told[0]
    assert "`arguments` is no JSON object" in told[1]


async def test_the_final_answer_has_its_own_schema_and_is_corrected() -> None:
    schema: dict[str, Json] = {
        "type": "object",
        "properties": {"degrees": {"type": "integer"}},
        "required": ["degrees"],
    }
    wrong, right = chosen(answer={"degrees": "-3"}), ScriptedAnswer('{"degrees": -3}')
    async with serve_models(LOOK, wrong, right) as served:
        world = await run_agent({"first": served.url}, toolMode="json", outputSchema=schema)
    assert (world.output["data"], world.output["stopReason"]) == ({"degrees": -3}, "finished")
    closed = {**schema, "additionalProperties": False}
    assert list_choices(served.requests[1])[-1]["properties"]["answer"] == closed
    assert served.requests[2]["response_format"]["json_schema"]["schema"] == closed
    assert all(message["role"] != "tool" for message in served.requests[2]["messages"])


async def test_models_of_both_kinds_continue_each_others_conversations() -> None:
    busy = ScriptedAnswer(fault=ModelFault.SERVER_ERROR)
    async with serve_models(LOOK, busy) as first, serve_models(ScriptedAnswer("Cold.")) as second:
        urls = {"first": first.url, "second": second.url}
        world = await run_agent(urls, ["first"], fallbackModelIds=["second"])
    assert world.output["response"] == "Cold."
    (request,) = second.requests
    assert [message["role"] for message in request["messages"]][-2:] == ["assistant", "tool"]
    assert [tool["function"]["name"] for tool in request["tools"]] == ["look", "send"]


# ── forms of an answer ──────────────────────────────────────────────────────────────────────────────────────

TOOL = ToolDescription("look", "The weather of a city.", CITY)
QUESTION = ChatRequest(
    [ChatMessage(MessageRole.USER, "How is it?")], 100, tools=[TOOL], tool_mode=ToolMode.JSON
)


def read(text: str, reason: FinishReason = FinishReason.STOP) -> ChatAnswer:
    return json_tools.translate_answer(ChatAnswer(text, reason, TokenUsage(1, 1), "m"), QUESTION)


@pytest.mark.parametrize(
    "text",
    [
        '{"next": {"tool": "look", "arguments": {"city": "Oslo"}}}',
        '{"tool": "look", "arguments": {"city": "Oslo"}}',
        '```json\n{"next": {"tool": "look", "arguments": {"city": "Oslo"}}}\n```',
    ],
)
def test_a_call_is_read_in_each_form_that_leaves_no_doubt(text: str) -> None:
    answer = read(text)
    assert answer.tool_calls == (RequestedToolCall("call_0", "look", {"city": "Oslo"}),)
    assert (answer.text, answer.finish_reason) == ("", FinishReason.TOOL_CALLS)


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ('{"next": {"answer": "Cold."}}', "Cold."),
        ('{"answer": "Cold."}', "Cold."),
        ('{"next": {"answer": {"degrees": -3}}}', '{"degrees":-3}'),
        ("It is cold.", "It is cold."),
        ('{"tool": "hammer", "price": 3}', '{"tool": "hammer", "price": 3}'),
        ('{"next": {"tool": "lo', '{"next": {"tool": "lo'),
    ],
)
def test_everything_else_is_the_final_answer(text: str, final: str) -> None:
    answer = read(text)
    assert (answer.text, list(answer.tool_calls)) == (final, [])


def test_a_cut_answer_stays_one() -> None:
    assert read('{"next": {"answer": "Co', FinishReason.LENGTH).finish_reason is FinishReason.LENGTH


def test_parameters_with_references_are_only_validated_afterwards() -> None:
    referring = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "$defs": {"city": {}}}
    tool = ToolDescription("look", "", referring)
    sent = json_tools.translate_request(ChatRequest(QUESTION.messages, 100, tools=[tool]))
    assert sent.output_schema is not None
    call = sent.output_schema["properties"]["next"]["anyOf"][0]
    assert call["properties"]["arguments"] == {"type": "object"}
    assert "#/$defs/city" in sent.messages[0].content


def test_the_rules_are_within_their_estimate() -> None:
    rules = json_tools.translate_request(QUESTION).messages[0].content
    tool = f"- look: {TOOL.description} Arguments: "
    assert (len(rules) - len(tool) - len(json.dumps(CITY))) / 3 < 150
