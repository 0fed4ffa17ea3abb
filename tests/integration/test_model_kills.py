"""Workers that are killed around the calls of models: nothing is paid twice but the answer that was on its way."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.agents.agent import MAX_LOSSES
from engine.node_api import AnswerSource
from journal.store import ExecutionKey
from journal.waits import approvals, node_answers
from journal.waits.approvals import ApprovalDecision
from models.workflow import WorkflowGraph
from nodes.custom_types import PINNED
from tests.custom_types import custom_type
from tests.fakes.model_server import ModelFault, ModelServer, ScriptedAnswer, serve_models
from tests.forks import ForkedProcess
from tests.integration import dies_at_commit
from tests.integration.run_database import MigratedDatabase, OwnedWorkflow, RunDatabase, open_run_database

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 60.0
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CONFIG = {"model": "first", "prompt": "Which city?", "outputSchema": SCHEMA}
DEFINITION = json.dumps(
    {
        "nodes": [
            {"id": "start", "type": "manual"},
            {"id": "ask", "type": "llm", "config": CONFIG},
            {"id": "again", "type": "llm", "config": {**CONFIG, "prompt": "{{ nodes.ask.response }}"}},
        ],
        "connections": [
            {"id": "1", "source": "start", "target": "ask"},
            {"id": "2", "source": "ask", "target": "again"},
        ],
        "settings": {},
    }
)
WRONG, RIGHT = ScriptedAnswer('{"city": 1}'), ScriptedAnswer('{"city": "Oslo"}')
KILLS = [kill for commit in range(1, 7) for kill in (-commit, commit)]
"""Every commit of a run with two nodes of two calls: the process dies before it, and after it."""
FEW_KILLS = (-2, 2, -5, 5)
"""Kills at the commits of two answers, one of each node."""


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def run_database(migrated_database: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    async with open_run_database(migrated_database) as run_database:
        yield run_database


@pytest.fixture
async def owned_workflow(run_database: RunDatabase) -> OwnedWorkflow:
    return await run_database.workflow()


class SpoiledOnce:
    """Script that answers each question wrongly first, and rightly when it is asked to correct that."""

    def __init__(self, served: ModelServer) -> None:
        self._served = served
        served.on_request = self.choose

    def choose(self) -> None:
        is_correction = len(self._served.requests[-1]["messages"]) > 1
        self._served.script = [RIGHT if is_correction else WRONG]


def work(database: MigratedDatabase, folder: Path, served: ModelServer, last_commit: int) -> ForkedProcess:
    return ForkedProcess(dies_at_commit.execute_runs, database.url, folder, served.url, last_commit)


async def run_killed(
    run_database: RunDatabase,
    migrated_database: MigratedDatabase,
    key: ExecutionKey,
    served: ModelServer,
    folder: Path,
    kills: list[int],
) -> int:
    """Work on a run with a process for each kill, then with one that lives to the end; return the number of kills."""
    died = 0
    for last_commit in kills:
        process = work(migrated_database, folder, served, last_commit)
        while process.poll() is None and not await has_ended(run_database, key):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)
        if process.poll() is None:
            process.kill()
            process.wait()
            return died
        assert process.poll() == -signal.SIGKILL
        died += 1
        await run_database.query("UPDATE execution SET lease_until = 1 WHERE status = 'running'")
        await run_database.store.sweep(10)
    process = work(migrated_database, folder, served, 0)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await has_ended(run_database, key):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)
    process.kill()
    process.wait()
    return died


async def has_ended(run_database: RunDatabase, key: ExecutionKey) -> bool:
    row = await run_database.row(key.execution_id)
    return row["status"] not in {"pending", "running", "waiting"}


async def read_calls(run_database: RunDatabase, key: ExecutionKey) -> list[dict[str, Any]]:
    rows = await run_database.query(
        "SELECT model_calls FROM span WHERE execution_id = :id AND model_calls IS NOT NULL",
        id=key.execution_id,
    )
    return [call for row in rows for call in json.loads(row["model_calls"])]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("migrated_database", "kill"),
    [*(("on_sqlite", kill) for kill in KILLS), *(("on_postgres", kill) for kill in FEW_KILLS)],
    indirect=["migrated_database"],
)
async def test_a_kill_at_any_commit_costs_at_most_the_answer_on_its_way(
    run_database: RunDatabase,
    migrated_database: MigratedDatabase,
    owned_workflow: OwnedWorkflow,
    tmp_path: Path,
    kill: int,
) -> None:
    key = await run_database.accept(owned_workflow, definition=DEFINITION)
    async with serve_models(WRONG) as served:
        SpoiledOnce(served)
        died = await run_killed(run_database, migrated_database, key, served, tmp_path, [kill])
        row = await run_database.row(key.execution_id)
        assert row["status"] == "completed", row["error"]
        calls = await read_calls(run_database, key)
        assert [call["modelId"] for call in calls] == ["first"] * 4
        assert len(calls) <= len(served.billed) <= len(calls) + died
        assert len(set(served.billed)) >= len(calls), "each call has a key of its own"


@pytest.mark.timeout(300)
async def test_a_run_that_loses_two_workers_pays_for_two_answers_at_most(
    run_database: RunDatabase,
    migrated_database: MigratedDatabase,
    owned_workflow: OwnedWorkflow,
    tmp_path: Path,
) -> None:
    key = await run_database.accept(owned_workflow, definition=DEFINITION)
    async with serve_models(WRONG) as served:
        SpoiledOnce(served)
        died = await run_killed(run_database, migrated_database, key, served, tmp_path, [-2, -2])
        assert died == 2
        row = await run_database.row(key.execution_id)
        assert row["status"] == "completed", row["error"]
        calls = await read_calls(run_database, key)
        assert len(served.billed) <= len(calls) + died


# ── agents ──────────────────────────────────────────────────────────────────────────────────────────────────

TURNS = [
    (("look", "Oslo"), ("look", "Rome")),
    (("send", "Oslo"), ("look", "Bonn")),
    (("send", "Rome"), ("send", "Bonn")),
    (("look", "Kyiv"), ("send", "Kyiv")),
    (("look", "Riga"), ("send", "Riga")),
    (("look", "Bern"), ("look", "Graz"), ("look", "Genf")),
]
EFFECTS = 5
STEPS = len(TURNS) + 1 + sum(map(len, TURNS))
KILLS_IN_TURN = [3, -3, 4, -4, 5]
"""Kills of the processes one after another: each is killed behind, or before, its commit of that number. The first is
the announcement of the agent, and the next ones are those of its steps. Every commit is covered in memory.
"""
MOST_KILLS = 30
"""Random kills of one agent at most; further ones have another agent."""
RANDOM_KILLS = int(os.environ.get("PILOTFLAME_TEST_AGENT_KILLS", "3"))


def build_agent(url: str, approval: str = "never") -> str:
    """Return the definition of an agent of twenty steps, with tools at a URL."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    look = {"url": f"{url}/facts?city={{{{ args.city }}}}"}
    send = {"url": f"{url}/effects", "method": "POST", "body": {"city": "{{ args.city }}"}}
    tools = [
        {
            "id": name,
            "type": "tool",
            "config": {
                "name": name,
                "description": name,
                "parameters": parameters,
                "target": {"node": {"type": "http-request", "config": config}},
            },
        }
        for name, config in (("look", look), ("send", send))
    ]
    agent = {"model": "first", "prompt": "Report.", "effects": ["read", "write"], "approval": approval}
    edges = [
        {"id": name, "source": name, "target": "agent", "targetPort": "tools"} for name in ("look", "send")
    ]
    return json.dumps(
        {
            "nodes": [
                {"id": "start", "type": "manual"},
                {"id": "agent", "type": "agent", "config": agent},
                *tools,
            ],
            "connections": [{"id": "1", "source": "start", "target": "agent"}, *edges],
            "settings": {},
        }
    )


