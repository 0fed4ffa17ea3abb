"""Messages for queue triggers: each is ingested once, as a run and a delivery in one commit; and refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from sqlmodel import SQLModel, col

from engine.values import Json
from gateway.executions import acceptance
from gateway.http import sender as senders
from journal.store import InboundRequest, IngestResult
from models import ids, sender_tokens
from models.deployment import Deployment, ObservedState
from models.execution import DELAYED_TARGET, Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.ingest import Delivery, SenderToken, SenderTokenKind
from models.lifecycle_policy import StoppedReason
from tests.integration.deployed_workflows import deploy_with_pod
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    STEP,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)

WORKFLOWS = "/api/v1/workflows"
QUEUE = {"nodes": [{"id": "start", "nodeId": "queue-trigger", "label": "Start"}, STEP], "connections": [EDGE]}


@pytest.fixture
async def workflow_id(people: OrganizationUsers) -> str:
    return await create_active_workflow(people.owner)


async def create_active_workflow(person: UserClient, **graph: Any) -> str:  # noqa: ANN401 - any JSON value
    workflow_id = await person.create(**(graph or QUEUE))
    response = await person.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "active"})
    assert response.status_code == 200, response.text
    return workflow_id


async def read_rows(harness: GatewayHarness, table: type[SQLModel], **equal: Any) -> list[Any]:  # noqa: ANN401 - rows of any table
    conditions = [getattr(table, name) == value for name, value in equal.items()]
    async with harness.gateway.database.read() as connection:
        return list((await connection.execute(select(table).where(*conditions))).all())


async def create_token(
    harness: GatewayHarness,
    person: UserClient,
    workflow_id: str,
    kind: SenderTokenKind = SenderTokenKind.TRIGGER,
) -> str:
    token = sender_tokens.new_token(kind)
    row = SenderToken(
        id=ids.new_id("tok"),
        kind=kind,
        organization_id=person.user.organization_id,
        shard=person.user.shard,
        workflow_id=workflow_id if kind is SenderTokenKind.TRIGGER else None,
        user_id=person.user.id,
        hash=sender_tokens.hash_token(token),
        hint=sender_tokens.visible_suffix(token),
        created_at=datetime.now(UTC),
    )
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(insert(SenderToken).values(row.model_dump()))
    )
    return token


@pytest.mark.parametrize(
    ("body", "given"),
    [
        ({"message": {"a": 1}, "priority": 7.0, "source": "shop"}, ({"a": 1}, 7, "shop")),
        ({"data": [1], "priority": -100}, ([1], -100, "rest_api")),
        ({"orderId": 1, "priority": 5}, ({"orderId": 1, "priority": 5}, 0, "rest_api")),
        ({"message": None, "data": 1}, (1, 0, "rest_api")),
        ({"message": None, "priority": 5}, ({"message": None, "priority": 5}, 0, "rest_api")),
        ([1, 2], ([1, 2], 0, "rest_api")),
        ("a text", ("a text", 0, "rest_api")),
    ],
)
async def test_the_input_of_a_run_is_its_message(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    body: Json,
    given: tuple[Json, int, str],
) -> None:
    response = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json=body)
    assert response.status_code == 201, response.text
    execution_id = response.json()["executionId"]
    assert response.json() == {"executionId": execution_id, "trigger_type": "queue"}
    assert response.headers["Location"].endswith(f"/api/v1/executions/{execution_id}")
    (data,) = await read_rows(harness, ExecutionData, execution_id=execution_id)
    assert json.loads(data.trigger) == dict(zip(("message", "priority", "source"), given, strict=True))
    (run,) = await read_rows(harness, Execution, id=execution_id)
    assert (run.trigger_type, run.user_id) == ("queue", people.owner.user.id)
    (delivery,) = await read_rows(harness, Delivery, workflow_id=workflow_id)
    assert (delivery.outcome, delivery.status, delivery.execution_id) == ("accepted", 201, execution_id)
    assert delivery.route == "enqueue"
    assert delivery.sender.startswith("api-key:key_")
    assert delivery.content_bytes == len(response.request.content)


async def test_a_repeated_request_gets_the_first_answer(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    url = f"{WORKFLOWS}/{workflow_id}/enqueue"
    body = {"message": 1, "deduplicationId": "once"}
    answers = await asyncio.gather(*(people.owner.api.post(url, json=body) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert len(await read_rows(harness, Execution, workflow_id=workflow_id)) == 1
    deliveries = await read_rows(harness, Delivery, workflow_id=workflow_id)
    assert sorted(one.outcome for one in deliveries) == ["accepted", *["duplicate"] * 49]
    assert {one.execution_id for one in deliveries} == {answers[0].json()["executionId"]}

    headers = {"Idempotency-Key": "mine"}
    first = await people.owner.api.post(url, json={"message": 1}, headers=headers)
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "draft"})
    again = await people.owner.api.post(url, json={"message": 1}, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert_refused(
        await people.owner.api.post(url, json={"message": 2}, headers=headers), 422, "idempotency-mismatch"
    )


async def test_a_message_is_known_by_its_own_name_and_by_that_of_its_request(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    async def sent(key: str, name: str) -> Any:  # noqa: ANN401 - a response
        body = {"message": 1, "deduplicationId": name}
        url = f"{WORKFLOWS}/{workflow_id}/enqueue"
        return await people.owner.api.post(url, json=body, headers={"Idempotency-Key": key})

    first, again, renamed = [await sent(key, "a") for key in ("1", "1", "2")]
    assert first.json() == again.json() == renamed.json()
    assert_refused(await sent("1", "b"), 422, "idempotency-mismatch")
    assert (await sent("3", "b")).json() != first.json()
    assert len(await read_rows(harness, Execution, workflow_id=workflow_id)) == 2


async def test_large_messages_share_no_commit(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[int]] = []
    ingest = harness.gateway.store.ingest

    async def counted(batch: Sequence[InboundRequest]) -> Sequence[IngestResult]:
        sizes.append([len(run.trigger) for arrival in batch for run in arrival.runs])
        return await ingest(batch)

    monkeypatch.setattr(harness.gateway.store, "ingest", counted)
    url = f"{WORKFLOWS}/{workflow_id}/enqueue"
    body = {"message": "x" * 900_000}
    await asyncio.gather(*(people.owner.api.post(url, json=body) for _ in range(16)))
    assert sum(map(len, sizes)) == 16
    assert max(map(sum, sizes)) <= acceptance.MAX_CHARACTERS


async def test_a_message_waits_for_its_time(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    url = f"{WORKFLOWS}/{workflow_id}/enqueue"
    response = await people.owner.api.post(url, json={"message": 1, "delaySeconds": 60, "priority": 3})
    execution_id = response.json()["executionId"]
    (run,) = await read_rows(harness, Execution, id=execution_id)
    assert (run.status, run.target) == (ExecutionStatus.WAITING, DELAYED_TARGET)
    assert timedelta(seconds=50) < run.due_at - run.created_at < timedelta(seconds=61)
    assert run.rank == pytest.approx(run.due_at.timestamp() * 1e6 - 3 * 60e6, abs=10)
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(
            update(Execution).where(col(Execution.id) == execution_id).values(due_at=run.created_at)
        )
    )
    assert await harness.gateway.store.promote_due() == 1
    (run,) = await read_rows(harness, Execution, id=execution_id)
    assert (run.status, run.target, run.due_at) == (ExecutionStatus.PENDING, "shared", None)


async def test_a_message_for_later_wakes_no_pods(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    url = f"{WORKFLOWS}/{workflow_id}/enqueue"
    await people.owner.api.post(url, json={"message": 1})
    (stored,) = await read_rows(harness, Execution, workflow_id=workflow_id)
    asleep = {"replicas": 0, "stopped_reason": StoppedReason.IDLE, "observed": ObservedState.STOPPED}
    await deploy_with_pod(
        harness, people.owner, workflow_id, definition_hash=stored.definition_hash, **asleep
    )
    harness.gateway.workflows.forget(people.owner.user.organization_id, workflow_id)
    batch = {"messages": [{"message": 2, "delaySeconds": 60}]}
    for path, body, replicas in (
        (url, {"message": 2, "delaySeconds": 60}, 0),
        (f"{url}-batch", batch, 0),
        (url, {"message": 2}, 1),
    ):
        assert (await people.owner.api.post(path, json=body)).status_code == 201
        await harness.gateway.activation._wakes.drain()  # noqa: SLF001 - nothing else waits for them
        (deployment,) = await read_rows(harness, Deployment, workflow_id=workflow_id)
        assert deployment.replicas == replicas
    runs = await read_rows(harness, Execution, workflow_id=workflow_id, assigned_deployment_id=workflow_id)
    assert sorted(run.target for run in runs) == sorted([DELAYED_TARGET, DELAYED_TARGET, workflow_id])


async def test_a_revoked_token_is_good_for_a_second_after_it_was_asked_for_and_no_longer(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{WORKFLOWS}/{workflow_id}/enqueue?key={await create_token(harness, people.owner, workflow_id)}"
    nobody = await harness.client()
    clock = iter([10.0])
    monkeypatch.setattr(senders, "monotonic", lambda: next(clock, 10.9))
    assert (await nobody.post(url, json={"message": 1})).status_code == 201
    await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}/trigger-token")
    assert (await nobody.post(url, json={"message": 1})).status_code == 201
    monkeypatch.setattr(senders, "monotonic", lambda: 11.0)
    assert_refused(await nobody.post(url, json={"message": 1}), 401, "unauthorized")


async def test_a_token_shares_keys_with_those_before_and_after_it_and_with_no_user(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    url = f"{WORKFLOWS}/{workflow_id}/enqueue"
    nobody, headers = await harness.client(), {"Idempotency-Key": "1"}
    own = await people.owner.api.post(url, json={"message": 1}, headers=headers)
    first, second = [
        await nobody.post(
            f"{url}?key={await create_token(harness, people.owner, workflow_id)}",
            json={"message": 2},
            headers=headers,
        )
        for _ in range(2)
    ]
    assert own.json()["executionId"] != first.json()["executionId"] == second.json()["executionId"]
    assert second.headers["Idempotent-Replayed"] == "true"


@pytest.mark.every_database
async def test_a_trigger_token_opens_its_own_workflow_and_nothing_else(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    other = await create_active_workflow(people.owner)
    token = await create_token(harness, people.owner, workflow_id)
    event_token = await create_token(harness, people.owner, workflow_id, SenderTokenKind.EVENT)
    nobody = await harness.client()

    response = await nobody.post(f"{WORKFLOWS}/{workflow_id}/enqueue?key={token}", json={"message": 1})
    assert response.status_code == 201, response.text
    (run,) = await read_rows(harness, Execution, workflow_id=workflow_id)
    assert run.user_id == people.owner.user.id
    (delivery,) = await read_rows(harness, Delivery, workflow_id=workflow_id)
    assert delivery.sender.startswith("trigger-token:tok_")

    telling = {"message": 1, "callbackUrl": "https://example.com/told"}
    path = f"{WORKFLOWS}/{workflow_id}/enqueue?key={token}"
    assert_refused(await nobody.post(path, json=telling), 422, "validation-failed")

    def url(workflow_id: str, key: str) -> str:
        return f"{WORKFLOWS}/{workflow_id}/enqueue?key={key}"

    for address in (
        url(other, token),
        url(workflow_id, event_token),
        url(workflow_id, token[:-1] + "_"),
        url(workflow_id, f"{token}&key={token}"),
        url(workflow_id, people.owner.key),
        f"{WORKFLOWS}/{workflow_id}/enqueue",
    ):
        assert_refused(await nobody.post(address, json={"message": 1}), 401, "unauthorized")
    assert_refused(await nobody.get(f"{WORKFLOWS}/{workflow_id}?key={token}"), 401, "unauthorized")
    assert_refused(await nobody.get(f"{WORKFLOWS}", headers={"X-API-Key": token}), 401, "unauthorized")


async def test_refused_requests_are_recorded_with_a_reason(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    url = f"{WORKFLOWS}/{workflow_id}/enqueue"
    wrong = {"message": 1, "priority": 101, "delaySeconds": -1, "notBefore": "2030-01-01T00:00:00"}
    assert_refused(await people.owner.api.post(url, json=wrong), 422, "validation-failed")
    for field in ({"priority": 1.5}, {"deduplicationId": ""}, {"deduplicationId": "x" * 256}):
        assert_refused(
            await people.owner.api.post(url, json={"message": 1, **field}), 422, "validation-failed"
        )
    assert_refused(
        await people.owner.api.post(url, content=b"{", headers={"Content-Type": "application/json"}),
        400,
        "malformed-json",
    )
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "paused"})
    assert_refused(await people.owner.api.post(url, json={"message": 1}), 409, "workflow-paused")
    batch = await people.owner.api.post(f"{url}-batch", json={"messages": [{"message": 1}]})
    assert_refused(batch, 409, "workflow-paused")
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "draft"})
    assert_refused(await people.owner.api.post(url, json={"message": 1}), 409, "workflow-not-active")
    deliveries = await read_rows(harness, Delivery, workflow_id=workflow_id)
    assert [one.outcome for one in deliveries] == ["rejected"] * 8
    assert {one.reason.partition(":")[0] for one in deliveries} == {
        "validation-failed",
        "malformed-json",
        "workflow-paused",
        "workflow-not-active",
    }
    assert_refused(await people.stranger.api.post(url, json={"message": 1}), 404, "not-found")
    manual = await create_active_workflow(people.owner, **GRAPH)
    assert_refused(
        await people.owner.api.post(f"{WORKFLOWS}/{manual}/enqueue", json={}), 422, "no-queue-trigger"
    )


async def test_a_batch_is_ingested_except_invalid_and_repeated_messages(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    url = f"{WORKFLOWS}/{workflow_id}/enqueue-batch"
    api = people.owner.api
    known = (
        await api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={"data": 0, "deduplicationId": "a"})
    ).json()
    messages = [
        {"message": 1, "deduplicationId": "a"},
        {"message": 2, "deduplicationId": "b", "priority": 9},
        {"data": 3, "priority": 101},
        {"message": 4, "deduplicationId": "b"},
        {"priority": 1},
        {"data": 5, "delaySeconds": 60},
    ]
    response = await api.post(url, json={"messages": messages})
    assert response.status_code == 201, response.text
    shape = response.json()
    results = shape.pop("results")
    assert shape == {"accepted": 2, "duplicates": 2, "refused": 2}
    assert [one["status"] for one in results] == [
        *("duplicate", "accepted", "refused", "duplicate", "refused", "accepted")
    ]
    assert results[0]["executionId"] == known["executionId"]
    assert results[3]["executionId"] == results[1]["executionId"]
    assert [results[place]["error"]["details"][0]["path"] for place in (2, 4)] == [
        "messages.2.priority",
        "messages.4.message",
    ]
    runs = await read_rows(harness, Execution, workflow_id=workflow_id)
    assert sorted(run.status for run in runs) == ["pending", "pending", "waiting"]
    deliveries = await read_rows(harness, Delivery, workflow_id=workflow_id)
    assert sorted(one.route for one in deliveries) == ["enqueue", "enqueue-batch"]
    brought = {one.route: json.loads(one.answer or "[]") for one in deliveries}
    assert sorted(brought["enqueue-batch"]) == sorted(results[place]["executionId"] for place in (1, 5))


@pytest.mark.every_database
async def test_a_batch_that_is_sent_again_is_answered_with_the_same_runs(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    url = f"{WORKFLOWS}/{workflow_id}/enqueue-batch"
    body = {"messages": [{"message": number} for number in range(1_000)]}
    headers = {"Idempotency-Key": "batch"}
    first, second = await asyncio.gather(
        *(people.owner.api.post(url, json=body, headers=headers) for _ in range(2))
    )
    assert first.json() == second.json()
    assert first.json()["accepted"] == 1_000
    made = {one["executionId"] for one in first.json()["results"]}
    assert len(made) == 1_000
    assert len(await read_rows(harness, Execution, workflow_id=workflow_id)) == 1_000
    for other in (body["messages"][:-1], [*body["messages"][:-1], {"message": 0, "deduplicationId": "new"}]):
        answer = await people.owner.api.post(url, json={"messages": other}, headers=headers)
        assert_refused(answer, 422, "idempotency-mismatch")
    assert len(await read_rows(harness, Execution, workflow_id=workflow_id)) == 1_000
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "paused"})
    third = await people.owner.api.post(url, json=body, headers=headers)
    assert third.json() == first.json()
    assert third.headers["Idempotent-Replayed"] == "true"
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "active"})
    too_many = {"messages": [*body["messages"], {"message": 0}]}
    assert_refused(await people.owner.api.post(url, json=too_many), 422, "validation-failed")
    assert_refused(await people.owner.api.post(url, json={"messages": [{}]}), 422, "validation-failed")
    assert_refused(await people.owner.api.post(url, json={"messages": []}), 422, "validation-failed")
