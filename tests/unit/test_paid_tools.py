"""Tools of agents that ask language models themselves: their answers are paid once, and within the agent's budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from engine.graph import ParsedGraph
from engine.model_calls import ChatAnswer, ChatRequest, FinishReason, ModelReply, NodeSpending, TokenUsage
from engine.program import WorkflowProgram
from engine.run_records import RunOutcome, RunStatus
from engine.services import AnswerOrigin, HiddenAnswers, LiveAnswer, RunCaller
from engine.values import Json
from nodes.catalog import load_catalog
from tests.unit.test_agent_runs import AGENT, LOOK, ScriptedModel, World, turn

pytestmark = pytest.mark.anyio

PRICE = 1_000
"""Nano-dollars of one answer."""
SCHEMA: Json = {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}
TURNS = [turn(("read", "Oslo"), ("read", "Rome")), turn(("read", "Bonn"))]
ANSWERS = len(TURNS) + 1 + 2 * 3
"""Answers to the agent, and two to each of three calls: a wrong one and its correction."""


@dataclass
class ReadingModel(ScriptedModel):
    """Model of the agent and of its tool, which it answers wrongly first."""

    is_never_right: bool = False
    spendings: list[NodeSpending] = field(default_factory=list)
    """Of the calls of the tool."""
    open_calls: int = 0

    async def complete(
        self,
        caller: RunCaller,
        model_id: str,
        request: ChatRequest,
        *,
        idempotency_key: str,
        spending: NodeSpending,
        on_text: Callable[[str], None] | None = None,
    ) -> ModelReply:
        if request.output_schema is None:
            given = await super().complete(
                caller, model_id, request, idempotency_key=idempotency_key, spending=spending, on_text=on_text
            )
            return ModelReply(given.answer, PRICE)
        self.open_calls += 1
        assert self.open_calls == 1, "each call may spend all that is left"
        self.spendings.append(spending)
        self.billed.append(idempotency_key)
        is_right = not self.is_never_right and len(request.messages) > 2
        text = '{"size": 7}' if is_right else '{"size": "big"}'
        self.open_calls -= 1
        return ModelReply(ChatAnswer(text, FinishReason.STOP, TokenUsage(100, 20), "first-1"), PRICE)


def build_world(budget: dict[str, Json] | None = None, *, is_never_right: bool = False) -> World:
    extract: dict[str, Json] = {"model": "first", "input": "{{ args.city }}", "schema": SCHEMA}
    read: Json = {**LOOK, "name": "read", "target": {"node": {"type": "extract", "config": extract}}}
    nodes: list[Json] = [
        {"id": "start", "type": "manual"},
        {"id": "agent", "type": "agent", "config": {**AGENT, "model": "first", "budget": budget or {}}},
        {"id": "read", "type": "tool", "config": read},
    ]
    edges: list[Json] = [
        {"id": "1", "source": "start", "target": "agent"},
        {"id": "2", "source": "read", "target": "agent", "targetPort": "tools"},
    ]
    catalog = load_catalog()
    graph = ParsedGraph.from_stored({"nodes": nodes, "connections": edges})
    program = WorkflowProgram.compile(graph, catalog, catalog.implementation)
    return World(program, ReadingModel(TURNS, is_never_right=is_never_right))


def list_recorded(world: World) -> list[dict[str, Any]]:
    """Return the recorded calls of models, of the agent and its tool."""
    (span,) = [span for span in world.spans if span.node_id == "agent"]
    found: list[dict[str, Any]] = json.loads(span.model_calls or b"[]")
    return found


async def test_a_death_at_any_commit_costs_at_most_one_answer_of_a_tool() -> None:
    worker = build_world().worker()
    assert (await worker.work()).status is RunStatus.COMPLETED
    for last in range(1, worker.notebook.commits + 1):
        for kill in (-last, last):
            world = build_world()
            assert await world.work(kill) is None, kill
            assert await world.work() == RunOutcome(RunStatus.COMPLETED)
            assert len(list_recorded(world)) == ANSWERS, kill
            assert ANSWERS <= len(world.model.billed) <= ANSWERS + world.died, kill
            assert world.output["cost"] == "0.000009"


async def test_the_answers_of_a_tool_that_fails_are_paid_too() -> None:
    world = build_world(is_never_right=True)
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    told = [one["content"] for one in world.output["messages"] if one["role"] == "tool"]
    assert all("invalid-answer" in text for text in told)
    assert len(list_recorded(world)) == len(world.model.billed) == len(TURNS) + 1 + 3 * 3
    assert world.output["usage"]["inputTokens"] == 100 * len(world.model.billed)


async def test_a_tool_may_spend_the_rest_of_its_agents_budget_less_a_last_answer() -> None:
    world = build_world({"maxCost": "0.0001", "maxTokens": 50_000})
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert isinstance(world.model, ReadingModel)
    spendings = world.model.spendings
    assert {spending.node for spending in spendings} == {"read:"}
    budgets = [spending.budget for spending in spendings]
    # All of it less the answers of the agent before, and a last one as dear as these. The ledger counts the tool's own.
    expected = [*["0.000098"] * 4, *["0.000097"] * 2]
    assert [budget.max_cost for budget in budgets if budget is not None] == expected
    assert all(budget.max_tokens < 50_000 for budget in budgets if budget and budget.max_tokens)


async def test_clients_can_tell_the_texts_of_calls_of_a_tool_apart() -> None:
    opened: list[AnswerOrigin] = []

    class NotedAnswers(HiddenAnswers):
        def open(self, origin: AnswerOrigin) -> AbstractContextManager[LiveAnswer]:
            opened.append(origin)
            return super().open(origin)

    world = replace(build_world(), services={"live_answers": NotedAnswers()})
    assert await world.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(opened) == ANSWERS
    assert len({(one.node_id, one.iteration, one.number) for one in opened}) == ANSWERS
    places = {one.iteration for one in opened if one.node_id == "read"}
    # Step 0 is the answer with the first two calls.
    assert sorted(iteration.partition("-")[0] for iteration in places) == ["1", "2", "4"]
