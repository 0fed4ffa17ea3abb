"""Sharing and visibility over HTTP: visible workflows, permitted operations, and revocation."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import httpx2
import pytest

from models.access import Organization
from tests.integration.gateway_harness import (
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.second_gateway import run_second_gateway

WORKFLOWS = "/api/v1/workflows"
EXECUTIONS = "/api/v1/executions"
PATIENCE_SECONDS = 60.0


async def share(person: UserClient, workflow_id: str, user_id: object) -> httpx2.Response:
    return await person.api.post(f"{WORKFLOWS}/{workflow_id}/share", json={"userId": user_id})


async def unshare(person: UserClient, workflow_id: str, user_id: str) -> httpx2.Response:
    return await person.api.delete(f"{WORKFLOWS}/{workflow_id}/share/{user_id}")


async def show_to(person: UserClient, workflow_id: str, **flags: object) -> httpx2.Response:
    return await person.api.put(f"{WORKFLOWS}/{workflow_id}/visibility", json=flags)


async def list_shares(person: UserClient, workflow_id: str) -> list[dict[str, Any]]:
    response = await person.api.get(f"{WORKFLOWS}/{workflow_id}/share")
    assert response.status_code == 200, response.text
    assert response.json()["workflowId"] == workflow_id
    found: list[dict[str, Any]] = response.json()["sharedWith"]
    return found


async def execute_workflow(api: httpx2.AsyncClient, workflow_id: str) -> httpx2.Response:
    return await api.post(f"{WORKFLOWS}/{workflow_id}/execute", json={})


# ── shared ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_workflow_is_shared_as_the_contract_says_once_however_often(
    people: OrganizationUsers,
) -> None:
    workflow_id, colleague = await people.owner.create(), people.colleague.user.id
    first = await share(people.owner, workflow_id, colleague)
    assert first.status_code == 200
    answer = {"message": "Workflow shared successfully", "workflowId": workflow_id, "userId": colleague}
    assert first.json() == answer
    (shared,) = await list_shares(people.owner, workflow_id)
    assert set(shared) == {"userId", "sharedAt"}
    again = await share(people.admin, workflow_id, colleague)
    assert (again.status_code, again.json(), again.headers["ETag"]) == (200, answer, first.headers["ETag"])
    assert await list_shares(people.owner, workflow_id) == [shared]
    assert (await people.owner.workflow(workflow_id))["sharedWith"] == [colleague]

    gone = await unshare(people.owner, workflow_id, colleague)
    assert (gone.status_code, gone.content) == (204, b"")
    assert await list_shares(people.owner, workflow_id) == []
    assert_refused(await unshare(people.owner, workflow_id, colleague), 404, "not-found")


async def test_a_workflow_is_shared_with_other_users_of_the_organisation_alone(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create()
    for user_id in (people.stranger.user.id, "user_nobody", "", "x" * 1_000):
        assert_refused(await share(people.owner, workflow_id, user_id), 404, "not-found")
    for person, user_id in (
        (people.owner, people.owner.user.id),
        (people.admin, people.admin.user.id),
        (people.admin, people.owner.user.id),
    ):
        response = await share(person, workflow_id, user_id)
        assert_refused(response, 422, "validation-failed")
        assert response.json()["error"]["details"][0]["path"] == "userId"
    for no_id in (None, 1, [people.colleague.user.id]):
        assert_refused(await share(people.owner, workflow_id, no_id), 422, "validation-failed")
    assert await list_shares(people.owner, workflow_id) == []


async def test_there_is_an_end_to_shares(people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.http.limits.SHARES", 1)
    workflow_id = await people.owner.create()
    for _ in range(2):
        assert (await share(people.owner, workflow_id, people.colleague.user.id)).status_code == 200
    assert_refused(await share(people.owner, workflow_id, people.admin.user.id), 409, "too-many-shares")


async def test_shares_and_edits_at_the_same_time_are_all_kept(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    user = people.owner.user
    organization = Organization(
        id=user.organization_id, shard=user.shard, name="An organisation", created_at=user.created_at
    )
    guests = [(await harness.person(organization)).user.id for _ in range(5)]
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    changes: list[Awaitable[httpx2.Response]] = [share(people.owner, workflow_id, user) for user in guests]
    changes += [people.owner.api.put(path, json={"config": {f"key{n}": n}}) for n in range(5)]
    changes.append(show_to(people.owner, workflow_id, isPublic=True))
    assert {answer.status_code for answer in await asyncio.gather(*changes)} == {200}
    shown = await people.owner.workflow(workflow_id)
    assert sorted(shown["sharedWith"]) == sorted(guests)
    assert [shown["config"][f"key{n}"] for n in range(5)] == list(range(5))
    assert shown["isPublic"]
    gone = await asyncio.gather(*(unshare(people.owner, workflow_id, guests[0]) for _ in range(3)))
    assert sorted(answer.status_code for answer in gone) == [204, 404, 404]
    assert sorted((await people.owner.workflow(workflow_id))["sharedWith"]) == sorted(guests[1:])


# ── permissions of a share ──────────────────────────────────────────────────────────────────────────────────


async def attempt_forbidden(person: UserClient, workflow_id: str, user_id: str) -> list[httpx2.Response]:
    """Attempt every operation that a share doesn't permit."""
    path = f"{WORKFLOWS}/{workflow_id}"
    return [
        await person.api.put(path, json={"name": "Taken over"}),
        await person.api.delete(path),
        await share(person, workflow_id, user_id),
        await share(person, workflow_id, "user_nobody"),
        await unshare(person, workflow_id, user_id),
        await unshare(person, workflow_id, person.user.id),
        await show_to(person, workflow_id, isPublic=True),
        await show_to(person, workflow_id, isTemplate=True),
        await show_to(person, workflow_id),
    ]


