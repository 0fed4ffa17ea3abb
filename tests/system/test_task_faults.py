"""Faults around tasks: every task acts under one key, ends its node once, and no fault loses it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from tests.custom_types import custom_graph, custom_type
from tests.system import proxy
from tests.system.client import RetryingClient
from tests.system.harness import SystemUnderTest, on_all_deployments
from tests.system.wait_conditions import wait_until

TYPE = "acme/fault"
LEASE_SECONDS = 10
pytestmark = [pytest.mark.timeout(120), on_all_deployments]


@dataclass
class TaskLedger:
    """Effects of tasks outside of the server: key, attempt and lease of each."""

    effects: list[tuple[str, int, str]] = field(default_factory=list)

    def write(self, task: dict[str, Any]) -> None:
        self.effects.append((task["idempotencyKey"], task["attempt"], task["lease"]))

    def of(self, execution_id: str) -> list[tuple[str, int, str]]:
        return [effect for effect in self.effects if effect[0].startswith(f"{execution_id}:")]


@dataclass
class FaultyWorker:
    """Worker of one type, which tests stop at any point."""

    client: RetryingClient
    type_name: str
    id: str = field(default_factory=lambda: f"w_{uuid4().hex}")
    claimed: str | None = None
    held: set[str] = field(default_factory=set)

    def poll(self, *, limit: int = 1, wait: float = 10, request_id: str | None = None) -> dict[str, Any]:
        return {
            "worker": {"id": self.id},
            "requestId": request_id or uuid4().hex,
            "max": limit,
            "wait": wait,
            "types": [{"type": self.type_name, "version": "1.0.0"}],
        }

    async def claim(self, within: float = 40, **options: Any) -> dict[str, Any]:  # noqa: ANN401 - options of `poll`
        """Poll until there is a task."""
        async with asyncio.timeout(within):
            while True:
                body = self.poll(**options)
                answer = await self.client.answer("POST", "/tasks/claim", body)
                assert answer.status_code == httpx2.codes.OK, answer.text
                self.claimed = body["requestId"]
                if tasks := answer.json()["tasks"]:
                    task: dict[str, Any] = tasks[0]
                    self.held.add(task["id"])
                    return task

    async def report(self, task: dict[str, Any], kind: str, **fields: Any) -> str:  # noqa: ANN401 - fields of an item
        """Report one item until it is answered; returns its status."""
        body: dict[str, Any] = {
            "worker": self.id,
            "claimed": self.claimed,
            "held": sorted(self.held),
            "items": [{"id": task["id"], "lease": task["lease"], "kind": kind, **fields}],
        }
        answer = await self.client.answer("POST", "/tasks/report", body)
        assert answer.status_code == httpx2.codes.OK, answer.text
        status: str = answer.json()["results"][0]["status"]
        return status

    async def complete(self, task: dict[str, Any]) -> str:
        return await self.report(task, "complete", output={"url": task["lease"]})


async def add_workflow(client: RetryingClient) -> tuple[str, str]:
    """Create a workflow with one custom node of a type of its own; returns its id and the type."""
    type_name = f"acme/x{uuid4().hex}"
    document = custom_type(type=type_name, version="1.0.0", task={"leaseSeconds": LEASE_SECONDS})
    added = await client.answer("POST", "/workflow-nodes", document)
    assert added.status_code in {httpx2.codes.OK, httpx2.codes.CREATED}, added.text
    graph = custom_graph(type_name=type_name)
    return await client.create({"name": "A workflow with a task", **graph}), type_name


async def start(client: RetryingClient) -> tuple[str, FaultyWorker]:
    workflow_id, type_name = await add_workflow(client)
    return await client.execute(workflow_id), FaultyWorker(client, type_name)


Case = Callable[[RetryingClient, TaskLedger], Awaitable[None]]


async def _dies_before_its_first_report(client: RetryingClient, ledger: TaskLedger) -> None:
    run, worker = await start(client)
    task = await worker.claim()
    heir = FaultyWorker(client, worker.type_name)
    again = await heir.claim()
    assert (again["id"], again["idempotencyKey"]) == (task["id"], task["idempotencyKey"])
    assert again["lease"] != task["lease"]
    ledger.write(again)
    assert await heir.complete(again) == "ok"
    await _ends(client, run, again)


async def _dies_after_its_effect(client: RetryingClient, ledger: TaskLedger) -> None:
    run, worker = await start(client)
    task = await worker.claim()
    assert await worker.report(task, "heartbeat", checkpoint={"step": 1}) == "ok"
    ledger.write(task)
    begun_at = asyncio.get_running_loop().time()
    heir = FaultyWorker(client, worker.type_name)
    again = await heir.claim()
    assert asyncio.get_running_loop().time() - begun_at > LEASE_SECONDS - 1
    assert (again["attempt"], again["checkpoint"]) == (2, {"step": 1})
    ledger.write(again)
    assert await heir.complete(again) == "ok"
    await _ends(client, run, again)
    assert len({key for key, _, _ in ledger.of(run)}) == 1
    assert len(ledger.of(run)) == 2


async def _dies_after_its_last_report(client: RetryingClient, ledger: TaskLedger) -> None:
    run, worker = await start(client)
    task = await worker.claim()
    ledger.write(task)
    assert await worker.complete(task) == "ok"
    await _ends(client, run, task)
    with pytest.raises(TimeoutError):
        await FaultyWorker(client, worker.type_name).claim(within=LEASE_SECONDS + 2, wait=3)
    assert len(ledger.of(run)) == 1


async def _wakes_up_after_its_lease(client: RetryingClient, ledger: TaskLedger) -> None:
    run, worker = await start(client)
    frozen = await worker.claim()
    assert await worker.report(frozen, "heartbeat") == "ok"
    heir = FaultyWorker(client, worker.type_name)
    task = await heir.claim()
    assert await worker.report(frozen, "heartbeat") == "lost"
    assert await worker.complete(frozen) == "lost"
    assert await worker.report(frozen, "fail", error={"code": "late"}) == "lost"
    ledger.write(task)
    assert await heir.complete(task) == "ok"
    assert await worker.complete(frozen) == "lost"
    await _ends(client, run, task)


async def _races_with_a_cancellation(client: RetryingClient, ledger: TaskLedger) -> None:
    for _ in range(6):
        run, worker = await start(client)
        task = await worker.claim()
        ledger.write(task)
        status, _ = await asyncio.gather(worker.complete(task), client.ask(run, "cancel"))
        ended = await client.end(run)
        # Both may be in time: the output was stored, and the run was cancelled before it went on with it.
        assert (status, ended.status) in {
            ("ok", "completed"),
            ("cancelled", "cancelled"),
            ("ok", "cancelled"),
        }
        shown = (await client.answer("GET", f"/tasks/{task['id']}")).json()
        assert shown["state"] == ("completed" if status == "ok" else "cancelled")


async def _ends(client: RetryingClient, run: str, task: dict[str, Any]) -> None:
    """Check that a run ends with the output of this attempt."""
    ended = await client.end(run)
    assert (ended.status, ended.outputs["work"]) == ("completed", {"url": task["lease"]})


async def test_workers_die_and_freeze_at_any_point_of_a_task(
    deployment: SystemUnderTest, client: RetryingClient
) -> None:
    assert deployment.gateway.is_alive
    cases: list[Case] = [
        _dies_before_its_first_report,
        _dies_after_its_effect,
        _dies_after_its_last_report,
        _wakes_up_after_its_lease,
        _races_with_a_cancellation,
    ]
    await asyncio.gather(*(case(client, TaskLedger()) for case in cases))


async def test_a_claim_and_a_report_survive_the_gateway_that_has_not_answered_them(
    deployment: SystemUnderTest, client: RetryingClient
) -> None:
    run, worker = await start(client)
    body = worker.poll(request_id=f"claim-{uuid4().hex}")
    await _send_and_kill(deployment, "/tasks/claim", body, body["requestId"], worker, "leased")
    task = await worker.claim(request_id=body["requestId"])
    report = {
        "worker": worker.id,
        "claimed": body["requestId"],
        "held": [task["id"]],
        "items": [
            {"id": task["id"], "lease": task["lease"], "kind": "complete", "output": {"url": task["lease"]}}
        ],
    }
    await _send_and_kill(deployment, "/tasks/report", report, task["lease"], worker, "completed")
    assert await worker.complete(task) == "repeated"
    await _ends(client, run, task)


async def _send_and_kill(
    deployment: SystemUnderTest,
    path: str,
    body: dict[str, Any],
    mark: str,
    worker: FaultyWorker,
    state: str,
) -> None:
    """Send a request, and kill the gateway once it has committed the effect and before its answer arrives."""

    async def is_committed() -> bool:
        rows = await deployment.records.fetch(f"SELECT state FROM task WHERE type = '{worker.type_name}'")
        return [row[0] for row in rows] == [state]

    async with proxy.run_proxy(deployment.url) as way:
        hurried = RetryingClient(way.in_front_of(deployment.url))
        way.keep_answers(mark.encode())
        request = asyncio.create_task(hurried.send("POST", path, body))
        await wait_until(is_committed)
        await way.kept_one()
        deployment.gateway.kill()
        way.cut()
        with pytest.raises(httpx2.TransportError):
            await request
        await hurried.close()
    await deployment.revive()


async def test_executors_that_die_around_the_commit_leave_one_task_for_each_node(
    deployment: SystemUnderTest, client: RetryingClient
) -> None:
    workflow_id, type_name = await add_workflow(client)
    async with deployment.supervised():
        runs = await asyncio.gather(*(client.execute(workflow_id) for _ in range(8)))
        for executor in deployment.workers:
            executor.kill()
        worker, keys = FaultyWorker(client, type_name), Counter[str]()
        while sum(keys.values()) < len(runs):
            task = await worker.claim(limit=1)
            if await worker.complete(task) == "ok":
                keys[task["idempotencyKey"]] += 1
        ended = await asyncio.gather(*(client.end(run) for run in runs))
    assert {one.status for one in ended} == {"completed"}
    assert keys == Counter({f"{run}:work:0": 1 for run in runs})
    rows = await deployment.records.fetch(
        f"SELECT execution_id, node_id FROM task WHERE type = '{type_name}'"
    )
    assert len(rows) == len({tuple(row) for row in rows}) == len(runs)