class FollowedTurns:
    """Script that answers by the number of answers so far, so that a repeated request is answered alike."""

    def __init__(self, served: ModelServer, turns: Sequence[Sequence[tuple[str, str]]] = TURNS) -> None:
        self._served, self._turns = served, turns
        served.on_request = self.choose

    def choose(self) -> None:
        messages = self._served.requests[-1]["messages"]
        done = sum(message["role"] == "assistant" for message in messages)
        calls = self._turns[done] if done < len(self._turns) else ()
        wanted = [{"name": name, "arguments": json.dumps({"city": city})} for name, city in calls]
        self._served.script = [ScriptedAnswer("" if calls else "Reported.", tool_calls=wanted)]


@pytest.mark.timeout(600 + 10 * RANDOM_KILLS)
async def test_agents_of_twenty_steps_survive_their_workers(
    run_database: RunDatabase, migrated_database: MigratedDatabase, tmp_path: Path
) -> None:
    chance = random.Random()
    seed = chance.randrange(1_000_000)
    chance.seed(seed)
    kills, died = list(KILLS_IN_TURN), 0
    while died < RANDOM_KILLS:
        kills += [chance.choice([3, 4, -4, 5, -5, 6]) for _ in range(min(RANDOM_KILLS - died, MOST_KILLS))]
        died += await kill_agent(run_database, migrated_database, tmp_path, kills, seed)
        kills = []


