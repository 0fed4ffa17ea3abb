"""Runs that wait for people, for other runs and for their turn, with a gateway and a worker around them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select
from sqlmodel import col

from engine.run_records import NodeSpan, SpanStatus
from engine.services import RunCaller
from execution.child_runs import ChildRunStarter
from journal.store import ClaimedRun, ClaimQuery, RunWrite
from messages.broker import Broker
from messages.local_broker import LocalBroker
from models.execution import Execution
from models.execution_status import TERMINAL_STATUSES
from nodes import catalog
from tests.http_receiver import run_receiver
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient
from workers.main import run_worker
from workers.settings import WorkerSettings

pytestmark = pytest.mark.timeout(30)

ON_ONE = pytest.mark.parametrize("harness", ["sqlite"], indirect=True)
"""For tests that don't depend on the kind of database, or have an equivalent closer to it on both."""
EXECUTIONS = "/api/v1/executions"
APPROVAL = {"title": "Go on?", "choices": [{"port": "yes"}, {"port": "no"}], "schema": {"type": "object"}}
ASKS: dict[str, Any] = {
    "nodes": [
        {"id": "start", "nodeId": "manual"},
        {"id": "ask", "nodeId": "human-input", "config": APPROVAL},
        {"id": "go", "nodeId": "set", "config": {"values": {"went": "{{ data.data.how }}"}}},
        {"id": "halt", "nodeId": "stop-with-error", "config": {"message": "Refused"}},
    ],
    "connections": [
        {"source": "start", "target": "ask"},
        {"source": "ask", "sourcePort": "yes", "target": "go"},
        {"source": "ask", "sourcePort": "no", "target": "halt"},
    ],
}


