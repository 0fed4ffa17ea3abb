"""Tasks of custom nodes: claims, reports, leases, retries, cancellation and their place in runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast
from uuid import uuid4

import httpx2
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.types import Message, Receive, Scope, Send

from engine import run_progress, workflow_runner
from gateway.http.byte_budget import ByteBudget, ByteHolding
from gateway.http.errors import ApiError
from gateway.http.protocol import ConnectionBounds, RequestHolding
from gateway.tasks import poll_heartbeats, task_protocol
from gateway.tasks.held_polls import HeldPoll
from gateway.tasks.parked_polls import SERVED_TOGETHER, ParkedPoll, PollAnswer
from gateway.tasks.poll_service import PollService
from gateway.tasks.worker_presence import TaskWorkerPresence
from journal.tasks import visible_tasks
from journal.tasks.task_claims import TaskClaims
from journal.tasks.task_polls import Claim, ClaimedTask, OrganizationNews, TaskPoll
from journal.tasks.task_store import TaskStore
from messages.local_broker import LocalBroker
from models import access_store
from models.access import hash_key
from models.errors import DatabaseUnavailable
from tests.command_runs import PATIENCE_SECONDS
from tests.custom_types import custom_graph, custom_type
from tests.integration.gateway_harness import (
    SECRET,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.query_plans import explain_statement
from tests.integration.task_workers import TASKS, TaskWorkerClient
from tests.integration.test_waiting_runs import (
    execute_workflow,
    get_json,
    serve_worker,
    wait_until_ended,
)

pytestmark = pytest.mark.timeout(60)
SECOND = 1_000_000


@pytest.fixture(autouse=True)
async def executor(harness: GatewayHarness) -> AsyncIterator[None]:
    async with serve_worker(harness, harness.gateway.broker):
        yield


async def add_type(people: OrganizationUsers, **changes: Any) -> None:  # noqa: ANN401 - any JSON value
    answer = await people.owner.api.post("/api/v1/workflow-nodes", json=custom_type(**changes))
    assert answer.status_code == 201, answer.text


async def start(people: OrganizationUsers, graph: dict[str, Any] | None = None, **inputs: Any) -> str:  # noqa: ANN401 - any JSON value
    workflow_id = await people.owner.create(**(graph or custom_graph()))
    return await execute_workflow(people.owner, workflow_id, **inputs)


async def shift(harness: GatewayHarness, task_id: str, seconds: float) -> None:
    """Let so many seconds pass for a task, and sweep."""
    columns = ("check_at", "claimed_at", "lease_until", "deadline_at", "due_at")
    assignments = ", ".join(f"{name} = {name} - :passed" for name in columns)
    statement = text(f"UPDATE task SET {assignments} WHERE id = :task_id")
    values = {"passed": int(seconds * SECOND), "task_id": task_id}
    await harness.gateway.database.transaction(lambda connection: connection.execute(statement, values))
    await harness.gateway.task_hub.sweep()


async def show_task(person: UserClient, task_id: str) -> dict[str, Any]:
    answer = await person.api.get(f"{TASKS}/{task_id}")
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def wait_for_tasks(person: UserClient, count: int) -> None:
    """Wait until so many tasks of the organization exist."""
    async with asyncio.timeout(20):
        while (await person.api.get(TASKS)).json()["count"] < count:  # noqa: ASYNC110 - another process's commit
            await asyncio.sleep(0.02)


@pytest.mark.every_database
async def test_a_worker_performs_the_task_of_a_node(people: OrganizationUsers) -> None:
    await add_type(people)
    graph = custom_graph({"image": "{{ data.body.file }}"})
    graph["nodes"].append({"id": "after", "nodeId": "set", "config": {"values": {"got": "{{ data.url }}"}}})
    graph["connections"].append({"source": "work", "target": "after"})
    worker = TaskWorkerClient(people.owner.api)
    parked = asyncio.create_task(worker.claim())
    execution_id = await start(people, graph, file="a.png")
    (task,) = await parked
    assert (task["type"], task["version"], task["attempt"]) == ("acme/resize", "1.2.0", 1)
    assert task["config"] == {"image": "a.png", "width": 1200}
    assert task["input"]["body"]["file"] == "a.png"
    assert task["idempotencyKey"] == f"{execution_id}:work:0"
    assert (await worker.send(task, "heartbeat", progress={"done": 1, "total": 2}, checkpoint={"n": 1}))[
        "status"
    ] == "ok"
    shown = await show_task(people.owner, task["id"])
    assert (shown["state"], shown["progress"], shown["checkpoint"]) == (
        "leased",
        {"done": 1, "total": 2},
        {"n": 1},
    )
    lines = [{"level": "info", "message": "half"}]
    assert (await worker.send(task, "log", lines=lines))["status"] == "ok"
    assert await worker.complete(task) == "ok"
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["status"] == "completed"
    assert ended["outputs"]["after"] == {"url": "http://x", "got": "http://x"}
    assert await worker.complete(task) == "repeated"
    logs = await get_json(people.owner, f"/{execution_id}/logs")
    assert "half" in str(logs)
    listed = (await people.owner.api.get(f"{TASKS}?executionId={execution_id}&state=completed")).json()
    assert [one["id"] for one in listed["tasks"]] == [task["id"]]
    assert_refused(await people.stranger.api.get(f"{TASKS}/{task['id']}"), 404, "not-found")
    workers = (await people.owner.api.get("/api/v1/workers")).json()["workers"]
    assert [(one["id"], one["present"], one["tasks"]) for one in workers] == [(worker.id, True, 0)]


async def test_a_run_keeps_its_worker_for_tasks_that_end_at_once(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_progress, "MAX_HOLD_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(workflow_runner, "ANSWER_POLL_SECONDS", PATIENCE_SECONDS)  # a notification is needed
    await add_type(people)
    graph = custom_graph()
    graph["nodes"].append({**graph["nodes"][-1], "id": "second"})
    graph["connections"].append({"source": "work", "target": "second"})
    execution_id = await start(people, graph)
    worker = TaskWorkerClient(people.owner.api)
    for node_id in ("work", "second"):
        (task,) = await worker.claim()
        assert task["nodeId"] == node_id
        assert (await worker.send(task, "log", lines=[{"level": "info", "message": node_id}]))[
            "status"
        ] == "ok"
        assert await worker.complete(task) == "ok"
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["status"] == "completed"
    logs = (await get_json(people.owner, f"/{execution_id}/logs"))["logs"]
    assert [line["message"] for line in logs] == ["work", "second"]
    statement = text("SELECT token FROM execution WHERE id = :execution_id")
    async with harness.gateway.database.read() as connection:
        claims = await connection.scalar(statement, {"execution_id": execution_id})
    assert claims == 1, "a released run is claimed again"


def agent_graph(**agent: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return an agent of the built-in model that calls the node of a custom type once."""
    image = {"type": "string", "enum": ["a.png", "b.png"]}
    tool = {
        "name": "resize",
        "description": "Scales an image.",
        "parameters": {"type": "object", "properties": {"image": image}, "required": ["image"]},
        "target": {"node": {"type": "acme/resize", "config": {"image": "{{ args.image }}"}}},
    }
    config = {"model": "echo", "prompt": "resize b.png", "effects": ["read", "write"], "approval": "never"}
    return {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "agent", "nodeId": "agent", "config": {**config, **agent}},
            {"id": "resize", "nodeId": "tool", "config": tool},
        ],
        "connections": [
            {"source": "start", "target": "agent"},
            {"source": "resize", "target": "agent", "targetPort": "tools"},
        ],
    }