async def kill_agent(
    run_database: RunDatabase, database: MigratedDatabase, folder: Path, kills: list[int], seed: int
) -> int:
    """Run an agent with workers that are killed; return the number of kills.

    Three lost answers in a row fail it, and so do several workers that were lost without any progress. Otherwise
    it completes, and in all cases no effect is doubled.
    """
    async with serve_models() as served:
        FollowedTurns(served)
        key = await run_database.accept(await run_database.workflow(), definition=build_agent(served.url))
        died = await run_killed(run_database, database, key, served, folder, kills)
        row = await run_database.row(key.execution_id)
        steps = await run_database.query(
            "SELECT kind, status, losses, key FROM execution_step WHERE execution_id = :id ORDER BY number",
            id=key.execution_id,
        )
        answers = [step for step in steps if step["kind"] == "model"]
        assert len(set(served.billed)) == len(served.billed), "each attempt has a key of its own"
        assert len(served.billed) <= len(answers) + died, seed
        assert sum(step["losses"] for step in answers) <= died
        if row["status"] == "failed":
            if "lost-attempt" in row["error"]:
                assert answers[-1]["losses"] == MAX_LOSSES - 1, (answers[-1], seed)
            else:
                assert '"crashed"' in row["error"], (row["error"], seed)
            assert len(served.effects) <= EFFECTS
            return died
        assert row["status"] == "completed", (row["error"], seed)
        assert len(steps) == STEPS
        assert {step["status"] for step in steps} == {"completed"}
        assert len(answers) == len(TURNS) + 1
        assert len(answers) <= len(served.billed), seed
        assert len(served.effects) == EFFECTS, "the keys of tools are those of their steps"
        assert len(await read_calls(run_database, key)) == len(answers)
        return died


READS = [(("look", "Oslo"), ("look", "Rome")), (("look", "Bonn"),)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", [[4, -5], [-3, 5]])
async def test_an_agent_without_recorded_contents_begins_again_and_pays_for_its_recorded_calls(
    run_database: RunDatabase, migrated_database: MigratedDatabase, tmp_path: Path, kills: list[int]
) -> None:
    definition = json.loads(build_agent("URL"))
    definition["nodes"][1]["config"] |= {"recordContent": False, "effects": ["read"]}
    definition["nodes"] = [node for node in definition["nodes"] if node["id"] != "send"]
    definition["connections"] = [edge for edge in definition["connections"] if edge["source"] != "send"]
    async with serve_models() as served:
        FollowedTurns(served, READS)
        text = json.dumps(definition).replace("URL", served.url)
        key = await run_database.accept(await run_database.workflow(), definition=text)
        died = await run_killed(run_database, migrated_database, key, served, tmp_path, kills)
        row = await run_database.row(key.execution_id)
        assert row["status"] == "completed", row["error"]
        steps = await run_database.query(
            "SELECT kind, status, key, arguments, result, conversation FROM execution_step"
            " WHERE execution_id = :id ORDER BY number",
            id=key.execution_id,
        )
        assert {(step["arguments"], step["result"]) for step in steps} == {(None, None)}
        assert {step["status"] for step in steps} <= {"completed", "failed"}, "no step stays open"
        conversations = [step["conversation"] for step in steps]
        assert conversations == sorted(conversations)
        assert 1 <= conversations[-1] <= died
        last = [step["kind"] for step in steps if step["conversation"] == conversations[-1]]
        assert last == ["model", "tool", "tool", "model", "tool", "model"], "it is a whole conversation"
        answers = [step for step in steps if (step["kind"], step["status"]) == ("model", "completed")]
        assert len(answers) <= len(served.billed) <= len(answers) + died
        assert len(set(served.billed)) == len(served.billed), "each request has a key of its own"
        assert len([call for call in await read_calls(run_database, key) if "usage" in call]) == len(answers)
        keys = [step["key"] for step in steps if step["kind"] == "tool"]
        assert len(set(keys)) == len(keys)


class StallingTurns(FollowedTurns):
    """Script that stalls in the middle of each second answer, in which its reader is killed."""

    stalled = 0

    def choose(self) -> None:
        super().choose()
        if len(self._served.requests) % 2 == 0:
            self.stalled += 1
            self._served.script = [ScriptedAnswer(fault=ModelFault.STALL)]


@pytest.mark.timeout(300)
async def test_the_budget_of_a_run_is_never_passed_through_kills(
    run_database: RunDatabase, migrated_database: MigratedDatabase, tmp_path: Path
) -> None:
    """Answers that are lost with their workers keep their reservations, until no further call fits."""
    budget = 4_500
    async with serve_models() as served:
        script = StallingTurns(served)
        definition = json.loads(build_agent(served.url)) | {"settings": {"aiBudget": {"maxTokens": budget}}}
        key = await run_database.accept(await run_database.workflow(), definition=json.dumps(definition))
        died = 0
        async with asyncio.timeout(2 * PATIENCE_SECONDS):
            while not await has_ended(run_database, key):
                process = work(migrated_database, tmp_path, served, 0)
                while script.stalled == died and not await has_ended(run_database, key):  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.05)
                died = script.stalled
                process.kill()
                process.wait()
                await run_database.query("UPDATE execution SET lease_until = 1 WHERE status = 'running'")
                await run_database.store.sweep(10)
        error = str((await run_database.row(key.execution_id))["error"])
    charges = await run_database.query(
        "SELECT tokens, is_settled FROM model_charge WHERE execution_id = :id", id=key.execution_id
    )
    lost = [charge["tokens"] for charge in charges if not charge["is_settled"]]
    assert "model-budget-exceeded" in error
    assert len(charges) == len(served.billed), "no call without a reservation, and none for a refused one"
    assert len(lost) == died > 0
    assert sum(charge["tokens"] for charge in charges) <= budget


