"""Deliveries, dead letters and trigger tokens: lists, and redrives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlmodel import col

from gateway.http import limits
from gateway.ingest import delivery_log
from messages.token_buckets import BucketRate
from models.execution import Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.ingest import Delivery
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.test_gateway_enqueue import QUEUE, WORKFLOWS, create_active_workflow, read_rows


@pytest.fixture
async def workflow_id(people: OrganizationUsers) -> str:
    return await create_active_workflow(people.owner)


async def enqueue(person: UserClient, workflow_id: str, message: Any = 1) -> str:  # noqa: ANN401 - any JSON value
    response = await person.api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={"message": message})
    assert response.status_code == 201, response.text
    execution_id: str = response.json()["executionId"]
    return execution_id


async def get_json(person: UserClient, path: str) -> dict[str, Any]:
    response = await person.api.get(path)
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


async def fail(harness: GatewayHarness, *execution_ids: str) -> None:
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(
            update(Execution)
            .where(col(Execution.id).in_(execution_ids))
            .values(
                status=ExecutionStatus.FAILED,
                ended_at=col(Execution.created_at),
                error={"code": "no", "message": "No"},
            )
        )
    )


async def read_trigger(harness: GatewayHarness, execution_id: str) -> Any:  # noqa: ANN401 - any JSON value
    async with harness.gateway.database.read() as connection:
        statement = select(col(ExecutionData.trigger)).where(col(ExecutionData.execution_id) == execution_id)
        return json.loads(await connection.scalar(statement) or "null")


def remember_nothing(harness: GatewayHarness, person: UserClient, workflow_id: str) -> None:
    """Let the gateway reload a workflow from its rows."""
    harness.gateway.workflows.forget(person.user.organization_id, workflow_id)


# ── deliveries ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_deliveries_are_listed_for_readers_of_the_workflow(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    execution_id = await enqueue(people.owner, workflow_id)
    await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={"message": 1, "priority": 999})
    # Senders that may not see the workflow leave no delivery.
    for person, named in (
        (people.stranger, workflow_id),
        (people.colleague, workflow_id),
        (people.owner, "wf_no"),
    ):
        answer = await person.api.post(f"{WORKFLOWS}/{named}/enqueue", json={"message": 1})
        assert_refused(answer, 404, "not-found")
    assert [len(await read_rows(harness, Delivery, workflow_id=one)) for one in (workflow_id, "wf_no")] == [
        2,
        0,
    ]
    path = f"{WORKFLOWS}/{workflow_id}/deliveries"
    shown = await get_json(people.owner, path)
    assert shown["count"] == 2
    wrong, right = shown["deliveries"]
    assert (wrong["outcome"], wrong["status"], wrong["reason"]["code"]) == (
        "rejected",
        422,
        "validation-failed",
    )
    assert (right["outcome"], right["executionId"], right["reason"]) == ("accepted", execution_id, None)
    only = await get_json(people.admin, f"{path}?outcome=accepted&route=enqueue")
    assert [one["id"] for one in only["deliveries"]] == [right["id"]]
    assert await get_json(people.owner, f"/api/v1/deliveries/{right['id']}") == right
    for person in (people.stranger, people.colleague):
        assert_refused(await person.api.get(path), 404, "not-found")
        assert_refused(await person.api.get(f"/api/v1/deliveries/{right['id']}"), 404, "not-found")
        assert_refused(await person.api.post(f"/api/v1/deliveries/{right['id']}/redrive"), 404, "not-found")


async def test_every_parsed_delivery_can_be_redriven(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    api = people.owner.api
    first = await enqueue(people.owner, workflow_id, {"order": 7})
    await api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "draft"})
    remember_nothing(harness, people.owner, workflow_id)
    url = f"{WORKFLOWS}/{workflow_id}/enqueue"
    assert_refused(await api.post(url, json={"message": {"order": 8}}), 409, "workflow-not-active")
    assert_refused(await api.post(url, json={"message": 1, "source": 1}), 422, "validation-failed")
    await api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "active"})
    shown = (await get_json(people.owner, f"{WORKFLOWS}/{workflow_id}/deliveries"))["deliveries"]
    not_understood, not_active, accepted = (one["id"] for one in shown)

    for delivery_id, order in ((accepted, 7), (not_active, 8)):
        path = f"/api/v1/deliveries/{delivery_id}/redrive"
        answers = [
            await api.post(path, headers={"Idempotency-Key": f"again {order}"[:5] + str(order)})
            for _ in range(2)
        ]
        assert [answer.status_code for answer in answers] == [201, 201], answers[0].text
        assert answers[0].json() == answers[1].json()
        again = answers[0].json()["executionId"]
        assert again != first
        assert (await read_trigger(harness, again))["message"] == {"order": order}
    assert_refused(await api.post(f"/api/v1/deliveries/{not_understood}/redrive"), 409, "not-redrivable")
    latest = (await get_json(people.owner, f"{WORKFLOWS}/{workflow_id}/deliveries?outcome=accepted"))[
        "deliveries"
    ]
    assert [one["redrivenFrom"] for one in latest] == [not_active, accepted, None]


@pytest.mark.every_database
async def test_a_list_of_deliveries_is_run_once_more_once(
    people: OrganizationUsers, workflow_id: str
) -> None:
    for number in range(3):
        await enqueue(people.owner, workflow_id, number)
    path = f"{WORKFLOWS}/{workflow_id}/deliveries/redrive"
    dry = (await people.owner.api.post(path, json={"dryRun": True})).json()
    assert (dry["matched"], dry["redriven"]) == (3, 0)
    assert_refused(await people.owner.api.post(path, json={"dryrun": True}), 422, "validation-failed")
    first = (await people.owner.api.post(path, json={"limit": 2})).json()
    assert (first["matched"], first["redriven"], first["remaining"]) == (3, 2, 1)
    second = (await people.owner.api.post(path, json={})).json()
    assert (second["matched"], second["redriven"], second["remaining"]) == (1, 1, 0)
    assert (await people.owner.api.post(path, json={})).json()["matched"] == 0


async def test_a_delivery_that_cannot_be_redriven_does_not_block_others(
    people: OrganizationUsers, workflow_id: str
) -> None:
    api = people.owner.api
    url = f"{WORKFLOWS}/{workflow_id}"
    await api.post(f"{url}/enqueue-batch", json={"messages": [{"message": 1}]})
    await api.post(f"{url}/enqueue", json={"message": 1, "priority": 999})
    for _ in range(2):
        await api.post(f"{url}/enqueue", json={"message": 1, "deduplicationId": "a"})
    answer = (await api.post(f"{url}/deliveries/redrive", json={"limit": 1})).json()
    assert (answer["matched"], answer["redriven"], answer["remaining"]) == (1, 1, 0)
    only = {"outcome": "duplicate"}
    assert (await api.post(f"{url}/deliveries/redrive", json=only)).json()["redriven"] == 1


async def test_stored_samples_of_refused_requests_are_bounded(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "KEPT_REFUSED_CHARACTERS", 20_000)
    monkeypatch.setattr(delivery_log, "KEPT", BucketRate(per_second=0.001, burst=15_000))
    api = people.owner.api
    await api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "draft"})
    for size in (10_000, 10_000, 10, 30_000):
        answer = await api.post(f"{WORKFLOWS}/{workflow_id}/enqueue", json={"message": "x" * size})
        assert_refused(answer, 409, "workflow-not-active")
    kept = sorted(
        len(one.payload or "") // 10 for one in await read_rows(harness, Delivery, workflow_id=workflow_id)
    )
    assert kept == [0, 0, 5, 1_004]


# ── dead letters ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_dead_letter_waits_until_it_is_redriven_or_purged(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    first, second, third, fine = [await enqueue(people.owner, workflow_id, number) for number in range(4)]
    await fail(harness, first, second, third)
    path = f"{WORKFLOWS}/{workflow_id}/dead-letters"
    shown = await get_json(people.owner, path)
    assert [one["executionId"] for one in shown["deadLetters"]] == [first, second, third]
    assert shown["deadLetters"][0]["given"]["message"] == 0
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/visibility", json={"isPublic": True})
    assert_refused(await people.colleague.api.post(f"{path}/purge", json={}), 403, "not-owner")
    assert shown["deadLetters"][0]["error"]["code"] == "no"
    assert_refused(await people.stranger.api.get(path), 404, "not-found")

    again = (await people.owner.api.post(f"{path}/redrive", json={"executionIds": [second, fine]})).json()
    assert (again["matched"], again["redriven"]) == (1, 1)
    assert (await read_trigger(harness, again["executionIds"][0]))["message"] == 1
    misspelt = await people.owner.api.post(f"{path}/purge", json={"executionId": first})
    assert_refused(misspelt, 422, "validation-failed")
    for act in ("redrive", "purge"):
        nothing = await people.owner.api.post(f"{path}/{act}", json={"executionIds": []})
        assert_refused(nothing, 422, "validation-failed")
    purged = (await people.owner.api.post(f"{path}/purge", json={"executionIds": [first]})).json()
    assert purged == {"matched": 1, "purged": 1, "remaining": 0}
    left = await get_json(people.owner, path)
    assert [one["executionId"] for one in left["deadLetters"]] == [third]
    # A dead letter that can't be redriven now stays, and leaves no other record.
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "paused"})
    none = (await people.owner.api.post(f"{path}/redrive", json={})).json()
    assert (none["matched"], none["failed"]) == (1, 1)
    assert (await get_json(people.owner, f"{WORKFLOWS}/{workflow_id}/deliveries?outcome=rejected"))[
        "count"
    ] == 0
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "active"})
    # A run that fails again is a dead letter again; a resumed one is not.
    await fail(harness, *again["executionIds"])
    assert (await get_json(people.owner, path))["count"] == 2
    assert (await people.owner.api.post(f"/api/v1/executions/{third}/resume")).status_code == 201
    left = await get_json(people.owner, path)
    assert [one["executionId"] for one in left["deadLetters"]] == again["executionIds"]


async def test_values_too_large_for_a_list_are_omitted(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    large, small = [await enqueue(people.owner, workflow_id, "x" * size) for size in (200_000, 1)]
    await fail(harness, large, small)
    path = f"{WORKFLOWS}/{workflow_id}/dead-letters"
    shown = (await get_json(people.owner, path))["deadLetters"]
    assert [one["given"] and one["given"]["message"] for one in shown] == [None, "x"]
    again = (await people.owner.api.post(f"{path}/redrive", json={"executionIds": [large]})).json()
    assert len((await read_trigger(harness, again["executionIds"][0]))["message"]) == 200_000


# ── the token ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_token_of_a_workflow_is_shown_once_and_replaced(
    people: OrganizationUsers, harness: GatewayHarness, workflow_id: str
) -> None:
    path = f"{WORKFLOWS}/{workflow_id}/trigger-token"
    nobody = await harness.client()
    old = (await people.owner.api.post(path, json={})).json()
    assert old["token"] in old["urls"]["api"]
    assert old["urls"]["api"].endswith(f"/api/v1/workflows/{workflow_id}/enqueue?key={old['token']}")
    address = (await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}/inbound-address")).text
    assert old["token"] not in address
    assert old["hint"] in address

    new = (await people.owner.api.post(path, json={"overlapSeconds": 60})).json()
    url = f"{WORKFLOWS}/{workflow_id}/enqueue?key="
    for token in (old["token"], new["token"]):
        assert (await nobody.post(url + token, json={"message": 1})).status_code == 201
    assert (await people.owner.api.delete(path)).status_code == 204
    harness.gateway.sender_authenticator._kept._items.clear()  # noqa: SLF001 - it would be a second until it is asked for again
    for token in (old["token"], new["token"]):
        assert_refused(await nobody.post(url + token, json={"message": 1}), 401, "unauthorized")
    assert_refused(await people.stranger.api.post(path, json={}), 404, "not-found")


@pytest.mark.every_database
async def test_no_more_tokens_are_good_at_once_than_may_be(
    people: OrganizationUsers, workflow_id: str
) -> None:
    path = f"{WORKFLOWS}/{workflow_id}/trigger-token"
    hints = [
        (await people.owner.api.post(path, json={"overlapSeconds": 60})).json()["hint"]
        for _ in range(limits.TRIGGER_TOKENS + 2)
    ]
    tokens = (await get_json(people.owner, f"{WORKFLOWS}/{workflow_id}/inbound-address"))["tokens"]
    assert [one["hint"] for one in tokens] == hints[:1:-1]


@pytest.mark.every_database
async def test_tokens_of_all_workflows_are_listed_for_their_readers_without_secrets(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**QUEUE, name="Listed tokens")
    path = f"{WORKFLOWS}/{workflow_id}/trigger-token"
    old = (await people.owner.api.post(path, json={})).json()
    new = (await people.owner.api.post(path, json={"overlapSeconds": 600})).json()

    async def list_tokens(user: UserClient) -> list[dict[str, Any]]:
        answer = await user.api.get("/api/v1/auth/trigger-tokens?limit=100")
        assert old["token"] not in answer.text
        assert new["token"] not in answer.text
        listed = answer.json()
        # The number too is that of the tokens that the user may see.
        assert listed["count"] == len(listed["tokens"])
        return [one for one in listed["tokens"] if one["workflowId"] == workflow_id]

    newest, replaced = await list_tokens(people.owner)
    assert (newest["id"], newest["hint"], newest["expiresAt"]) == (new["id"], new["hint"], None)
    assert (replaced["id"], replaced["hint"]) == (old["id"], old["hint"])
    assert replaced["expiresAt"]
    assert (newest["workflowName"], newest["triggerKind"]) == ("Listed tokens", "queue")
    assert newest["ownerId"] == newest["userId"] == people.owner.user.id
    assert await list_tokens(people.admin) == [newest, replaced]
    for user in (people.colleague, people.stranger):
        assert await list_tokens(user) == []
    first = (await people.owner.api.get("/api/v1/auth/trigger-tokens?limit=1")).json()
    assert [one["id"] for one in first["tokens"]] == [new["id"]]
    assert first["count"] >= 2

    await people.owner.api.delete(path)
    assert await list_tokens(people.owner) == []


async def test_only_writers_of_a_workflow_create_its_token(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**QUEUE)
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/visibility", json={"isPublic": True})
    path = f"{WORKFLOWS}/{workflow_id}/trigger-token"
    assert_refused(await people.colleague.api.post(path, json={}), 403, "not-owner")
    assert_refused(await people.colleague.api.delete(path), 403, "not-owner")
    manual = await people.owner.create(**GRAPH)
    made = (await people.owner.api.post(f"{WORKFLOWS}/{manual}/trigger-token", json={})).json()
    assert made["urls"] == {}