@pytest.mark.every_database
async def test_an_agent_waits_for_the_task_of_its_tool(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people)
    workflow_id = await people.owner.create(**agent_graph())
    checked = (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/validate")).json()
    assert [one["type"] for one in checked["warnings"]] == ["no-worker"]
    assert_refused(
        await people.owner.api.delete("/api/v1/workflow-nodes/acme/resize?all=true"), 409, "node-type-in-use"
    )
    execution_id = await execute_workflow(people.owner, workflow_id)
    (task,) = await TaskWorkerClient(people.owner.api).claim()
    assert task["config"] == {"image": "b.png", "width": 1200}
    assert task["input"] == {"image": "b.png"}
    assert task["idempotencyKey"] == f"{execution_id}:agent:0:1"
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await get_json(people.owner, f"/{execution_id}"))["status"] != "waiting":  # noqa: ASYNC110 - another process's commit
            await asyncio.sleep(0.02)
    explained = await get_json(people.owner, f"/{execution_id}/why")
    assert "awaiting-task" in [one["code"] for one in explained["blockers"]]
    await shift(harness, task["id"], 40)
    worker = TaskWorkerClient(people.owner.api)
    (again,) = await worker.claim()
    assert (again["id"], again["idempotencyKey"]) == (task["id"], task["idempotencyKey"])
    assert await worker.complete(again, {"url": "http://done"}) == "ok"
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["status"] == "completed"
    output = ended["outputs"]["agent"]
    assert (output["toolCalls"], output["response"]) == (1, '{"url":"http://done"}')


async def test_a_cancelled_agent_cancels_the_task_of_its_tool(people: OrganizationUsers) -> None:
    await add_type(people)
    execution_id = await start(people, agent_graph())
    worker = TaskWorkerClient(people.owner.api)
    (task,) = await worker.claim()
    answer = await people.owner.api.post(f"/api/v1/executions/{execution_id}/cancel")
    assert answer.status_code == 200, answer.text
    assert (await wait_until_ended(people.owner, execution_id))["status"] == "cancelled"
    assert (await worker.send(task, "complete", output={"url": "x"}))["status"] == "cancelled"


async def test_the_same_request_gets_the_same_tasks(people: OrganizationUsers) -> None:
    await add_type(people)
    await start(people)
    worker = TaskWorkerClient(people.owner.api)
    first = await worker.claim(request_id="r1")
    again = await worker.claim(request_id="r1", limit=5)
    assert first == again
    assert await worker.claim(request_id="r2", wait=0) == []
    # The answer to r3 is lost: a report about a later claim that lacks its task frees that at once.
    lost = await start(people)
    other = TaskWorkerClient(people.owner.api, id=worker.id)
    (unseen,) = await other.claim(request_id="r3")
    await start(people)
    (later,) = await worker.claim(request_id="r4")
    assert await worker.report() == []
    (retaken,) = await TaskWorkerClient(people.owner.api).claim()
    assert retaken["id"] == unseen["id"]
    assert retaken["executionId"] == lost
    assert (await show_task(people.owner, unseen["id"]))["unacknowledged"] == 0
    assert (await worker.send(unseen, "complete", output={"url": "x"}))["status"] == "lost"
    assert await worker.complete(later) == "ok"


async def test_a_failed_attempt_is_tried_again_by_the_rules_of_its_type(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people)
    execution_id = await start(people)
    worker = TaskWorkerClient(people.owner.api)
    error = {"code": "No Such Image!", "message": "It is gone."}
    for attempt in (1, 2):
        (task,) = await worker.claim()
        assert task["attempt"] == attempt
        assert (await worker.send(task, "fail", error=error))["status"] == "ok"
        assert (await worker.send(task, "fail", error=error))["status"] == "repeated"
        assert await worker.claim(wait=0) == []
        await shift(harness, task["id"], 5)
    (task,) = await worker.claim()
    await worker.send(task, "fail", error=error, retry={"afterSeconds": 0})
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["error"]["cause"]["code"] == "no-such-image"
    shown = await show_task(people.owner, task["id"])
    assert (shown["failures"], shown["attempt"]) == (3, 3)
    assert ended["error"]["attempt"] == 3

    # `retry: false` is final at the first attempt.
    execution_id = await start(people)
    (task,) = await worker.claim()
    await worker.send(task, "fail", error=error, retry=False)
    assert (await wait_until_ended(people.owner, execution_id))["status"] == "failed"


async def test_lost_leases_are_counted_apart(harness: GatewayHarness, people: OrganizationUsers) -> None:
    await add_type(people, task={"retry": {"maxAttempts": 1}})
    execution_id = await start(people)
    worker = TaskWorkerClient(people.owner.api)
    (task,) = await worker.claim()
    await shift(harness, task["id"], 9)
    assert (await show_task(people.owner, task["id"]))["state"] == "leased"
    await shift(harness, task["id"], 2)
    assert (await show_task(people.owner, task["id"]))["unacknowledged"] == 1
    for losses in (1, 2, 3):
        worker = TaskWorkerClient(people.owner.api)
        (task,) = await worker.claim()
        await worker.send(task, "heartbeat", checkpoint={"n": losses})
        await shift(harness, task["id"], 29)
        assert (await show_task(people.owner, task["id"]))["state"] == "leased"
        await shift(harness, task["id"], 2)
        assert (await show_task(people.owner, task["id"]))["losses"] == losses
        assert (await worker.send(task, "complete", output={"url": "x"}))["status"] == "lost"
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["error"]["cause"]["code"] == "lost-attempt"