async def decide(run_database: RunDatabase, key: ExecutionKey, choice: str, **answer: Any) -> str:  # noqa: ANN401 - fields
    """Decide about the one call that waits; return the iteration of the question."""
    async with run_database.database.read() as connection:
        (asked,) = await node_answers.list_input_waits(connection, key)
    fields = {"data": None, "answered_at": datetime.now(UTC), **answer}
    decision = ApprovalDecision("user_1", "user_1", choice, **fields)

    async def work(connection: AsyncConnection) -> None:
        given = await approvals.record_decision(connection, key, asked, decision)
        assert given.answer.is_woken

    await run_database.database.transaction(work)
    return asked.iteration


async def lose_worker(
    run_database: RunDatabase,
    database: MigratedDatabase,
    key: ExecutionKey,
    served: ModelServer,
    folder: Path,
    kill: int,
) -> None:
    """Kill a worker at a commit, and let the next one work until the run waits for a person."""
    process = work(database, folder, served, kill)
    while process.poll() is None:  # noqa: ASYNC110 - of another process, which this loop serves
        await asyncio.sleep(0.05)
    assert process.poll() == -signal.SIGKILL
    await run_database.query("UPDATE execution SET lease_until = 1 WHERE status = 'running'")
    await run_database.store.sweep(10)
    process = work(database, folder, served, 0)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await run_database.row(key.execution_id))["status"] != "waiting":  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)
    process.kill()
    process.wait()


@pytest.mark.timeout(300)
async def test_a_person_decides_about_a_call_after_its_worker_was_killed(
    run_database: RunDatabase,
    migrated_database: MigratedDatabase,
    owned_workflow: OwnedWorkflow,
    tmp_path: Path,
) -> None:
    async with serve_models() as served:
        FollowedTurns(served, [(("send", "Oslo"),)])
        definition = json.loads(build_agent(served.url))
        definition["nodes"][-1]["config"]["onUnknown"] = "ask"
        key = await run_database.accept(owned_workflow, definition=json.dumps(definition))
        # Before the commit with the result of the call.
        await lose_worker(run_database, migrated_database, key, served, tmp_path, -4)
        assert len(served.effects) == 1
        await decide(run_database, key, "done", data={"result": "Sent."})
        await run_killed(run_database, migrated_database, key, served, tmp_path, [2])
        row = await run_database.row(key.execution_id)
        assert row["status"] == "completed", row["error"]
        assert (len(served.effects), served.repeated) == (1, 0)
        told = served.requests[-1]["messages"][-1]
        assert (told["role"], told["content"]) == ("tool", "Sent.")


