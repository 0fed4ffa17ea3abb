"""`Prefer: wait=N`: requests that start a run are answered with its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest

from engine.run_records import RunError, RunStatus
from gateway.executions import long_poll
from messages.broker_connection import connect_broker
from models.access import KeyScope
from models.ended_execution import EndedExecution
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, UserClient
from tests.integration.test_gateway_enqueue import QUEUE, create_active_workflow, create_token
from tests.integration.test_gateway_executions import (
    ClaimedTestRun,
    as_client_of,
    claim_run,
    get_json,
    list_ids,
    run_second_gateway,
    spin_until,
)

WORKFLOWS = "/api/v1/workflows"
APPLIED = "preference-applied"
INPUTS = {"triggerInputs": {"x": 1}}


async def post(
    person: UserClient,
    path: str,
    prefer: str,
    body: Mapping[str, Any] = INPUTS,
    **headers: str,
) -> httpx2.Response:
    sent = {"Prefer": prefer, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await person.api.post(f"{WORKFLOWS}/{path}", json=body, headers=sent)


async def claim_awaited(
    harness: GatewayHarness, person: UserClient, workflow_id: str
) -> tuple[str, ClaimedTestRun]:
    """Claim the one run of a workflow, once its request waits for its end."""
    await spin_until(lambda: harness.gateway.waiting.polls.taken > 0)
    (execution_id,) = await list_ids(person, f"workflow_id={workflow_id}")
    return execution_id, await claim_run(harness, execution_id)


@pytest.mark.parametrize("end", [RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED])
async def test_a_run_that_ends_in_time_is_answered_with_its_outcome(
    harness: GatewayHarness, people: OrganizationUsers, end: RunStatus
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    asking = asyncio.create_task(post(people.owner, f"{workflow_id}/execute", "respond-async, wait=90"))
    execution_id, run = await claim_awaited(harness, people.owner, workflow_id)
    error = RunError("node-failed", "It broke", "step") if end is RunStatus.FAILED else None
    await run.write(run.span("start", output={"body": {"x": 1}}), end=end, error=error)
    answer = await asking
    progress = await get_json(people.owner, f"/{execution_id}/progress")
    assert (answer.status_code, progress["status"]) == (200, end.value)
    assert answer.json() == {"executionId": execution_id} | {
        name: progress[name] for name in ("status", "outputs", "error")
    }
    assert answer.headers[APPLIED] == "wait=60"
    assert answer.headers["location"].endswith(f"/api/v1/executions/{execution_id}")


async def test_a_run_that_has_not_ended_is_answered_as_without_the_preference(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    at_once = await post(people.owner, f"{workflow_id}/execute", "wait=0")
    assert (at_once.status_code, list(at_once.json()), at_once.headers[APPLIED]) == (
        *(201, ["executionId"]),
        "wait=0",
    )
    # No failure of the wait may cost the client the id of its run.
    monkeypatch.setattr(harness.gateway.waiting.polls, "limit", 0)
    busy = await post(people.owner, f"{workflow_id}/execute", "wait=30")
    assert (busy.status_code, list(busy.json())) == (201, ["executionId"])
    assert "location" in busy.headers


@pytest.mark.parametrize("prefer", ["wait", "wait=-1", "wait=1.5", "wait=x", "handling=lenient", "await=5"])
async def test_a_preference_without_a_whole_number_is_ignored(people: OrganizationUsers, prefer: str) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    answer = await post(people.owner, f"{workflow_id}/execute", prefer)
    assert (answer.status_code, APPLIED in answer.headers) == (201, False)


async def test_a_key_that_may_not_read_gets_no_outcome(harness: GatewayHarness) -> None:
    organization = await harness.organization()
    owner = await harness.person(organization)
    workflow_id = await owner.create(**GRAPH)
    runner = await harness.person(organization, scopes=[KeyScope.WORKFLOWS_EXECUTE])
    await owner.api.post(f"{WORKFLOWS}/{workflow_id}/share", json={"userId": runner.user.id})
    answer = await post(runner, f"{workflow_id}/execute", "wait=30")
    assert (answer.status_code, APPLIED in answer.headers) == (201, False)


async def test_a_repeated_request_waits_for_the_run_of_the_first(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    first = await people.owner.api.post(
        f"{WORKFLOWS}/{workflow_id}/execute", json=INPUTS, headers={"Idempotency-Key": "once"}
    )
    asking = asyncio.create_task(
        post(people.owner, f"{workflow_id}/execute", 'wait="30"', Idempotency_Key="once")
    )
    execution_id, run = await claim_awaited(harness, people.owner, workflow_id)
    await run.complete()
    answer = await asking
    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (200, "true")
    assert (answer.json()["executionId"], answer.json()["status"]) == (execution_id, "completed")
    assert first.json() == {"executionId": execution_id}


async def test_an_outcome_that_comes_with_the_notification_is_not_read(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_poll, "LOOK_SECONDS", 3_600.0)
    workflow_id = await people.owner.create(**GRAPH)
    async with run_second_gateway(harness, await connect_broker(None)) as there:
        owner = await as_client_of(people.owner, there)
        asking = asyncio.create_task(post(owner, f"{workflow_id}/execute", "wait=30"))
        execution_id, run = await claim_awaited(there, owner, workflow_id)
        await run.complete(is_told=False)
        # Unlike the rows, so that the answer tells where it is from.
        ended = EndedExecution(execution_id, "failed", 1, 50, '{"code":"a"}', (("start", '"told"'),))
        await run.broker.publish({execution_id: run.broker.channel}, [ended])
        body = (await asking).json()
    assert (body["status"], body["outputs"], body["error"]) == ("failed", {"start": "told"}, {"code": "a"})


async def test_large_outputs_are_left_out(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    asking = asyncio.create_task(post(people.owner, f"{workflow_id}/execute", "wait=30"))
    _, run = await claim_awaited(harness, people.owner, workflow_id)
    await run.write(run.span("start", output="x" * 1_000_000), end=RunStatus.COMPLETED)
    body = (await asking).json()
    assert (body["status"], body["outputs"], body["outputsOmitted"]) == ("completed", {}, True)


async def test_a_client_that_hangs_up_changes_nothing(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    asking = asyncio.create_task(post(people.owner, f"{workflow_id}/execute", "wait=30"))
    execution_id, run = await claim_awaited(harness, people.owner, workflow_id)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await run.complete()
    assert (await get_json(people.owner, f"/{execution_id}/progress"))["status"] == "completed"


async def test_a_message_is_answered_with_the_outcome_to_keys_but_not_to_tokens(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, **QUEUE)
    asking = asyncio.create_task(post(people.owner, f"{workflow_id}/enqueue", "wait=30", {"message": 1}))
    execution_id, run = await claim_awaited(harness, people.owner, workflow_id)
    await run.complete()
    answer = await asking
    progress = await get_json(people.owner, f"/{execution_id}/progress")
    assert answer.json() == {"executionId": execution_id, "trigger_type": "queue"} | {
        name: progress[name] for name in ("status", "outputs", "error")
    }
    token = await create_token(harness, people.owner, workflow_id)
    nobody = await harness.client(None)
    sent = await nobody.post(
        f"{WORKFLOWS}/{workflow_id}/enqueue?key={token}", json={"message": 1}, headers={"Prefer": "wait=30"}
    )
    assert (sent.status_code, set(sent.json())) == (201, {"executionId", "trigger_type"})
    assert APPLIED not in sent.headers