async def test_log_lines_above_the_maximum_are_dropped_and_counted(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = harness.gateway.task_hub.tasks
    monkeypatch.setattr(tasks, "max_log_lines", 2)
    monkeypatch.setattr(tasks.reports, "_max_log_lines", 2)
    await add_type(people)
    execution_id = await start(people)
    worker = TaskWorkerClient(people.owner.api)
    (task,) = await worker.claim()
    for name in ("a", "b"):
        lines = [{"level": "info", "message": f"{name}{number}"} for number in range(3)]
        assert (await worker.send(task, "log", lines=lines))["status"] == "ok"
    monkeypatch.setattr(task_protocol, "MAX_LOG_CHARACTERS", 1_000)
    long = await worker.send(task, "log", lines=[{"message": "x" * 600}] * 2)
    assert (long["status"], long["error"]["code"]) == ("refused", "log-too-large")
    assert await worker.complete(task) == "ok"
    await wait_until_ended(people.owner, execution_id)
    logs = (await get_json(people.owner, f"/{execution_id}/logs"))["logs"]
    assert [one["message"][:9] for one in logs if one["nodeId"] == "work"] == ["a0", "a1", "More than"]
    shown = await show_task(people.owner, task["id"])
    assert (shown["logLines"], shown["droppedLogLines"]) == (6, 4)


async def test_why_says_that_a_worker_is_silent(harness: GatewayHarness, people: OrganizationUsers) -> None:
    await add_type(people)
    execution_id = await start(people)
    worker = TaskWorkerClient(people.owner.api)
    (task,) = await worker.claim()

    async def explain() -> str:
        message: str = (await get_json(people.owner, f"/{execution_id}/why"))["blockers"][0]["message"]
        return message

    assert f"performed by worker {worker.id}, which has not confirmed the claim yet" in await explain()
    await worker.send(task, "heartbeat")
    said = r"which has reported 1?\d s ago: without a report, another one may have it at "
    assert re.search(said, await explain()), "it has reported just now"
    await shift(harness, task["id"], 20)
    assert "which has not reported for 2" in await explain()
    assert await worker.complete(task) == "ok"


async def test_a_task_that_kills_its_workers_at_once_ends(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people)
    execution_id = await start(people)
    for _ in range(10):
        (task,) = await TaskWorkerClient(people.owner.api).claim()
        await shift(harness, task["id"], 11)
    assert (await wait_until_ended(people.owner, execution_id))["status"] == "failed"

    # A write that must run at most once is not repeated, since its worker may have begun.
    execution_id = await start(people, custom_graph(atMostOnce=True))
    (task,) = await TaskWorkerClient(people.owner.api).claim()
    await shift(harness, task["id"], 11)
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["error"]["cause"]["code"] == "lost-attempt"


async def test_the_deadline_ends_an_attempt_that_still_reports(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people, task={"timeoutSeconds": 20, "leaseSeconds": 60})
    execution_id = await start(people)
    worker = TaskWorkerClient(people.owner.api)
    (task,) = await worker.claim()
    await worker.send(task, "heartbeat")
    await shift(harness, task["id"], 21)
    assert (await worker.send(task, "heartbeat"))["status"] == "lost"
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["error"]["code"] == "timeout"


async def test_a_cancelled_run_reaches_its_worker_by_the_open_poll(people: OrganizationUsers) -> None:
    await add_type(people)
    worker = TaskWorkerClient(people.owner.api)
    execution_id = await start(people)
    (task,) = await worker.claim()
    await worker.send(task, "heartbeat")
    parked = asyncio.create_task(people.owner.api.post(f"{TASKS}/claim", json=worker.poll(limit=0)))
    waiting = await start(people)
    await wait_for_tasks(people.owner, 2)
    for run in (execution_id, waiting):
        answer = await people.owner.api.post(f"/api/v1/executions/{run}/cancel")
        assert answer.status_code == 200, answer.text
        assert (await wait_until_ended(people.owner, run))["status"] == "cancelled"
    assert (await asyncio.wait_for(parked, 60)).json()["cancel"] == [task["id"]]
    assert (await worker.send(task, "heartbeat"))["status"] == "cancelled"
    assert (await worker.send(task, "complete", output={"url": "x"}))["status"] == "cancelled"
    listed = (await people.owner.api.get(f"{TASKS}?state=cancelled")).json()
    assert {one["executionId"] for one in listed["tasks"]} == {execution_id, waiting}


async def test_outputs_are_checked_by_the_type(people: OrganizationUsers) -> None:
    await add_type(people)
    worker = TaskWorkerClient(people.owner.api)
    for fields, code in (
        ({"output": {"link": "x"}}, "invalid-output"),
        ({"output": {"url": "x"}, "port": "nowhere"}, "invalid-port"),
        ({"output": {"url": "x" * 10_000_001}}, "result-too-large"),
    ):
        execution_id = await start(people)
        (task,) = await worker.claim()
        if code == "result-too-large":
            refused = await people.owner.api.put(
                f"{TASKS}/{task['id']}/output", json=fields["output"], headers={"X-Task-Lease": task["lease"]}
            )
            assert refused.status_code == 413
            await worker.send(task, "release")
            continue
        result = await worker.send(task, "complete", **fields)
        assert (result["status"], result["error"]["code"]) == ("refused", code)
        ended = await wait_until_ended(people.owner, execution_id)
        assert ended["error"]["cause"]["code"] == code


@pytest.mark.every_database
async def test_large_inputs_and_outputs_have_requests_of_their_own(people: OrganizationUsers) -> None:
    await add_type(people)
    worker = TaskWorkerClient(people.owner.api)
    execution_id = await start(people, None, text="x" * 300_000)
    (task,) = await worker.claim()
    assert task["input"] == {"$blob": {"bytes": task["input"]["$blob"]["bytes"]}}
    lease = {"X-Task-Lease": task["lease"]}
    given = await people.owner.api.get(f"{TASKS}/{task['id']}/input", headers=lease)
    assert given.json()["body"]["text"] == "x" * 300_000
    assert_refused(await people.owner.api.get(f"{TASKS}/{task['id']}/input"), 409, "lease-lost")
    missing = await worker.send(task, "complete", output={"$blob": {}})
    assert (missing["status"], missing["error"]["code"]) == ("refused", "output-missing")
    put = await people.owner.api.put(
        f"{TASKS}/{task['id']}/output", json={"url": "y" * 400_000}, headers=lease
    )
    assert put.status_code == 204, put.text
    assert await worker.complete(task, {"$blob": {}}) == "ok"
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["status"] == "completed"


@pytest.mark.every_database
async def test_a_worker_takes_its_version_and_older_ones_of_its_pool(people: OrganizationUsers) -> None:
    await add_type(people, version="1.4.0", task={"pool": "gpu"})
    await start(people)
    await wait_for_tasks(people.owner, 1)
    old = TaskWorkerClient(people.owner.api, types={"acme/resize": "1.3.0"}, pools=["gpu", "default"])
    next_major = TaskWorkerClient(people.owner.api, types={"acme/resize": "2.0.0"}, pools=["gpu"])
    elsewhere = TaskWorkerClient(people.owner.api, types={"acme/resize": "1.4.0"})
    for worker in (old, next_major, elsewhere):
        assert await worker.claim(wait=0) == []
    (task,) = (await people.owner.api.get(TASKS)).json()["tasks"]
    explanation = (await show_task(people.owner, task["id"]))["explanation"]
    assert explanation.startswith(
        "no worker of acme/resize 1.4.0, or a newer 1.x, serves pool gpu; 2.0.0 \u00d71"
    )
    why = await get_json(people.owner, f"/{task['executionId']}/why")
    assert (why["primary"], why["blockers"][0]["kind"]) == ("awaiting-task", "change")
    assert explanation in why["blockers"][0]["message"]
    path = f"/api/v1/workflows/{task['workflowId']}/validate"
    warnings = (await people.owner.api.post(path)).json()["warnings"]
    assert [one["type"] for one in warnings] == ["no-worker"]
    newer = TaskWorkerClient(people.owner.api, types={"acme/resize": "1.5.0"}, pools=["gpu"])
    assert len(await newer.claim()) == 1
    assert (await people.owner.api.post(path)).json()["warnings"] == []
    why = await get_json(people.owner, f"/{task['executionId']}/why")
    assert why["blockers"][0]["by"][0]["id"] == newer.id


@pytest.mark.every_database
async def test_a_stopped_worker_gets_nothing_and_a_draining_one_is_told(people: OrganizationUsers) -> None:
    await add_type(people)
    worker = TaskWorkerClient(people.owner.api)
    await start(people)
    (task,) = await worker.claim()
    parked = asyncio.create_task(people.owner.api.post(f"{TASKS}/claim", json=worker.poll()))
    await asyncio.sleep(0)
    drained = await people.owner.api.post(f"/api/v1/workers/{worker.id}/drain")
    assert (drained.json()["draining"], drained.json()["tasks"]) == (True, 1)
    assert (await asyncio.wait_for(parked, 60)).json()["drain"] is True
    assert (await people.owner.api.post(f"{TASKS}/stop", json={"worker": worker.id})).status_code == 200
    await start(people)
    await wait_for_tasks(people.owner, 2)
    refused = await people.owner.api.post(f"{TASKS}/claim", json=worker.poll())
    assert_refused(refused, 409, "worker-stopped")
    assert (await worker.send(task, "release"))["status"] == "ok"
    other = TaskWorkerClient(people.owner.api)
    assert len(await other.claim(limit=5)) == 2


@pytest.mark.every_database
async def test_concurrency_limits_the_tasks_of_a_key(people: OrganizationUsers) -> None:
    await add_type(people, task={"concurrency": {"limit": 1, "key": "{{ data.body.customer }}"}})
    for customer in ("a", "a", "b"):
        await start(people, None, customer=customer)
    worker = TaskWorkerClient(people.owner.api)
    first = [*await worker.claim(limit=5)]
    while len(first) < 2:
        first += await worker.claim(limit=5)
    assert await worker.claim(limit=5, wait=0) == []
    assert sorted(task["input"]["body"]["customer"] for task in first) == ["a", "b"]
    (of_a,) = [task for task in first if task["input"]["body"]["customer"] == "a"]
    assert await worker.complete(of_a) == "ok"
    (second,) = await worker.claim(limit=5)
    assert second["input"]["body"]["customer"] == "a"


async def test_a_poll_that_does_not_wait_gets_the_tasks_that_are_ready(people: OrganizationUsers) -> None:
    await add_type(people)
    worker = TaskWorkerClient(people.owner.api)
    assert await worker.claim(wait=0) == []
    execution_id = await start(people)
    await wait_for_tasks(people.owner, 1)
    (task,) = await worker.claim(wait=0)
    assert task["executionId"] == execution_id


async def test_many_tasks_of_one_run_are_answered_together(people: OrganizationUsers) -> None:
    await add_type(people)
    graph = {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "each", "nodeId": "loop", "config": {"items": "{{ data.body.list }}", "concurrency": 20}},
            {"id": "work", "nodeId": "acme/resize", "config": {"image": "{{ item }}"}},
        ],
        "connections": [
            {"source": "start", "target": "each"},
            {"source": "each", "sourcePort": "continue", "target": "work"},
        ],
    }
    execution_id = await start(people, graph, list=[f"{n}.png" for n in range(20)])
    worker = TaskWorkerClient(people.owner.api)
    tasks: list[dict[str, Any]] = []
    while len(tasks) < 20:
        tasks += await worker.claim(limit=20)
    items = [
        {
            "id": one["id"],
            "lease": one["lease"],
            "kind": "complete",
            "output": {"url": one["config"]["image"]},
        }
        for one in tasks
    ]
    assert {one["status"] for one in await worker.report(*items)} == {"ok"}
    ended = await wait_until_ended(people.owner, execution_id)
    assert ended["status"] == "completed"
    results = ended["outputs"]["each"]["results"]
    assert [one["url"] for one in results] == [f"{n}.png" for n in range(20)]