@pytest.mark.timeout(300)
async def test_an_edited_call_is_done_once_through_kills_before_and_after_the_vote(
    run_database: RunDatabase,
    migrated_database: MigratedDatabase,
    owned_workflow: OwnedWorkflow,
    tmp_path: Path,
) -> None:
    async with serve_models() as served:
        FollowedTurns(served, [(("look", "Oslo"), ("send", "Oslo"))])
        key = await run_database.accept(owned_workflow, definition=build_agent(served.url, "writes"))
        # Behind the commit of the answer, which asks the question.
        await lose_worker(run_database, migrated_database, key, served, tmp_path, 3)
        assert not served.effects
        iteration = await decide(run_database, key, "approve", arguments={"city": "Rome"})
        # Behind the commit that applies the vote, and before the one with the result of the call.
        died = await run_killed(run_database, migrated_database, key, served, tmp_path, [2, -2])
        assert died == 2
        row = await run_database.row(key.execution_id)
        assert row["status"] == "completed", row["error"]
        assert len(served.effects) == 1
        spans = await run_database.query(
            "SELECT iteration, status, port FROM span WHERE execution_id = :id AND node_id = 'send'",
            id=key.execution_id,
        )
        assert spans == [{"iteration": iteration, "status": "completed", "port": "approve"}]
        steps = await run_database.query(
            "SELECT arguments FROM execution_step WHERE execution_id = :id AND name = 'send'",
            id=key.execution_id,
        )
        assert [json.loads(step["arguments"]) for step in steps] == [{"city": "Rome"}]


# ── tools that others do ────────────────────────────────────────────────────────────────────────────────────

PAIRS_OF_KILLS = [[3, -4], [4, 5]]
"""Kills of two processes, as many as an agent survives in any case; every commit is covered in memory."""
ASKED_TWICE = [(("other", "Oslo"),), (("other", "Rome"),)]


