"""Replays of agents: recorded answers are used again while the requests are the same, through deaths of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from engine.agents.agent_steps import AgentStep, StepKind, StepReuse, StepStatus
from engine.run_records import RunOutcome, RunStatus, SpanStatus
from engine.values import Json
from tests.unit.test_agent_approvals import build_world as build_asking_world
from tests.unit.test_agent_approvals import list_questions, work_to_the_end
from tests.unit.test_agent_runs import TURNS, ScriptedModel, World, compile_agent
from tests.unit.test_nested_agents import TwoScripts
from tests.unit.test_nested_agents import build_world as build_nested_world

pytestmark = pytest.mark.anyio

ANSWERS = len(TURNS) + 1


async def fail_at(world: World, answer: int) -> None:
    """Run an agent until its model refuses the answer with this index."""
    model = world.model

    def refuse() -> None:
        model.refusals = int(len(model.billed) >= answer)

    model.on_request = refuse
    outcome = await world.work()
    assert outcome is not None
    assert outcome.status is RunStatus.FAILED
    model.on_request = lambda: None
    model.refusals = 0


def begin_replay(world: World, reuse: StepReuse, **agent: Json) -> World:
    """Return the replay of an ended run, which begins with its answered steps and all calls of tools."""
    steps = [
        msgspec.structs.replace(step, reuse=reuse)
        for step in world.steps
        if step.kind is StepKind.TOOL or step.status is StepStatus.COMPLETED
    ]
    settled = [span for span in world.spans if span.status is SpanStatus.COMPLETED and not span.iteration]
    program = compile_agent(**agent) if agent else world.program
    return World(program, world.model, world.outside, settled, steps, services=world.services)


async def diverge(replay: World) -> str:
    """Run a replay whose agent fails at another request, and return its error."""
    outcome = await replay.work()
    assert outcome is not None
    assert outcome.status is RunStatus.FAILED
    (error,) = [span.error for span in replay.spans if span.node_id == "agent"]
    assert error is not None
    assert error.code == "replay-diverged"
    return error.message


def list_steps(world: World, reuse: StepReuse | None) -> Sequence[AgentStep]:
    return [step for step in world.steps if step.reuse is reuse]


async def test_recorded_answers_and_results_are_used_again_without_their_cost() -> None:
    first = World()
    await fail_at(first, 4)
    effects, urls = list(first.outside.effects), list(first.outside.urls)
    replay = begin_replay(first, StepReuse.BINDING)
    assert await replay.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(replay.model.billed) == ANSWERS
    assert replay.outside.urls[len(urls) :] == ["https://a.example/Riga", "https://b.example/north"]
    assert replay.outside.effects[: len(effects)] == effects
    assert len(set(replay.outside.effects)) == 4
    assert replay.output["cost"] == "0.000002", "the replay pays for its own answers alone"
    assert replay.output["toolCalls"] == sum(map(len, TURNS))
    assert not [step for step in replay.steps if step.is_candidate]


async def test_a_replay_that_dies_at_any_commit_repeats_no_effect_and_no_recorded_answer() -> None:
    first = World()
    await fail_at(first, 3)
    begun = begin_replay(first, StepReuse.BINDING)
    worker = begun.worker()
    assert (await worker.work()).status is RunStatus.COMPLETED
    for commit in [sign * number for number in range(1, worker.notebook.commits + 1) for sign in (1, -1)]:
        first = World()
        await fail_at(first, 3)
        replay = begin_replay(first, StepReuse.BINDING)
        assert await replay.work(commit) is None
        assert await replay.work() == RunOutcome(RunStatus.COMPLETED)
        assert len(replay.model.billed) <= ANSWERS + replay.died, commit
        assert len(replay.outside.effects) == 4, commit


def describe_otherwise(send: dict[str, Json]) -> None:
    send["description"] = "Sends a letter."


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": "Another task."},
        {"system": "Be brief."},
        {"temperature": 0.5},
        {"maxTokens": 7},
        {"outputSchema": {"type": "object"}},
        {"enabledTools": ["look"]},
        {"toolMode": "json"},
        {"fallbackModelIds": ["second"]},
        {"edit": describe_otherwise},
    ],
    ids=lambda changed: next(iter(changed)),
)
async def test_another_request_ends_a_replay_with_binding_answers(changed: dict[str, Any]) -> None:
    first = World()
    await fail_at(first, 4)
    replay = begin_replay(first, StepReuse.BINDING)
    given = dict(changed)
    edits = [given.pop("edit")] if "edit" in given else []
    replay.program = compile_agent(*edits, **given)
    asked = len(first.model.requests)
    assert '"refresh": ["model"]' in await diverge(replay)
    assert len(replay.model.requests) == asked
    assert not list_steps(replay, StepReuse.REUSED)


async def test_a_conversation_with_effects_is_left_only_if_they_may_be_repeated() -> None:
    first = World()
    await fail_at(first, 4)
    guarded = begin_replay(first, StepReuse.GUARDED, prompt="Another task.")
    assert "may repeat calls of send" in await diverge(guarded)
    free = begin_replay(first, StepReuse.CANDIDATE, prompt="Another task.")
    assert await free.work() == RunOutcome(RunStatus.COMPLETED)
    assert len(list_steps(free, None)) == ANSWERS + sum(map(len, TURNS))


async def test_a_conversation_without_effects_is_left_at_the_first_other_request() -> None:
    reading = [calls for calls in TURNS if all(call.name == "look" for call in calls)]
    first = World(model=ScriptedModel(reading))
    await fail_at(first, 2)
    replay = begin_replay(first, StepReuse.GUARDED, prompt="Another task.")
    # Both ways meet again in the numbers of their steps, and the new one replaces the recorded one.
    replay.model.turns = [reading[1], reading[0]]
    assert await replay.work() == RunOutcome(RunStatus.COMPLETED)
    assert [call["name"] for call in replay.output["steps"]] == [
        *("first", "look", "first", "look", "look", "first")
    ]
    assert not list_steps(replay, StepReuse.REUSED)


async def test_an_unanswered_question_is_asked_again() -> None:
    first = build_asking_world()
    outcome = await first.work()
    assert outcome is not None
    assert outcome.status is RunStatus.WAITING
    questions = {span.iteration for span in list_questions(first)}
    replay = begin_replay(first, StepReuse.BINDING)
    billed = len(replay.model.billed)
    outcome = await replay.work()
    assert outcome is not None
    assert outcome.status is RunStatus.WAITING
    assert {span.iteration for span in list_questions(replay)} == questions
    assert len(replay.model.billed) == billed
    assert replay.outside.effects == []
    await work_to_the_end(replay)
    assert len(replay.outside.effects) == 4


async def test_a_run_that_ends_at_any_commit_is_replayed_without_a_second_effect_of_an_inner_agent() -> None:
    whole = build_nested_world()
    worker = whole.worker()
    assert (await worker.work()).status is RunStatus.COMPLETED
    inner: set[str] = set()
    answers, effects = len(whole.model.billed), len(whole.outside.effects)
    for commit in [sign * number for number in range(1, worker.notebook.commits + 1) for sign in (1, -1)]:
        first = build_nested_world()
        assert await first.work(commit) is None
        replay = begin_replay(first, StepReuse.BINDING)
        assert await replay.work() == RunOutcome(RunStatus.COMPLETED)
        assert len(replay.model.billed) <= answers + 1, commit
        assert len(replay.outside.effects) == effects, commit
        inner |= {
            step.kind.value for step in list_steps(replay, StepReuse.REUSED) if step.node_id == "helper"
        }
    assert inner == {"model", "tool"}, "steps of an unfinished inner agent are taken over too"


@pytest.mark.parametrize(
    ("reuse", "way"),
    [(StepReuse.BINDING, '"refresh": ["model"]'), (StepReuse.GUARDED, "may repeat calls of send")],
)
async def test_another_request_of_an_inner_agent_ends_the_replay_too(reuse: StepReuse, way: str) -> None:
    first = build_nested_world()
    model = first.model
    assert isinstance(model, TwoScripts)
    # The provider of the inner agent is down from its first write on, so that its call stays without a result.
    model.on_request = lambda: setattr(model, "busy", len(first.outside.effects))
    outcome = await first.work()
    assert outcome is not None
    assert outcome.status is RunStatus.FAILED
    model.on_request, model.busy = lambda: None, 0
    replay = begin_replay(first, reuse)
    replay.program = build_nested_world(inner={"system": "Be brief."}).program
    billed = len(model.billed)
    assert way in await diverge(replay)
    assert len(model.billed) == billed, "the outer agent doesn't answer the difference"
    assert len(replay.outside.effects) == 1