async def test_a_guest_reads_and_executes_and_neither_writes_nor_deletes_nor_shares(
    people: OrganizationUsers,
) -> None:
    workflow_id, guest = await people.owner.create(**GRAPH), people.colleague
    await share(people.owner, workflow_id, guest.user.id)
    assert (await guest.workflow(workflow_id))["id"] == workflow_id
    assert [one["userId"] for one in await list_shares(guest, workflow_id)] == [guest.user.id]
    started = await execute_workflow(guest.api, workflow_id)
    assert started.status_code == 201
    run = f"{EXECUTIONS}/{started.json()['executionId']}"
    assert (await guest.api.get(run)).status_code == 200
    before = await people.owner.workflow(workflow_id)
    for response in await attempt_forbidden(guest, workflow_id, people.admin.user.id):
        assert_refused(response, 403, "not-owner")
    assert await people.owner.workflow(workflow_id) == before


async def test_invisible_workflows_are_indistinguishable_from_missing_ones(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    for person in (people.colleague, people.stranger):
        assert_refused(await person.api.get(f"{WORKFLOWS}/{workflow_id}/share"), 404, "not-found")
        for response in await attempt_forbidden(person, workflow_id, people.admin.user.id):
            assert_refused(response, 404, "not-found")
            assert response.json()["error"]["message"] == "There is no such workflow"


async def test_an_ended_share_gives_no_access(people: OrganizationUsers) -> None:
    workflow_id, guest = await people.owner.create(**GRAPH), people.colleague
    await share(people.owner, workflow_id, guest.user.id)
    run = f"{EXECUTIONS}/{(await execute_workflow(guest.api, workflow_id)).json()['executionId']}"
    reading = [f"{WORKFLOWS}/{workflow_id}", f"{WORKFLOWS}/{workflow_id}/versions", run]
    reading += [f"{run}/spans", f"{run}/progress?wait=0"]
    for path in reading:
        assert (await guest.api.get(path)).status_code == 200
    await unshare(people.owner, workflow_id, guest.user.id)
    for path in reading:
        assert_refused(await guest.api.get(path), 404, "not-found")
    assert_refused(await execute_workflow(guest.api, workflow_id), 404, "not-found")
    assert (await guest.api.get(WORKFLOWS)).json()["count"] == 0
    assert (await guest.api.get(EXECUTIONS)).json()["count"] == 0


async def test_a_share_ends_at_other_gateways_too(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.executions.long_poll.VISIBLE_SECONDS", 0.2)
    workflow_id, guest = await people.owner.create(**GRAPH), people.colleague
    await share(people.owner, workflow_id, guest.user.id)
    async with run_second_gateway(harness) as client, client(guest) as api:
        started = await execute_workflow(api, workflow_id)
        assert started.status_code == 201
        spans = f"{EXECUTIONS}/{started.json()['executionId']}/spans"
        await unshare(people.owner, workflow_id, guest.user.id)
        assert_refused(await execute_workflow(api, workflow_id), 404, "not-found")
        assert_refused(await api.get(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (answer := await api.get(spans)).status_code == 200:  # noqa: ASYNC110 - another gateway forgets it without a word
                await asyncio.sleep(0.02)
        assert_refused(answer, 404, "not-found")


# ── visible ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_public_workflow_is_read_and_executed_by_the_organisation_until_it_is_private(
    people: OrganizationUsers,
) -> None:
    workflow_id, other = await people.owner.create(**GRAPH), people.colleague
    shown = await show_to(people.owner, workflow_id, isPublic=True)
    assert shown.status_code == 200
    assert (shown.json(), shown.headers["ETag"]) == (await people.owner.workflow(workflow_id), '"2"')
    assert shown.json()["isPublic"]
    assert (await show_to(people.owner, workflow_id, isPublic=True)).headers["ETag"] == '"2"'
    run = f"{EXECUTIONS}/{(await execute_workflow(other.api, workflow_id)).json()['executionId']}"
    assert (await other.api.get(f"{run}/spans")).status_code == 200
    for response in await attempt_forbidden(other, workflow_id, people.admin.user.id):
        assert_refused(response, 403, "not-owner")
    assert_refused(await people.stranger.api.get(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")

    assert not (await show_to(people.admin, workflow_id, isPublic=False)).json()["isPublic"]
    assert_refused(await other.api.get(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")
    assert_refused(await other.api.get(f"{run}/spans"), 404, "not-found")
    assert_refused(await execute_workflow(other.api, workflow_id), 404, "not-found")


async def test_only_admins_make_templates_and_take_them_back(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    assert_refused(
        await show_to(people.owner, workflow_id, isPublic=True, isTemplate=True), 403, "admin-required"
    )
    assert not (await people.owner.workflow(workflow_id))["isPublic"]
    assert (await show_to(people.owner, workflow_id, isTemplate=False)).status_code == 200
    assert (await show_to(people.admin, workflow_id, isTemplate=True)).json()["isTemplate"]
    assert_refused(await show_to(people.owner, workflow_id, isTemplate=False), 403, "admin-required")
    shown = (await show_to(people.owner, workflow_id, isPublic=True, isTemplate=True)).json()
    assert (shown["isPublic"], shown["isTemplate"]) == (True, True)
    assert (await show_to(people.owner, workflow_id)).json() == shown
    assert not (await show_to(people.admin, workflow_id, isTemplate=False)).json()["isTemplate"]
    for flags in ({"isPublic": 1}, {"isTemplate": "true"}, {"isPublik": False}, {"is_public": False}):
        assert_refused(await show_to(people.admin, workflow_id, **flags), 422, "validation-failed")
    assert (await people.owner.workflow(workflow_id))["isPublic"]


async def test_a_template_holds_no_credentials_and_shows_none_of_its_past(people: OrganizationUsers) -> None:
    config = {"url": "https://a.b", "headers": {"authorization": "Bearer sk-canary-0123456789abcdef"}}
    node = {"id": "call", "nodeId": "http-request", "config": config}
    workflow_id = await people.owner.create(nodes=[node])
    path = f"{WORKFLOWS}/{workflow_id}"
    response = await show_to(people.admin, workflow_id, isTemplate=True)
    assert_refused(response, 422, "validation-failed")
    (problem,) = response.json()["error"]["details"]
    assert (problem["path"], problem["code"]) == ("nodes.call.config.headers.authorization", "inline-secret")
    await people.owner.api.put(path, json={"nodes": []})
    assert (await show_to(people.admin, workflow_id, isTemplate=True)).status_code == 200
    for below in ("", "/versions/1", "/versions/1/diff/current", "/export"):
        seen = await people.colleague.api.get(f"{path}{below}")
        assert seen.status_code == 200
        assert "canary" not in seen.text
    assert_refused(await people.owner.api.put(path, json={"nodes": [node]}), 422, "validation-failed")
    assert_refused(await people.owner.api.post(f"{path}/versions/1/restore"), 422, "validation-failed")


async def test_a_stale_state_is_neither_shared_nor_shown(people: OrganizationUsers) -> None:
    workflow_id, colleague = await people.owner.create(nodes=[TRIGGER]), people.colleague.user.id
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json={"nodes": [TRIGGER, STEP]})
    path, stale = f"{WORKFLOWS}/{workflow_id}", {"If-Match": '"1"'}
    for response in (
        await people.owner.api.post(f"{path}/share", json={"userId": colleague}, headers=stale),
        await people.owner.api.put(f"{path}/visibility", json={"isPublic": True}, headers=stale),
    ):
        assert_refused(response, 412, "precondition-failed")
    assert_refused(await people.colleague.api.get(path), 404, "not-found")