def build_caller(target: dict[str, Any], **definition: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return the definition of an agent with one tool, which another process does."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"name": "other", "description": "other", "parameters": parameters, "target": target}
    agent = {"model": "first", "prompt": "Report.", "effects": ["read", "write"], "approval": "never"}
    return json.dumps(
        {
            "nodes": [
                {"id": "start", "type": "manual"},
                {"id": "agent", "type": "agent", "config": agent},
                {"id": "other", "type": "tool", "config": tool},
            ],
            "connections": [
                {"id": "1", "source": "start", "target": "agent"},
                {"id": "2", "source": "other", "target": "agent", "targetPort": "tools"},
            ],
            "settings": {},
            **definition,
        }
    )


async def check_calls(run_database: RunDatabase, key: ExecutionKey, served: ModelServer, died: int) -> None:
    """Check that the agent has completed with both calls done, and was billed for few lost answers."""
    row = await run_database.row(key.execution_id)
    assert row["status"] == "completed", row["error"]
    steps = await run_database.query(
        "SELECT kind, status FROM execution_step WHERE execution_id = :id AND node_id = 'agent'",
        id=key.execution_id,
    )
    assert sorted(step["kind"] for step in steps) == ["model"] * 3 + ["tool"] * 2
    assert {step["status"] for step in steps} == {"completed"}
    assert 3 <= len(served.billed) <= 3 + died


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", PAIRS_OF_KILLS)
async def test_a_workflow_that_an_agent_calls_runs_once_through_kills(
    run_database: RunDatabase, migrated_database: MigratedDatabase, tmp_path: Path, kills: list[int]
) -> None:
    async with serve_models() as served:
        FollowedTurns(served, ASKED_TWICE)
        parent = await run_database.workflow()
        child = await run_database.workflow(parent.organization)
        send = {"url": f"{served.url}/effects", "method": "POST", "body": {"city": "{{ data.body.city }}"}}
        graph = WorkflowGraph(
            workflow_id=child.workflow_id,
            shard=child.organization.shard,
            nodes=[
                {"id": "start", "type": "manual"},
                {"id": "send", "type": "http-request", "config": send},
            ],
            connections=[{"id": "1", "source": "start", "target": "send"}],
        )
        await run_database.database.transaction(
            lambda connection: connection.execute(insert(WorkflowGraph).values(graph.model_dump()))
        )
        owned = OwnedWorkflow(parent.organization, parent.workflow_id, child.user_id)
        key = await run_database.accept(owned, definition=build_caller({"workflowId": child.workflow_id}))
        died = await run_killed(run_database, migrated_database, key, served, tmp_path, kills)
        await check_calls(run_database, key, served, died)
        assert len(served.effects) == 2
        children = await run_database.query(
            "SELECT status FROM execution WHERE parent_id = :id", id=key.execution_id
        )
        assert children == [{"status": "completed"}] * 2


async def answer_tasks(run_database: RunDatabase, key: ExecutionKey) -> None:
    """Answer each task of a run, as workers of its type do, until cancelled."""
    answered: set[str] = set()
    while True:
        tasks = await run_database.query(
            "SELECT id, node_id, iteration FROM task WHERE execution_id = :id", id=key.execution_id
        )
        for task in tasks:
            if task["id"] not in answered:
                await answer_task(run_database, key, task)
                answered.add(task["id"])
        await asyncio.sleep(0.05)


async def answer_task(run_database: RunDatabase, key: ExecutionKey, task: dict[str, Any]) -> None:
    payload = node_answers.encode_output_answer({"task": task["id"]})
    place = task["node_id"], task["iteration"]
    await run_database.database.transaction(
        lambda connection: node_answers.store_answer(
            connection, key, *place, payload, kind=AnswerSource.TASK
        ),
        locks=key.execution_id,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", PAIRS_OF_KILLS)
async def test_a_task_that_an_agent_calls_is_created_once_through_kills(
    run_database: RunDatabase, migrated_database: MigratedDatabase, tmp_path: Path, kills: list[int]
) -> None:
    document = custom_type(type="acme/other", category="custom", effect={"default": "write"})
    target = {"node": {"type": "acme/other", "config": {"image": "{{ args.city }}"}}}
    async with serve_models() as served:
        FollowedTurns(served, ASKED_TWICE)
        definition = build_caller(target, **{PINNED: {"acme/other": {"1.2.0": document}}})
        key = await run_database.accept(await run_database.workflow(), definition=definition)
        answering = asyncio.create_task(answer_tasks(run_database, key))
        died = await run_killed(run_database, migrated_database, key, served, tmp_path, kills)
        answering.cancel()
        await asyncio.wait([answering])
        await check_calls(run_database, key, served, died)
        tasks = await run_database.query("SELECT key FROM task WHERE execution_id = :id", id=key.execution_id)
        assert sorted(task["key"] for task in tasks) == [f"{key.execution_id}:agent:0:{n}" for n in (1, 3)]


class NestedTurns:
    """Script of an agent that asks another one twice, which sends something once for each call."""

    def __init__(self, served: ModelServer) -> None:
        self._served = served
        served.on_request = self.choose

    def choose(self) -> None:
        messages = self._served.requests[-1]["messages"]
        is_inner = messages[0]["content"] == "Help."
        turns = [(("send", "Oslo"),)] if is_inner else ASKED_TWICE
        done = sum(message["role"] == "assistant" for message in messages)
        calls = turns[done] if done < len(turns) else ()
        wanted = [{"name": name, "arguments": json.dumps({"city": city})} for name, city in calls]
        self._served.script = [ScriptedAnswer("" if calls else "Done.", tool_calls=wanted)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", PAIRS_OF_KILLS)
async def test_an_agent_that_another_one_calls_survives_kills(
    run_database: RunDatabase, migrated_database: MigratedDatabase, tmp_path: Path, kills: list[int]
) -> None:
    async with serve_models() as served:
        NestedTurns(served)
        inner = {"model": "first", "prompt": "Help.", "effects": ["read", "write"], "approval": "never"}
        definition = json.loads(build_caller({"node": {"type": "agent", "config": inner}}))
        tools = json.loads(build_agent(served.url))
        definition["nodes"] += [node for node in tools["nodes"] if node["id"] == "send"]
        wire = {"id": "3", "source": "send", "target": "other", "targetPort": "tools"}
        definition["connections"].append(wire)
        key = await run_database.accept(await run_database.workflow(), definition=json.dumps(definition))
        died = await run_killed(run_database, migrated_database, key, served, tmp_path, kills)
        row = await run_database.row(key.execution_id)
        assert row["status"] == "completed", row["error"]
        steps = await run_database.query(
            "SELECT node_id, status, count(*) AS number FROM execution_step WHERE execution_id = :id"
            " GROUP BY node_id, status ORDER BY node_id",
            id=key.execution_id,
        )
        assert steps == [
            {"node_id": "agent", "status": "completed", "number": 5},
            {"node_id": "other", "status": "completed", "number": 6},
        ]
        calls = await read_calls(run_database, key)
        assert len(calls) == 7, "the answers of the inner agent are part of the cost of the outer one"
        assert 7 <= len(served.billed) <= 7 + died
        assert len(served.effects) == 2