async def test_a_key_performs_only_its_node_types(people: OrganizationUsers, harness: GatewayHarness) -> None:
    await add_type(people)
    created = await people.admin.api.post(
        "/api/v1/auth/keys",
        json={"name": "worker", "scopes": ["tasks:work"], "nodeTypes": ["acme/crop", "other/*"]},
    )
    assert created.json()["nodeTypes"] == ["acme/crop", "other/*"]
    api = await harness.client(created.json()["key"])
    worker = TaskWorkerClient(api)
    assert_refused(await api.post(f"{TASKS}/claim", json=worker.poll(wait=0)), 403, "node-type-not-allowed")
    worker.types = {"acme/crop": "1.0.0", "other/anything": "1.0.0"}
    assert await worker.claim(wait=0) == []
    assert_refused(await api.get(TASKS), 403, "scope-required")


@pytest.mark.every_database
async def test_a_worker_gets_tasks_of_runs_that_its_user_may_see(people: OrganizationUsers) -> None:
    await add_type(people)
    theirs = TaskWorkerClient(people.colleague.api)
    waiting = asyncio.create_task(theirs.claim(limit=5))
    workflow_id = await people.owner.create(**custom_graph())
    hidden = await execute_workflow(people.owner, workflow_id)
    await wait_for_tasks(people.owner, 1)
    (shown,) = (await people.owner.api.get(TASKS)).json()["tasks"]
    assert "users who may not see it" in (await show_task(people.owner, shown["id"]))["explanation"]
    warnings = (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/validate")).json()["warnings"]
    assert "users who may not see it" in str(warnings)
    # The open poll of the other user takes nothing away from later ones.
    (task,) = await TaskWorkerClient(people.owner.api).claim()
    assert (task["executionId"], waiting.done()) == (hidden, False)
    await people.owner.api.post(
        f"/api/v1/workflows/{workflow_id}/share", json={"userId": people.colleague.user.id}
    )
    shared = await execute_workflow(people.owner, workflow_id)
    (task,) = await waiting
    assert task["executionId"] == shared

    tested = await people.owner.api.post(
        f"/api/v1/workflows/{workflow_id}/execute", json={"pinned": {"start": {"output": {"secret": True}}}}
    )
    assert tested.status_code == 201, tested.text
    await wait_for_tasks(people.owner, 3)
    assert await theirs.claim(wait=0) == [], "a private run of a shared workflow"
    everything = TaskWorkerClient(people.admin.api)
    assert [task["executionId"] for task in await everything.claim(limit=5)] == [tested.json()["executionId"]]
    own = await execute_workflow(people.colleague, await people.colleague.create(**custom_graph()))
    assert [task["executionId"] for task in await theirs.claim(limit=5)] == [own]


async def test_one_user_reports_for_no_worker_of_another(
    people: OrganizationUsers, harness: GatewayHarness
) -> None:
    await add_type(people)
    execution_id = await start(people)
    worker = TaskWorkerClient(people.owner.api)
    body = worker.poll()
    (task,) = await worker.claim(request_id=body["requestId"])
    forged = TaskWorkerClient(people.admin.api)
    assert await forged.complete(task) == "lost"
    forged.id = worker.id
    for path, sent in (
        ("claim", {**body, "requestId": body["requestId"]}),
        ("report", {"worker": worker.id, "claimed": "later", "held": [], "items": []}),
        ("stop", {"worker": worker.id}),
    ):
        assert_refused(await forged.api.post(f"{TASKS}/{path}", json=sent), 409, "worker-id-taken")
    headers = {"X-Task-Lease": task["lease"]}
    assert_refused(
        await forged.api.get(f"{TASKS}/{task['id']}/input", headers=headers), 409, "worker-id-taken"
    )
    put = await forged.api.put(f"{TASKS}/{task['id']}/output", headers=headers, json={})
    assert_refused(put, 409, "worker-id-taken")
    # Another key of the same user goes on under the id.
    created = await people.admin.api.post(
        "/api/v1/auth/keys",
        json={"name": "next", "scopes": ["tasks:work"], "userId": people.owner.user.id},
    )
    follower = TaskWorkerClient(await harness.client(created.json()["key"]), id=worker.id)
    assert await follower.claim(request_id=body["requestId"]) == [task]
    assert_refused(await worker.api.post(f"{TASKS}/stop", json={"worker": worker.id}), 409, "worker-id-taken")
    assert await follower.complete(task) == "ok"
    assert (await wait_until_ended(people.owner, execution_id))["status"] == "completed"


@pytest.mark.every_database
async def test_a_claim_reads_no_tasks_of_others(harness: GatewayHarness, people: OrganizationUsers) -> None:
    keys = await access_store.find_keys(
        harness.gateway.database, [hash_key(people.owner.key, SECRET.encode())]
    )
    (found,) = keys.values()
    values = {"queue": "acme/resize@1.2.0#default", "turn": 1, "workflow_ids": ["wf_1"], "limit": 5}
    statement = visible_tasks._select_tasks(found.caller).params(values)  # noqa: SLF001 - the statement of claims
    plan = await explain_statement(harness.gateway.database, statement)
    assert "ix_task_ready" in plan, plan
    assert "queue_turn" in plan, plan
    assert "SCAN task" not in plan, plan


@pytest.mark.parametrize("person", ["admin", "owner"])
async def test_only_an_admin_gives_the_scope_of_workers(people: OrganizationUsers, person: str) -> None:
    client: UserClient = getattr(people, person)
    default = await client.api.post("/api/v1/auth/keys", json={"name": "default"})
    assert "tasks:work" not in default.json()["scopes"]
    given = await client.api.post("/api/v1/auth/keys", json={"name": "worker", "scopes": ["tasks:work"]})
    assert given.status_code == (201 if person == "admin" else 403), given.text
    few = {"name": "few", "scopes": ["keys:write", "users:write"][: 2 if person == "admin" else 1]}
    key = (await client.api.post("/api/v1/auth/keys", json=few)).json()["key"]
    beyond = await client.api.post(
        "/api/v1/auth/keys", headers={"X-API-Key": key}, json={"name": "more", "scopes": ["tasks:work"]}
    )
    assert_refused(beyond, 403, "scope-required")


# ── people ──────────────────────────────────────────────────────────────────────────────────────────────────


async def decide(person: UserClient, task_id: str, decision: str) -> Any:  # noqa: ANN401 - a response
    return await person.api.post(f"{TASKS}/{task_id}/{decision}")


@pytest.mark.every_database
async def test_a_person_begins_the_next_attempt_at_once(people: OrganizationUsers) -> None:
    await add_type(people, task={"retry": {"maxAttempts": 2, "delay": 600, "maxDelay": 600}})
    execution_id = await start(people)
    first, second = TaskWorkerClient(people.owner.api), TaskWorkerClient(people.owner.api)
    (task,) = await first.claim()
    assert (await first.send(task, "fail", error={"code": "busy"}))["status"] == "ok"
    assert_refused(await decide(people.stranger, task["id"], "retry"), 404, "not-found")
    assert (await decide(people.owner, task["id"], "retry")).json() == {
        "id": task["id"],
        "executionId": execution_id,
        "state": "ready",
    }
    (task,) = await first.claim()
    assert task["attempt"] == 2
    # The worker hangs: another one gets the task, and the attempt costs nothing.
    assert (await decide(people.owner, task["id"], "retry")).json()["state"] == "ready"
    assert (await decide(people.owner, task["id"], "retry")).status_code == 200
    (again,) = await second.claim()
    assert (again["attempt"], again["idempotencyKey"]) == (2, task["idempotencyKey"])
    assert await first.complete(task) == "lost"
    assert await second.complete(again) == "ok"
    assert (await wait_until_ended(people.owner, execution_id))["status"] == "completed"
    refused = await decide(people.owner, task["id"], "retry")
    assert_refused(refused, 409, "task-ended")
    assert execution_id in refused.json()["error"]["message"]
    trail = (await people.admin.api.get("/api/v1/audit?action=task.retried")).json()["entries"]
    assert {(one["objectId"], one["userId"]) for one in trail} == {(task["id"], people.owner.user.id)}


@pytest.mark.every_database
async def test_two_attempts_of_a_task_at_one_worker_are_kept_apart(people: OrganizationUsers) -> None:
    await add_type(people)
    await start(people)
    worker = TaskWorkerClient(people.owner.api)
    (first,) = await worker.claim()
    await worker.send(first, "heartbeat")
    await decide(people.owner, first["id"], "retry")
    (second,) = await worker.claim()
    assert first["id"] == second["id"]
    attempts = [{"id": task["id"], "lease": task["lease"]} for task in (first, second)]
    assert await worker.report(held=attempts) == [{**attempts[0], "status": "lost", "error": None}]
    assert await worker.report(held=[first["id"]]) == []  # as workers of earlier versions name it
    assert await worker.complete(first) == "lost"
    assert await worker.complete(second) == "ok"


async def test_an_attempt_that_its_worker_never_got_is_free_though_the_one_before_is_held(
    people: OrganizationUsers,
) -> None:
    await add_type(people)
    await start(people)
    worker = TaskWorkerClient(people.owner.api)
    (first,) = await worker.claim()
    await worker.send(first, "heartbeat")
    await decide(people.owner, first["id"], "retry")
    await worker.claim()  # the answer is lost
    await start(people)
    (other,) = await worker.claim()
    held = [{"id": task["id"], "lease": task["lease"]} for task in (first, other)]
    await worker.report(held=held)
    (again,) = await TaskWorkerClient(people.owner.api).claim()
    assert (again["id"], again["attempt"]) == (first["id"], 1)


async def test_a_cancelled_task_fails_its_node_and_stops_its_worker(people: OrganizationUsers) -> None:
    await add_type(people)
    graph = custom_graph()
    graph["nodes"].append(
        {"id": "instead", "nodeId": "set", "config": {"values": {"why": "{{ data.error.code }}"}}}
    )
    graph["connections"].append({"source": "work", "sourcePort": "error", "target": "instead"})
    waiting = await start(people, graph)
    await wait_for_tasks(people.owner, 1)
    (listed,) = (await people.owner.api.get(f"{TASKS}?executionId={waiting}")).json()["tasks"]
    assert (await decide(people.owner, listed["id"], "cancel")).json()["state"] == "cancelled"
    ended = await wait_until_ended(people.owner, waiting)
    assert (ended["status"], ended["outputs"]["instead"]["why"]) == ("completed", "task-cancelled")

    held = await start(people, graph)
    worker = TaskWorkerClient(people.owner.api)
    (task,) = await worker.claim()
    await worker.send(task, "heartbeat")
    parked = asyncio.create_task(people.owner.api.post(f"{TASKS}/claim", json=worker.poll(limit=0)))
    assert (await decide(people.owner, task["id"], "cancel")).json()["state"] == "cancel_requested"
    assert (await wait_until_ended(people.owner, held))["outputs"]["instead"]["why"] == "task-cancelled"
    assert (await asyncio.wait_for(parked, 60)).json()["cancel"] == [task["id"]]
    assert await worker.complete(task) == "cancelled"
    shown = await show_task(people.owner, task["id"])
    assert (shown["state"], shown["error"]["code"]) == ("cancelled", "task-cancelled")
    assert_refused(await decide(people.owner, task["id"], "cancel"), 409, "task-ended")


async def test_a_task_that_runs_once_is_not_taken_from_its_worker(people: OrganizationUsers) -> None:
    await add_type(people)
    graph = custom_graph()
    graph["nodes"][1]["atMostOnce"] = True
    await start(people, graph)
    worker = TaskWorkerClient(people.owner.api)
    (task,) = await worker.claim()
    assert_refused(await decide(people.owner, task["id"], "retry"), 409, "task-runs-once")
    assert await worker.complete(task) == "ok"
    # A worker that ends an attempt at its deadline doesn't know whether the write was done.
    execution_id = await start(people, {**graph, "name": "Again"})
    (task,) = await worker.claim()
    await worker.send(task, "fail", error={"code": "timeout"}, retry=True)
    assert (await wait_until_ended(people.owner, execution_id))["error"]["code"] == "timeout"


async def _claim_apart(hub: PollService, organization_id: str, number: int) -> Sequence[ClaimedTask]:
    poll = TaskPoll(
        organization_id, f"w_{number}", f"r_{number}", 1, {"acme/resize": "1.2.0"}, frozenset({"default"})
    )
    return (await hub.wait(ParkedPoll(poll, PATIENCE_SECONDS))).tasks


async def _wait_for_first_looks(hub: PollService, organization_id: str, count: int) -> None:
    """Wait until the looks of new polls are over; they would find a task too that is announced meanwhile."""
    while True:
        polls = hub._polls.get(organization_id)  # noqa: SLF001 - nobody else asks whether a gateway looks
        if (
            polls is not None
            and len(polls.all) == count
            and polls.is_quiet
            and polls.serving is None
            and polls.delay is None
        ):
            return
        await asyncio.sleep(0.01)


async def test_claims_of_two_gateways_at_once_share_the_tasks(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people)
    workflow_id = await people.owner.create(**custom_graph())
    await asyncio.gather(*(execute_workflow(people.owner, workflow_id) for _ in range(12)))
    await wait_for_tasks(people.owner, 12)
    gateway = harness.gateway
    hubs = [PollService(gateway.broker, TaskStore(gateway.database)) for _ in range(2)]
    organization_id = people.owner.user.organization_id
    claims = [_claim_apart(hubs[number % 2], organization_id, number) for number in range(12)]
    # Neither looks again later, so each has to pass over the rows that the other one has locked.
    claimed = await asyncio.gather(*claims)
    assert len({task.id for tasks in claimed for task in tasks}) == 12
    await asyncio.gather(*(hub.close() for hub in hubs))


@pytest.mark.every_database
async def test_a_claim_repeated_at_another_gateway_keeps_its_tasks(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people)
    await start(people)
    await wait_for_tasks(people.owner, 1)
    organization_id = people.owner.user.organization_id
    poll = TaskPoll(organization_id, "w_1", "r_1", 1, {"acme/resize": "1.2.0"}, frozenset({"default"}))
    first, second = (TaskStore(harness.gateway.database).claims for _ in range(2))

    async def claim() -> Sequence[ClaimedTask]:
        news = await first.read_news(organization_id, [poll], ["w_1"])
        assert not news.repeated
        (claimed,) = (await first.claim([poll], news.queues)).tasks
        return claimed

    # The client has left before the answer: its task is free again.
    await first.put_back(await claim())
    again = await claim()
    # Now the client has repeated its claim at the other gateway before the first one puts the task back.
    (repeated,) = (await second.read_news(organization_id, [poll], ["w_1"])).repeated.values()
    assert [(one.id, one.lease) for one in repeated] == [(one.id, one.lease) for one in again]
    await first.put_back(again)
    assert (await show_task(people.owner, again[0].id))["state"] == "leased"


async def test_a_repeated_poll_ends_the_open_one_of_a_lost_connection(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people)
    gateway = harness.gateway
    hub = PollService(gateway.broker, TaskStore(gateway.database))
    organization_id = people.owner.user.organization_id
    lost, repeated = (asyncio.create_task(_claim_apart(hub, organization_id, 1)) for _ in range(2))
    assert await lost == ()
    await start(people)
    await wait_for_tasks(people.owner, 1)
    await hub.announce([organization_id])
    assert len(await repeated) == 1
    await hub.close()


async def test_a_worker_learns_of_its_stop_though_a_look_fails(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_type(people)
    looks, fails = asyncio.Event(), asyncio.Event()
    read_news = TaskClaims.read_news

    async def fail_once(self: TaskClaims, *arguments: Any) -> OrganizationNews:  # noqa: ANN401 - those of `read_news`
        if fails.is_set():
            fails.clear()
            raise DatabaseUnavailable
        looks.set()
        return await read_news(self, *arguments)

    monkeypatch.setattr(TaskClaims, "read_news", fail_once)
    worker = TaskWorkerClient(people.owner.api)
    poll = asyncio.create_task(worker.api.post(f"{TASKS}/claim", json=worker.poll(wait=30), timeout=60))
    await looks.wait()
    fails.set()
    stopped = await people.owner.api.post(f"{TASKS}/stop", json={"worker": worker.id})
    assert stopped.status_code == 200, stopped.text
    assert_refused(await poll, 409, "worker-stopped")
    assert not fails.is_set()


async def test_one_task_for_many_polls_is_one_claim(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_type(people)
    claims: list[int] = []
    claim = TaskClaims.claim

    async def count(self: TaskClaims, polls: Sequence[TaskPoll], queues: Sequence[str]) -> Claim:
        claims.append(len(polls))
        return await claim(self, polls, queues)

    monkeypatch.setattr(TaskClaims, "claim", count)
    gateway = harness.gateway
    hub = PollService(gateway.broker, TaskStore(gateway.database))
    organization_id = people.owner.user.organization_id
    polls = [
        asyncio.create_task(_claim_apart(hub, organization_id, number))
        for number in range(3 * SERVED_TOGETHER)
    ]
    await _wait_for_first_looks(hub, organization_id, len(polls))
    await start(people)
    await wait_for_tasks(people.owner, 1)
    done, waiting = await asyncio.wait(polls, return_when=asyncio.FIRST_COMPLETED)
    assert [len(one.result()) for one in done] == [1]
    assert claims == [SERVED_TOGETHER]
    hub.release()
    assert [len(tasks) for tasks in await asyncio.gather(*waiting)] == [0] * len(waiting)
    await hub.close()


async def test_a_poll_that_meets_the_end_of_its_gateway_is_refused(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_listen = asyncio.Event(), asyncio.Event()

    async def listen(*_: object, **__: object) -> None:
        begun.set()
        await may_listen.wait()

    gateway = harness.gateway
    monkeypatch.setattr(gateway.broker, "listen", listen)
    hub = PollService(gateway.broker, TaskStore(gateway.database))
    poll = asyncio.create_task(_claim_apart(hub, people.owner.user.organization_id, 1))
    await begun.wait()
    hub.release()
    may_listen.set()
    with pytest.raises(ApiError, match="stopping"):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await poll
    await hub.close()


class HeldPollRecorder:
    """Records that polls have sent heartbeats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(poll_heartbeats, "HEARTBEAT_SECONDS", 0.05)
        monkeypatch.setattr(poll_heartbeats, "TICK_SECONDS", 0.02)
        self._beats = asyncio.Semaphore(0)
        wait_again = HeldPoll.wait_again

        async def record(poll: HeldPoll) -> PollAnswer | None:
            self._beats.release()
            return await wait_again(poll)

        monkeypatch.setattr(HeldPoll, "wait_again", record)

    async def wait(self, count: int) -> None:
        """Wait for so many further heartbeats of all polls."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            for _ in range(count):
                await self._beats.acquire()


def hold_poll(worker: TaskWorkerClient) -> asyncio.Task[httpx2.Response]:
    """Send a poll that may stay open for minutes."""
    return asyncio.create_task(
        worker.api.post(f"{TASKS}/claim", json=worker.poll(wait=300), timeout=PATIENCE_SECONDS)
    )


async def test_a_poll_of_minutes_sends_heartbeats_and_keeps_its_worker_present(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_type(people)
    heartbeats, worker = HeldPollRecorder(monkeypatch), TaskWorkerClient(people.owner.api)
    held = hold_poll(worker)
    await heartbeats.wait(2)
    statement = text(
        "UPDATE task_worker SET last_seen_at = last_seen_at - :passed WHERE organization_id = :organization"
    )
    values = {"passed": 3_600 * SECOND, "organization": people.owner.user.organization_id}
    await harness.gateway.database.transaction(lambda connection: connection.execute(statement, values))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (await people.owner.api.get("/api/v1/workers")).json()["workers"][0]["present"]:
            await heartbeats.wait(1)
    await start(people)
    answer = await held
    assert answer.content.startswith(b"  ")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    (task,) = answer.json()["tasks"]
    worker.held[task["id"]] = task
    assert (await worker.send(task, "complete", output={"url": "x"}))["status"] == "ok"


async def test_a_poll_with_heartbeats_ends_with_its_worker(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeats, worker = HeldPollRecorder(monkeypatch), TaskWorkerClient(people.owner.api)
    held = hold_poll(worker)
    await heartbeats.wait(1)
    stopped = await people.owner.api.post(f"{TASKS}/stop", json={"worker": worker.id})
    assert stopped.status_code == 200, stopped.text
    assert (await held).json() == {"tasks": [], "cancel": [], "drain": True}
    # A refusal that is known before the first heartbeat has a status of its own.
    assert_refused(await hold_poll(worker), 409, "worker-stopped")


@pytest.mark.parametrize("has_heartbeats", [True, False])
async def test_the_end_of_a_key_ends_its_polls(
    harness: GatewayHarness,
    people: OrganizationUsers,
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_heartbeats: bool,
) -> None:
    await add_type(people)
    created = await people.admin.api.post(
        "/api/v1/auth/keys", json={"name": "worker", "scopes": ["tasks:work"]}
    )
    assert created.status_code == 201, created.text
    worker = TaskWorkerClient(await harness.client(created.json()["key"]))
    wait = 300 if has_heartbeats else 60
    heartbeats = HeldPollRecorder(monkeypatch)
    poll = asyncio.create_task(
        worker.api.post(f"{TASKS}/claim", json=worker.poll(wait=wait), timeout=PATIENCE_SECONDS)
    )
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (await people.owner.api.get("/api/v1/workers")).json()["count"]:  # noqa: ASYNC110 - a commit
            await asyncio.sleep(0.02)
    if has_heartbeats:
        await heartbeats.wait(1)
    revoked = await people.admin.api.delete(f"/api/v1/auth/keys/{created.json()['id']}")
    assert revoked.status_code == 204, revoked.text
    ended = await poll
    assert ended.json() == {"tasks": [], "cancel": [], "drain": False}
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (again := await worker.api.post(f"{TASKS}/claim", json=worker.poll(wait=0.1))).is_success:
            pass
    assert_refused(again, 401, "unauthorized")


class BreakingConnection:
    """Connection to a gateway whose client may leave, or get no end of an answer."""

    def __init__(self, harness: GatewayHarness, key: str, *, loses_end: bool = False) -> None:
        self._harness = harness
        self._loses_end = loses_end
        bounds = cast("ConnectionBounds", None)  # of a client that is not counted
        self._holding = RequestHolding(
            bounds, "", ByteHolding(ByteBudget(1, share_bytes=1), "", lambda: None)
        )
        transport = httpx2.ASGITransport(self._answer)
        self.api = httpx2.AsyncClient(
            transport=transport, base_url="http://gateway", headers={"X-API-Key": key}
        )

    def leave(self) -> None:
        """Let the client close its connection."""
        self._holding.disconnect()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_before_end(message: Message) -> None:
            if self._loses_end and message["type"] == "http.response.body" and not message.get("more_body"):
                raise ConnectionResetError
            await send(message)

        await self._harness.app({**scope, "holding": self._holding}, receive, send_before_end)


async def test_a_poll_with_heartbeats_ends_with_its_client(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_type(people)
    monkeypatch.setattr(harness.gateway.task_hub._polls.places, "limit", 1)  # noqa: SLF001 - no setting has it
    heartbeats, connection = HeldPollRecorder(monkeypatch), BreakingConnection(harness, people.owner.key)
    held = hold_poll(TaskWorkerClient(connection.api))
    await heartbeats.wait(2)
    full = await people.owner.api.post(f"{TASKS}/claim", json=TaskWorkerClient(people.owner.api).poll())
    assert_refused(full, 503, "not-ready")
    connection.leave()
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert (await held).json()["tasks"] == []
    await start(people)
    assert len(await TaskWorkerClient(people.owner.api).claim()) == 1


async def test_a_repeated_poll_gets_the_tasks_of_an_answer_that_broke_off_after_heartbeats(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_type(people)
    monkeypatch.setattr(harness.gateway.task_hub._polls.places, "limit", 1)  # noqa: SLF001 - no setting has it
    heartbeats = HeldPollRecorder(monkeypatch)
    connection = BreakingConnection(harness, people.owner.key, loses_end=True)
    worker = TaskWorkerClient(people.owner.api)
    body = worker.poll(wait=300)
    broken = asyncio.create_task(connection.api.post(f"{TASKS}/claim", json=body, timeout=PATIENCE_SECONDS))
    await heartbeats.wait(2)
    await start(people)
    with pytest.raises(ConnectionResetError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await broken
    (task,) = await worker.claim(request_id=body["requestId"])
    assert await worker.complete(task) == "ok"


async def test_a_task_of_a_quiet_organization_is_claimed_before_a_look_and_found_by_it_after_an_error(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    claim, read_news = TaskClaims.claim, TaskClaims.read_news

    async def fail_first(self: TaskClaims, *arguments: Any) -> Claim:  # noqa: ANN401 - those of `claim`
        calls.append("claim")
        if len(calls) == 1:
            raise DatabaseUnavailable
        return await claim(self, *arguments)

    async def note_look(self: TaskClaims, *arguments: Any) -> OrganizationNews:  # noqa: ANN401 - those of `read_news`
        calls.append("look")
        return await read_news(self, *arguments)

    await add_type(people)
    # Nothing else notifies this gateway, so one look has to find the task.
    broker = LocalBroker(channel=uuid4().hex)
    hub = PollService(broker, TaskStore(harness.gateway.database))
    organization_id = people.owner.user.organization_id
    waiting = asyncio.create_task(_claim_apart(hub, organization_id, 1))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (polls := hub._polls.get(organization_id)) or polls._new or not polls.is_quiet:  # noqa: ASYNC110, SLF001 - it sets no event
            await asyncio.sleep(0.02)
    polls.likely_queue = "acme/resize@1.2.0#default"
    monkeypatch.setattr(TaskClaims, "claim", fail_first)
    monkeypatch.setattr(TaskClaims, "read_news", note_look)
    await start(people)
    await wait_for_tasks(people.owner, 1)
    hub.serve(organization_id)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert len(await waiting) == 1
    assert calls[:3] == ["claim", "look", "claim"]
    await hub.close()
    await broker.close()


async def test_an_open_poll_keeps_no_worker_of_another_organization_present(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, stranger = people.owner, people.stranger
    for person, worker_id in ((owner, "w_1"), (stranger, "w_1"), (stranger, "w_2")):
        await TaskWorkerClient(person.api, id=worker_id).claim(wait=0)
    statement = text(
        "UPDATE task_worker SET last_seen_at = last_seen_at - :passed WHERE organization_id IN (:one, :other)"
    )
    values = {
        "passed": 3_600 * SECOND,
        "one": owner.user.organization_id,
        "other": stranger.user.organization_id,
    }
    await harness.gateway.database.transaction(lambda connection: connection.execute(statement, values))
    presence = TaskWorkerPresence(harness.gateway.database)
    presence.note_open_poll(owner.user.organization_id, "w_1")
    presence.note_open_poll(stranger.user.organization_id, "w_2")
    await presence.flush()
    shown = [(await person.api.get("/api/v1/workers")).json()["workers"] for person in (owner, stranger)]
    assert [{one["id"]: one["present"] for one in workers} for workers in shown] == [
        {"w_1": True},
        {"w_1": False, "w_2": True},
    ]


# ── places and time of runs ─────────────────────────────────────────────────────────────────────────────────


def limited_graph(**settings: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {**custom_graph(), "settings": settings}


async def pass_time(harness: GatewayHarness, execution_id: str, seconds: float) -> None:
    """Let so many seconds pass for a waiting run and its tasks, whose leases are renewed meanwhile, and sweep."""
    values = {"passed": int(seconds * SECOND), "execution_id": execution_id}
    times = ("check_at", "claimed_at", "deadline_at", "due_at")
    of_tasks = ", ".join(f"{name} = {name} - :passed" for name in times)

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(
            text(f"UPDATE task SET {of_tasks} WHERE execution_id = :execution_id"), values
        )
        await connection.execute(
            text(
                "UPDATE execution SET updated_at = updated_at - :passed"
                " WHERE id = :execution_id AND status = 'waiting'"
            ),
            values,
        )

    await harness.gateway.database.transaction(work)
    await harness.gateway.task_hub.sweep()


async def read_remaining_seconds(harness: GatewayHarness, execution_id: str) -> float:
    """Return the rest of the timeout of a run that waits."""
    async with harness.gateway.database.read() as connection:
        remaining = await connection.scalar(
            text("SELECT deadline_at FROM execution WHERE id = :id AND status = 'waiting'"),
            {"id": execution_id},
        )
    return cast("float", remaining) / SECOND


async def wait_until_waiting(person: UserClient, execution_id: str) -> None:
    async with asyncio.timeout(20):
        while (await get_json(person, f"/{execution_id}"))["status"] != "waiting":  # noqa: ASYNC110 - another process's commit
            await asyncio.sleep(0.02)


@pytest.mark.every_database
async def test_a_run_keeps_its_place_until_its_task_has_ended(people: OrganizationUsers) -> None:
    await add_type(people)
    worker = TaskWorkerClient(people.owner.api)
    graph = limited_graph(concurrency={"limit": 1})
    graph["nodes"].append({"id": "ask", "nodeId": "human-input", "config": {"title": "Go on?"}})
    graph["connections"].append({"source": "work", "target": "ask"})
    workflow_id = await people.owner.create(**graph)
    first = await execute_workflow(people.owner, workflow_id)
    (task,) = await worker.claim()
    await wait_until_waiting(people.owner, first)
    second = await execute_workflow(people.owner, workflow_id)
    why = await get_json(people.owner, f"/{second}/why")
    assert "waiting-for-slot" in str(why), why
    result = await worker.send(task, "fail", error={"code": "x", "message": "y"}, retry={"afterSeconds": 60})
    assert result["status"] == "ok"
    assert (await worker.claim(wait=0)) == []
    assert (await people.owner.api.post(f"{TASKS}/{task['id']}/retry")).status_code == 200
    (task,) = await worker.claim()
    assert await worker.complete(task) == "ok"
    # The question of the first run occupies no place.
    (other,) = await worker.claim()
    assert other["executionId"] == second


@pytest.mark.every_database
async def test_the_timeout_of_a_run_counts_while_a_worker_has_its_task(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people)
    worker = TaskWorkerClient(people.owner.api)
    execution_id = await start(people, limited_graph(timeout=100))
    await wait_until_waiting(people.owner, execution_id)
    await pass_time(harness, execution_id, 10_000)
    assert await read_remaining_seconds(harness, execution_id) > 90
    (task,) = await worker.claim()
    assert await worker.report() == []
    await pass_time(harness, execution_id, 60)
    later = {"error": {"code": "x", "message": "y"}, "retry": {"afterSeconds": 500}}
    assert (await worker.send(task, "fail", **later))["status"] == "ok"
    assert 30 < await read_remaining_seconds(harness, execution_id) < 40
    await pass_time(harness, execution_id, 500)
    (task,) = await worker.claim()
    shown = await show_task(people.owner, task["id"])
    assert (shown["state"], shown["attempt"]) == ("leased", 2)
    await pass_time(harness, execution_id, 41)
    ended = await wait_until_ended(people.owner, execution_id)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "timeout")
    assert (await show_task(people.owner, task["id"]))["state"] == "cancel_requested"
    assert [result["status"] for result in await worker.report()] == ["cancelled"]


@pytest.mark.every_database
async def test_tasks_at_once_use_the_time_of_their_run_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await add_type(people)
    worker = TaskWorkerClient(people.owner.api)
    graph = limited_graph(timeout=100)
    graph["nodes"].append({"id": "beside", "nodeId": "acme/resize", "config": {"image": "b.png"}})
    graph["connections"].append({"source": "start", "target": "beside"})
    execution_id = await start(people, graph)
    tasks = [*await worker.claim(limit=2)]
    while len(tasks) < 2:
        tasks += await worker.claim(limit=2)
    await wait_until_waiting(people.owner, execution_id)
    await worker.report()
    await pass_time(harness, execution_id, 30)
    for task in tasks:
        later = {"error": {"code": "x", "message": "y"}, "retry": {"afterSeconds": 500}}
        assert (await worker.send(task, "fail", **later))["status"] == "ok"
    assert 60 < await read_remaining_seconds(harness, execution_id) < 71