def sub_workflow_graph(workflow_id: str, **config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return a graph that runs a workflow and passes on its result."""
    return {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "sub", "nodeId": "sub-workflow", "config": {"workflowId": workflow_id, **config}},
        ],
        "connections": [{"source": "start", "target": "sub"}],
    }


@asynccontextmanager
async def serve_worker(
    harness: GatewayHarness,
    broker: Broker | None = None,
    /,
    **settings: Any,  # noqa: ANN401 - a field of WorkerSettings
) -> AsyncIterator[None]:
    """Run a worker that executes the runs found by its sweeps; with the gateway's broker, as in one process.

    A sweep takes several milliseconds: twenty a second would cost more than the runs.
    """
    gateway = harness.gateway
    shared = gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"})
    of_worker = WorkerSettings(**shared, **{"lease_seconds": 5, "sweep_seconds": 0.2, **settings})
    own = LocalBroker(channel=uuid4().hex)
    try:
        async with run_worker(of_worker, gateway.store, broker or own, gateway.database):
            yield
    finally:
        await own.close()


async def get_json(person: UserClient, path: str) -> dict[str, Any]:
    response = await person.api.get(EXECUTIONS + path)
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


async def execute_workflow(person: UserClient, workflow_id: str, **inputs: Any) -> str:  # noqa: ANN401 - any JSON value
    response = await person.api.post(
        f"/api/v1/workflows/{workflow_id}/execute", json={"triggerInputs": inputs}
    )
    assert response.status_code == 201, response.text
    execution_id: str = response.json()["executionId"]
    return execution_id


async def wait_for_question(person: UserClient, execution_id: str) -> dict[str, Any]:
    """Wait until an execution asks something."""
    while not (shown := await get_json(person, f"/{execution_id}/pending-inputs"))["inputs"]:  # noqa: ASYNC110 - rows send no events
        await asyncio.sleep(0.1)
    found: dict[str, Any] = shown["inputs"][0]
    return found


async def say(person: UserClient, execution_id: str, choice: str) -> None:
    body = {"nodeId": "ask", "choice": choice, "data": {"how": "well"}}
    response = await person.api.post(f"{EXECUTIONS}/{execution_id}/input", json=body)
    assert response.status_code == 200, response.text


async def wait_until_ended(person: UserClient, execution_id: str) -> dict[str, Any]:
    while (shown := await get_json(person, f"/{execution_id}/progress?wait=0"))[  # noqa: ASYNC110 - as above
        "status"
    ] not in TERMINAL_STATUSES:
        await asyncio.sleep(0.1)
    return shown


async def wait_for_children(person: UserClient, execution_id: str) -> Sequence[dict[str, Any]]:
    """Wait until an execution has started others."""
    while not (found := (await get_json(person, f"?parent_id={execution_id}"))["executions"]):  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.1)
    children: Sequence[dict[str, Any]] = found
    return children


async def claim_for_dead_worker(harness: GatewayHarness, execution_id: str) -> ClaimedRun:
    """Claim a run for a worker that will never be heard of again."""
    store = harness.gateway.store
    for _ in range(100):
        for one in await store.claim(ClaimQuery("dead", 0.01, 100)):
            if one.execution_id == execution_id:
                return one
        await asyncio.sleep(0.05)
    raise AssertionError(f"{execution_id} can't be claimed")


# ── people ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_database
async def test_a_run_asks_and_goes_on_with_the_answer(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**ASKS)
    async with serve_worker(harness):
        agreed, refused = [await execute_workflow(people.owner, workflow_id) for _ in range(2)]
        shown = await wait_for_question(people.owner, agreed)
        assert (shown["nodeId"], shown["title"], shown["expiresAt"]) == ("ask", "Go on?", None)
        assert shown["choices"] == [{"port": "yes", "label": "yes"}, {"port": "no", "label": "no"}]
        asked = await get_json(people.owner, f"/{agreed}/why")
        assert (asked["primary"], asked["blockers"][0]["details"]["requestId"]) == ("awaiting-input", "ask")
        assert asked["history"][0]["to"] is None
        behind = await get_json(people.owner, f"/{agreed}/why?node=go")
        assert (behind["primary"], behind["blockers"][0]["details"]) == ("parents", {"ids": ["ask"]})
        assert (await people.owner.api.get(f"/api/v1/executions/{agreed}/why?node=none")).status_code == 404
        await say(people.admin, agreed, "yes")
        await wait_for_question(people.owner, refused)
        await say(people.owner, refused, "no")
        outputs = (await wait_until_ended(people.owner, agreed))["outputs"]
        assert outputs["ask"]["by"] == people.admin.user.id
        assert outputs["go"]["went"] == "well"
        failed = await wait_until_ended(people.owner, refused)
        ended = await get_json(people.owner, f"/{agreed}/why")
    assert (failed["status"], failed["error"]["message"]) == ("failed", "Refused")
    assert [(row["code"], row["nodeId"]) for row in ended["history"]] == [("awaiting-input", "ask")]
    assert ended["timing"]["waitingFor"]["awaiting-input"] > 0
    assert [step["nodeId"] for step in ended["criticalPath"]] == ["start", "ask", "go"]


async def test_an_answer_survives_the_worker_that_had_it_in_hand(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**ASKS)
    execution_id = await execute_workflow(people.owner, workflow_id)
    async with serve_worker(harness):
        await wait_for_question(people.owner, execution_id)
    await say(people.owner, execution_id, "yes")
    assert (await claim_for_dead_worker(harness, execution_id)).wait_answer_count == 1
    async with serve_worker(harness):
        shown = await wait_until_ended(people.owner, execution_id)
    assert (shown["status"], shown["outputs"]["go"]["went"]) == ("completed", "well")


@ON_ONE
async def test_a_caller_without_a_timely_answer_continues(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    config = {"title": "Quick?", "expiresInSeconds": 1, "onExpiry": "continue"}
    nodes = [{"id": "start", "nodeId": "manual"}, {"id": "ask", "nodeId": "human-input", "config": config}]
    workflow_id = await people.owner.create(nodes=nodes, connections=[{"source": "start", "target": "ask"}])
    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, workflow_id)
        shown = await wait_until_ended(people.owner, execution_id)
    assert shown["outputs"]["ask"] == {"data": None, "choice": None, "by": None, "at": None}


# ── turns ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_loop_that_failed_is_resumed_from_the_turn_that_did(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with run_receiver() as receiver, serve_worker(harness, outbound_allowed_networks="127.0.0.1/32"):
        receiver.answers = ["204 No Content", "500 Internal Server Error"]
        post = {"url": receiver.url(), "method": "POST", "body": "{{ item }}"}
        workflow_id = await people.owner.create(
            nodes=[
                {"id": "start", "nodeId": "manual"},
                {"id": "each", "nodeId": "loop", "config": {"items": [1, 2, 3]}},
                {"id": "post", "nodeId": "http-request", "config": post},
            ],
            connections=[
                {"source": "start", "target": "each"},
                {"source": "each", "sourcePort": "continue", "target": "post"},
            ],
        )
        failed_id = await execute_workflow(people.owner, workflow_id)
        assert (await wait_until_ended(people.owner, failed_id))["status"] == "failed"
        response = await people.owner.api.post(f"{EXECUTIONS}/{failed_id}/resume")
        resumed = await wait_until_ended(people.owner, response.json()["executionId"])
    assert (resumed["status"], resumed["outputs"]["each"]["count"]) == ("completed", 3)
    assert [json.loads(one.body) for one in receiver.received] == [1, 2, 2, 3]


# ── other runs ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_continues_with_the_result_of_its_child(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    inner = await people.owner.create(**ASKS)
    outer = await people.owner.create(**sub_workflow_graph(inner, inputs={"n": "{{ data.body.n }}"}))
    async with serve_worker(harness):
        agreed, refused = [await execute_workflow(people.owner, outer, n=7) for _ in range(2)]
        (child,) = await wait_for_children(people.owner, agreed)
        assert (child["workflowId"], child["triggerType"], child["rootId"]) == (inner, "sub-workflow", agreed)
        assert (await get_json(people.owner, f"/{child['id']}"))["trigger"]["data"] == {"body": {"n": 7}}
        await wait_for_question(people.owner, child["id"])
        await say(people.owner, child["id"], "yes")
        assert (await wait_until_ended(people.owner, agreed))["outputs"]["sub"]["went"] == "well"

        (child,) = await wait_for_children(people.owner, refused)
        await wait_for_question(people.owner, child["id"])
        await say(people.owner, child["id"], "no")
        failed = await wait_until_ended(people.owner, refused)
    assert (failed["status"], failed["error"]["nodeId"]) == ("failed", "sub")
    assert "Refused" in failed["error"]["message"]


async def test_the_error_inside_a_sub_workflow_is_the_cause_of_the_runs_around_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    url = "http://127.0.0.1:9/orders?token=s3cret"
    inner = await people.owner.create(
        nodes=[
            {"id": "start", "nodeId": "manual"},
            {"id": "fetch", "nodeId": "http-request", "config": {"url": url}},
        ],
        connections=[{"source": "start", "target": "fetch"}],
    )
    middle = await people.owner.create(**sub_workflow_graph(inner))
    async with serve_worker(harness):
        outermost = await execute_workflow(
            people.owner, await people.owner.create(**sub_workflow_graph(middle))
        )
        error = (await wait_until_ended(people.owner, outermost))["error"]
    (between,) = await wait_for_children(people.owner, outermost)
    (innermost,) = await wait_for_children(people.owner, between["id"])
    cause = innermost["error"]["cause"]
    assert cause == {
        "code": "address-not-allowed",
        "message": innermost["error"]["message"],
        "nodeId": "fetch",
        "method": "GET",
        "url": "http://127.0.0.1:9/orders?token=…",
    }
    assert (error["code"], error["nodeId"]) == ("node-error", "sub")
    assert error["cause"] == between["error"]["cause"] == {**cause, "executionId": innermost["id"]}
    assert (await get_json(people.owner, f"/{outermost}"))["error"] == error


async def test_a_run_is_not_doubled_when_the_worker_dies_between_its_start_and_the_commit(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    inner = await people.owner.create(nodes=ASKS["nodes"][:1], connections=[])
    outer = await people.owner.create(**sub_workflow_graph(inner))
    execution_id = await execute_workflow(people.owner, outer)
    gateway = harness.gateway
    run = await claim_for_dead_worker(harness, execution_id)
    starting = NodeSpan(
        "sub",
        "Sub",
        "sub-workflow",
        SpanStatus.RUNNING,
        sequence=1,
        started_at=datetime.now(UTC),
        input=b"{}",
        resolved_config=json.dumps({"workflowId": inner, "wait": True}).encode(),
    )
    assert await gateway.store.record([RunWrite(execution_id, run.shard, run.token, spans=[starting])])
    starter = ChildRunStarter(
        gateway.database, gateway.store, gateway.broker, catalog.load_catalog(), WorkerSettings()
    )
    caller = RunCaller(run.organization_id, run.user_id, run.workflow_id, execution_id, run.key_id)
    await starter.start(caller, inner, {}, node_id="sub", iteration="", awaited=True)
    async with serve_worker(harness):
        shown = await wait_until_ended(people.owner, execution_id)
        assert (shown["status"], len(await wait_for_children(people.owner, execution_id))) == ("completed", 1)


async def test_an_awaited_child_is_cancelled_with_its_parent(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    inner = await people.owner.create(**ASKS)
    middle = await people.owner.create(**sub_workflow_graph(inner))
    outer = await people.owner.create(**sub_workflow_graph(middle))
    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, outer)
        (child,) = await wait_for_children(people.owner, execution_id)
        (grandchild,) = await wait_for_children(people.owner, child["id"])
        await wait_for_question(people.owner, grandchild["id"])
        response = await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/cancel")
        assert response.status_code == 200
        for one in (execution_id, child["id"], grandchild["id"]):
            assert (await wait_until_ended(people.owner, one))["status"] == "cancelled"


def agent_graph(workflow_id: str) -> dict[str, Any]:
    """Return an agent of the built-in model that calls a workflow once."""
    tool = {"name": "ask", "description": "Asks a person.", "target": {"workflowId": workflow_id}}
    agent = {"model": "echo", "prompt": "ask them", "effects": ["read", "write"], "approval": "never"}
    return {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "agent", "nodeId": "agent", "config": agent},
            {"id": "ask", "nodeId": "tool", "config": tool},
        ],
        "connections": [
            {"source": "start", "target": "agent"},
            {"source": "ask", "target": "agent", "targetPort": "tools"},
        ],
    }


@pytest.mark.every_database
async def test_an_agent_gets_the_result_of_a_workflow_that_is_its_tool(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    inner = await people.owner.create(**ASKS)
    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, await people.owner.create(**agent_graph(inner)))
        (child,) = await wait_for_children(people.owner, execution_id)
        await wait_for_question(people.owner, child["id"])
        explained = await get_json(people.owner, f"/{execution_id}/why")
        assert child["id"] in json.dumps(explained["blockers"])
        body = {"nodeId": "ask", "choice": "yes", "data": {"how": "well"}}
        answer = await people.owner.api.post(f"{EXECUTIONS}/{child['id']}/input", json=body)
        assert answer.status_code == 200, answer.text
        shown = await wait_until_ended(people.owner, execution_id)
    assert shown["status"] == "completed", shown
    output = shown["outputs"]["agent"]
    assert output["toolCalls"] == 1
    assert '"went":"well"' in output["response"]
    assert len(await wait_for_children(people.owner, execution_id)) == 1


async def test_a_workflow_that_is_a_tool_is_cancelled_with_its_agent(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    inner = await people.owner.create(**ASKS)
    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, await people.owner.create(**agent_graph(inner)))
        (child,) = await wait_for_children(people.owner, execution_id)
        await wait_for_question(people.owner, child["id"])
        response = await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/cancel")
        assert response.status_code == 200
        for one in (execution_id, child["id"]):
            assert (await wait_until_ended(people.owner, one))["status"] == "cancelled"


@ON_ONE
async def test_a_workflow_that_runs_itself_ends_at_a_limit_that_it_names(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    itself = await people.owner.create(**sub_workflow_graph("wf_absent"))
    graph = sub_workflow_graph(itself)
    response = await people.owner.api.put(f"/api/v1/workflows/{itself}", json=graph)
    assert response.status_code == 200, response.text
    async with serve_worker(harness, max_run_depth=3):
        execution_id = await execute_workflow(people.owner, itself)
        shown = await wait_until_ended(people.owner, execution_id)
    assert shown["status"] == "failed"
    assert "PILOTFLAME_MAX_RUN_DEPTH" in shown["error"]["message"]
    async with harness.gateway.database.read() as connection:
        depths = select(col(Execution.depth)).where(col(Execution.root_id) == execution_id)
        assert sorted(await connection.scalars(depths)) == [1, 2, 3]


@ON_ONE
async def test_a_run_that_is_not_waited_for_is_left_to_itself(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    inner = await people.owner.create(**ASKS)
    outer = await people.owner.create(**sub_workflow_graph(inner, wait=False))
    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, outer)
        outputs = (await wait_until_ended(people.owner, execution_id))["outputs"]
        (child,) = await wait_for_children(people.owner, execution_id)
        assert outputs["sub"] == {"executionId": child["id"]}
        await wait_for_question(people.owner, child["id"])
        await say(people.owner, child["id"], "yes")
        assert (await wait_until_ended(people.owner, child["id"]))["status"] == "completed"


# ── turns ─────────────────────────────────────────────────────────────────────────────────────────────────


@ON_ONE
async def test_a_throttle_spreads_the_runs_of_all_workflows_with_its_key(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    config = {"limit": 5, "perSeconds": 1, "key": "crm"}
    graph = {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "slow", "nodeId": "throttle", "config": config},
        ],
        "connections": [{"source": "start", "target": "slow"}],
    }
    workflows = [await people.owner.create(**graph) for _ in range(2)]
    async with serve_worker(harness):
        runs = [await execute_workflow(people.owner, workflow_id) for workflow_id in workflows * 2]
        for execution_id in runs:
            assert (await wait_until_ended(people.owner, execution_id))["status"] == "completed"
    spans = [
        (await get_json(people.owner, f"/{execution_id}/spans?node_id=slow"))["spans"][0]
        for execution_id in runs
    ]
    asked, served = (
        [datetime.fromisoformat(span[name]) for span in spans] for name in ("startedAt", "endedAt")
    )
    # From the first request on, since a busy worker may record the end of the first run late. Times have milliseconds.
    assert max(served) - min(asked) >= timedelta(seconds=0.6, milliseconds=-1)
