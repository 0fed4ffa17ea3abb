"""Writes of agents whose outcome is unknown: a person decides whether they were made, and no effect is doubled."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from engine.run_records import NodeSpan, RunOutcome, RunStatus
from engine.values import Json
from tests.unit.test_agent_approvals import decide, list_questions, read_request
from tests.unit.test_agent_runs import ScriptedModel, World, compile_agent, turn

pytestmark = pytest.mark.anyio

COMPLETED = RunOutcome(RunStatus.COMPLETED)
BEHIND_THE_EFFECT = -4
"""Death before the commit with the result of the first write."""


def build_world(**tool: Json) -> World:
    program = compile_agent(lambda send: send.update(onUnknown="ask", **tool))
    return World(program, ScriptedModel([turn(("send", "Oslo"))]))


async def lose_the_write(world: World) -> NodeSpan:
    """Lose the worker behind the effect of the write; return the question that the next one asks about it."""
    assert await world.work(BEHIND_THE_EFFECT) is None
    return await ask(world)


async def ask(world: World) -> NodeSpan:
    ended = await world.work()
    assert ended is not None
    assert ended.status is RunStatus.WAITING
    (asked,) = list_questions(world)
    return asked


def answer(world: World, asked: NodeSpan, choice: str, **data: Json) -> None:
    output: dict[str, Json] = {"data": data, "choice": choice, "by": "user_1"}
    stored = json.dumps({"output": output, "port": choice}).encode()
    world.answers[asked.node_id, asked.iteration] = stored


def read_told(world: World) -> str:
    return world.model.requests[-1].messages[-1].content


async def test_a_person_is_asked_about_a_write_after_its_worker_was_lost() -> None:
    world = build_world()
    request = read_request(await lose_the_write(world))
    assert request["title"] == "Has agent called send?"
    assert "may have been made" in request["description"]
    assert '"city": "Oslo"' in request["description"]
    assert [each["port"] for each in request["choices"]] == ["done", "not-done", "repeat"]
    assert "parameters" not in request["toolCall"], "nothing is left to edit"
    assert len(world.outside.urls) == 1, "the call is not made again unasked"


async def test_the_result_of_a_call_that_was_made_goes_to_the_model() -> None:
    world = build_world()
    answer(world, await lose_the_write(world), "done", result="Report 7")
    assert await world.work() == COMPLETED
    assert read_told(world) == "Report 7"
    assert len(world.outside.urls) == 1
    assert list_questions(world) == []


async def test_the_reason_why_a_call_was_not_made_goes_to_the_model() -> None:
    world = build_world()
    answer(world, await lose_the_write(world), "not-done", reason="The mailbox is empty")
    assert await world.work() == COMPLETED
    told: dict[str, Any] = json.loads(read_told(world))
    assert told["error"] == "A person has found that this call was not made: The mailbox is empty"
    assert len(world.outside.urls) == 1


async def test_a_call_that_is_made_again_has_its_key_and_another_loss_is_another_question() -> None:
    world = build_world()
    first = await lose_the_write(world)
    answer(world, first, "repeat")
    # Lost again, behind the second request: the commit of the decision comes before it.
    assert await world.work(-3) is None
    assert len(world.outside.urls) == 2
    second = await ask(world)
    assert second.iteration != first.iteration
    answer(world, second, "repeat")
    assert await world.work() == COMPLETED
    assert len(world.outside.urls) == 3
    assert len(world.outside.effects) == 1, "all of them have the same key"


async def test_an_unknown_outcome_without_a_decision_goes_to_the_model() -> None:
    world = build_world()
    asked = await lose_the_write(world)
    assert asked.wake_at is not None
    week = timedelta(days=8)
    world.steps = [msgspec.structs.replace(step, started_at=step.started_at - week) for step in world.steps]
    assert await world.work() == COMPLETED
    assert "outcome is unknown" in read_told(world)
    assert len(world.outside.urls) == 1


async def test_a_person_is_asked_about_a_write_without_an_answer() -> None:
    world = build_world(timeout=0.05, maxAttempts=3)
    world.outside.delay_seconds = 30.0
    answer(world, await ask(world), "done", result="Sent")
    assert await world.work() == COMPLETED
    assert read_told(world) == "Sent"
    assert len(world.outside.urls) == 1


async def test_an_approved_call_that_is_lost_is_asked_about_and_not_approved_again() -> None:
    program = compile_agent(lambda send: send.update(onUnknown="ask"), approval="writes")
    world = World(program, ScriptedModel([turn(("send", "Oslo"))]))
    await ask(world)
    decide(world)
    # Behind the commit with the approval, and before the one with the result.
    assert await world.work(-3) is None
    assert len(world.outside.effects) == 1
    asked = await ask(world)
    assert read_request(asked)["title"] == "Has agent called send?"
    answer(world, asked, "repeat")
    assert await world.work() == COMPLETED
    assert len(world.outside.effects) == 1


async def test_a_death_at_any_commit_makes_no_call_without_an_answer() -> None:
    for last in range(1, 7):
        for kill in (-last, last):
            world = build_world()
            for _ in range(20):
                if (ended := await world.work(kill)) is None:
                    ended = await world.work()
                if ended == COMPLETED:
                    break
                for asked in list_questions(world):
                    answer(world, asked, "done" if world.outside.effects else "repeat")
            assert world.output["response"] == "Reported.", kill
            assert len(world.outside.urls) == len(world.outside.effects) == 1, kill
