"""Versions over HTTP: numbered without gaps, never changed, compared and put back."""

import asyncio
import re
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from models.workflow import Workflow, WorkflowVersion
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
    wait_until_after,
)
from tests.integration.second_gateway import run_second_gateway

WORKFLOWS = "/api/v1/workflows"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
NO_NUMBERS = ["0", "3", "-1", "01", "1_0", "v1", "current2", "999999999", "9" * 64]


async def take(person: UserClient, workflow_id: str, tag: str, **fields: str) -> httpx2.Response:
    body = {"versionTag": tag, **fields}
    return await person.api.post(f"{WORKFLOWS}/{workflow_id}/versions", json=body)


async def change(person: UserClient, workflow_id: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    response = await person.api.put(f"{WORKFLOWS}/{workflow_id}", json=fields)
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


async def read(person: UserClient, path: str) -> Any:  # noqa: ANN401 - any JSON value
    response = await person.api.get(f"{WORKFLOWS}/{path}")
    assert response.status_code == 200, response.text
    return response.json()


async def read_app_id(harness: GatewayHarness, workflow_id: str) -> str | None:
    async with harness.gateway.database.read() as connection:
        row = await connection.execute(select(col(Workflow.app_id)).where(col(Workflow.id) == workflow_id))
        stored: str | None = row.scalar_one()
        return stored


# ── taken ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_versions_are_taken_and_listed_as_the_contract_says(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    description = "Added retry logic to S3 upload node"
    taken = await take(people.owner, workflow_id, " v2.1.0 ", description=description)
    assert taken.status_code == 201
    assert taken.json() == {"workflowId": workflow_id, "version": 2, "versionTag": "v2.1.0"}
    assert taken.headers["ETag"] == '"2"'
    await take(people.admin, workflow_id, "v3")
    listed = await read(people.owner, f"{workflow_id}/versions")
    assert (listed["workflowId"], listed["currentVersion"]) == (workflow_id, 3)
    assert all(TIME.fullmatch(version.pop("createdAt")) for version in listed["versions"])
    owner, admin = people.owner.user.id, people.admin.user.id
    assert listed["versions"] == [
        {"version": 1, "versionTag": "v1.0.0", "description": "Initial version", "createdBy": owner},
        {"version": 2, "versionTag": "v2.1.0", "description": description, "createdBy": owner},
        {"version": 3, "versionTag": "v3", "description": "", "createdBy": admin},
    ]
    some = await read(people.owner, f"{workflow_id}/versions?limit=1&offset=1")
    assert [version["version"] for version in some["versions"]] == [2]
    for query in ("limit=0", "limit=1001", "offset=-1", "limit=x"):
        response = await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}/versions?{query}")
        assert_refused(response, 400, "invalid-query")


async def test_nothing_else_moves_a_workflow_s_version(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    assert (await change(people.owner, workflow_id, name="New", nodes=[TRIGGER], connections=[]))[
        "version"
    ] == 1
    await take(people.owner, workflow_id, "v2")
    restored = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/versions/1/restore")
    assert restored.json()["version"] == 2


async def test_a_version_that_makes_no_sense_is_refused(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    bodies: list[tuple[dict[str, object], str]] = [
        ({}, "versionTag"),
        ({"versionTag": " "}, "versionTag"),
        ({"versionTag": None}, "versionTag"),
        ({"versionTag": "a\nb"}, "versionTag"),
        ({"versionTag": "x" * 65}, "versionTag"),
        ({"versionTag": "x", "description": "x" * 5_001}, "description"),
    ]
    for body, path in bodies:
        response = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/versions", json=body)
        assert_refused(response, 422, "validation-failed")
        assert [detail["path"] for detail in response.json()["error"]["details"]] == [path]


async def test_a_tag_names_one_version_of_a_workflow(people: OrganizationUsers) -> None:
    first, second = await people.owner.create(), await people.owner.create()
    assert (await take(people.owner, first, "same")).status_code == 201
    assert (await take(people.owner, second, "same")).status_code == 201
    for tag in ("same", "v1.0.0"):
        assert_refused(await take(people.owner, first, tag), 409, "version-tag-taken")
    assert (await read(people.owner, f"{first}/versions"))["currentVersion"] == 2


async def test_versions_taken_at_once_get_different_numbers_without_gaps(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create()
    versions = f"{WORKFLOWS}/{workflow_id}/versions"
    async with run_second_gateway(harness) as client, client(people.owner) as other:
        apis = [people.owner.api, other] * 15
        tags = [f"tag {number % 25}" for number in range(30)]
        answers = await asyncio.gather(
            *(api.post(versions, json={"versionTag": tag}) for api, tag in zip(apis, tags, strict=True))
        )
    taken = [answer.json()["version"] for answer in answers if answer.status_code == 201]
    assert sorted(taken) == list(range(2, 27))
    assert [answer.status_code for answer in answers if answer.status_code != 201] == [409] * 5
    listed = await read(people.owner, f"{workflow_id}/versions")
    assert [version["version"] for version in listed["versions"]] == list(range(1, 27))
    assert listed["currentVersion"] == 26


async def test_there_is_an_end_to_versions(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.limits.VERSIONS", 2)
    workflow_id = await people.owner.create()
    assert (await take(people.owner, workflow_id, "last")).status_code == 201
    assert_refused(await take(people.owner, workflow_id, "more"), 409, "too-many-versions")


# ── looked at ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_version_shows_the_workflow_as_it_was(people: OrganizationUsers) -> None:
    fields = {"description": "Old", "settings": {"timeout": 60}, "config": {"appId": "app_1"}}
    workflow_id = await people.owner.create(name="Before", **fields, **GRAPH)
    before = await people.owner.workflow(workflow_id)
    await take(people.owner, workflow_id, "v2", description="Kept")
    await change(people.owner, workflow_id, name="After", nodes=[TRIGGER], connections=[])
    shown = await read(people.owner, f"{workflow_id}/versions/2")
    assert shown["snapshot"] == {
        key: before[key] for key in ("name", "description", "nodes", "connections", "config", "settings")
    }
    assert (shown["version"], shown["versionTag"], shown["description"]) == (2, "v2", "Kept")
    assert (shown["workflowId"], shown["createdBy"]) == (workflow_id, people.owner.user.id)
    for method in ("PUT", "PATCH", "DELETE", "POST"):
        response = await people.owner.api.request(method, f"{WORKFLOWS}/{workflow_id}/versions/2")
        assert_refused(response, 405, "method-not-allowed")


async def test_a_version_that_is_none_is_not_found(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    await take(people.owner, workflow_id, "v2")
    versions = f"{WORKFLOWS}/{workflow_id}/versions"
    for number in NO_NUMBERS:
        for path in (number, f"{number}/diff/1", f"1/diff/{number}"):
            assert_refused(await people.owner.api.get(f"{versions}/{path}"), 404, "not-found")
        assert_refused(await people.owner.api.post(f"{versions}/{number}/restore"), 404, "not-found")


async def test_two_versions_are_compared_by_additions_removals_and_changes(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(name="Before", settings={"maxRetries": 1}, **GRAPH)
    last = {"id": "last", "nodeId": "log", "label": "Last", "config": {"message": "x"}}
    edges = [{"sourceNodeId": "start", "targetNodeId": "last"}]
    moved = TRIGGER | {"position": {"x": 7, "y": 8}}
    changed = STEP | {"config": {"values": {"a": 2}}}
    await change(people.owner, workflow_id, nodes=[moved, changed, last], connections=edges)
    await take(people.owner, workflow_id, "v2")
    await change(people.owner, workflow_id, name="After", settings={"maxRetries": None, "timeout": 60})

    difference = await read(people.owner, f"{workflow_id}/versions/1/diff/2")
    assert (difference["workflowId"], difference["from"], difference["to"]) == (workflow_id, 1, 2)
    assert [node["id"] for node in difference["nodes"]["added"]] == ["last"]
    assert difference["nodes"]["removed"] == []
    by_id = {node["id"]: node for node in difference["nodes"]["changed"]}
    assert by_id["start"]["changes"] == {}
    assert by_id["start"]["position"]["after"] == {"x": 7, "y": 8}
    config = {"before": {"values": {"a": 1}}, "after": {"values": {"a": 2}}}
    assert by_id["step"]["changes"] == {"config": config}
    added, removed = difference["connections"]["added"], difference["connections"]["removed"]
    assert [edge["targetNodeId"] for edge in added] == ["last"]
    assert [edge["targetNodeId"] for edge in removed] == ["step"]
    assert (difference["settings"], difference["config"], difference["fields"]) == ({}, {}, {})

    since = await read(people.owner, f"{workflow_id}/versions/2/diff/current")
    assert (since["from"], since["to"], since["nodes"]["changed"]) == (2, "current", [])
    assert since["settings"] == {
        "maxRetries": {"before": 1, "after": 3},
        "timeout": {"before": 3600, "after": 60},
    }
    assert since["fields"] == {"name": {"before": "Before", "after": "After"}}


# ── put back ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_restored_version_is_the_workflow_s_present_state(people: OrganizationUsers) -> None:
    fields = {"description": "Old", "settings": {"timeout": 60}, "config": {"appId": "app_1"}, "tags": ["a"]}
    workflow_id = await people.owner.create(name="Before", **fields, **GRAPH)
    before = await people.owner.workflow(workflow_id)
    await wait_until_after(before["updatedAt"])
    await change(
        people.owner,
        workflow_id,
        name="After",
        description="New",
        settings={"timeout": 5, "maxRetries": 1},
        config={"appId": None},
        tags=["b"],
        nodes=[TRIGGER],
        connections=[],
    )
    restore = f"{WORKFLOWS}/{workflow_id}/versions/1/restore"
    assert_refused(
        await people.owner.api.post(restore, headers={"If-Match": '"1"'}), 412, "precondition-failed"
    )
    response = await people.owner.api.post(restore, headers={"If-Match": '"2"'})
    assert response.status_code == 200, response.text
    assert response.headers["ETag"] == '"3"'
    restored = response.json()
    assert restored == await people.owner.workflow(workflow_id)
    assert {key for key in before if before[key] != restored[key]} == {"tags", "updatedAt"}
    again = await people.owner.api.post(restore)
    assert (again.headers["ETag"], again.json()) == ('"3"', restored)


async def test_an_active_workflow_gets_no_version_back_that_can_t_run(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    await change(people.owner, workflow_id, **GRAPH)
    status = f"{WORKFLOWS}/{workflow_id}/status"
    await people.owner.api.put(status, json={"status": "active"})
    restore = f"{WORKFLOWS}/{workflow_id}/versions/1/restore"
    assert_refused(await people.owner.api.post(restore), 422, "validation-failed")
    assert len((await people.owner.workflow(workflow_id))["nodes"]) == 2
    await people.owner.api.put(status, json={"status": "draft"})
    assert (await people.owner.api.post(restore)).json()["nodes"] == []


async def test_a_restored_draft_keeps_node_types_that_the_catalog_has_lost(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    shown = await read(people.owner, f"{workflow_id}/versions/1")

    async def lose_a_node_type(connection: AsyncConnection) -> None:
        nodes = [{**node, "type": "lost"} if node["id"] == "step" else node for node in stored["nodes"]]
        await connection.execute(
            update(WorkflowVersion)
            .where(col(WorkflowVersion.workflow_id) == workflow_id)
            .values(snapshot={**stored, "nodes": nodes})
        )

    async with harness.gateway.database.read() as connection:
        snapshot = select(col(WorkflowVersion.snapshot)).where(
            col(WorkflowVersion.workflow_id) == workflow_id
        )
        stored = (await connection.execute(snapshot)).scalar_one()
    await harness.gateway.database.transaction(lose_a_node_type)
    restored = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/versions/1/restore")
    assert restored.status_code == 200, restored.text
    assert [node["nodeId"] for node in restored.json()["nodes"]] == ["manual", "lost"]
    difference = await read(people.owner, f"{workflow_id}/versions/1/diff/current")
    assert difference["nodes"] == {"added": [], "removed": [], "changed": []}
    assert [node["nodeId"] for node in shown["snapshot"]["nodes"]] == ["manual", "set"]
    refusal = await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "active"})
    assert_refused(refusal, 422, "validation-failed")
    assert refusal.json()["error"]["details"][0]["code"] == "unknown-node-type"


# ── permissions ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_readers_see_versions_and_only_owner_and_admins_take_and_restore_them(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    versions = f"{WORKFLOWS}/{workflow_id}/versions"
    reading = [versions, f"{versions}/1", f"{versions}/1/diff/current"]

    async def writing(person: UserClient) -> list[httpx2.Response]:
        return [await take(person, workflow_id, "mine"), await person.api.post(f"{versions}/1/restore")]

    for person in (people.colleague, people.stranger):
        for response in [await person.api.get(path) for path in reading] + await writing(person):
            assert_refused(response, 404, "not-found")
    shared = {"userId": people.colleague.user.id}
    await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/share", json=shared)
    for path in reading:
        assert (await people.colleague.api.get(path)).status_code == 200
    for response in await writing(people.colleague):
        assert_refused(response, 403, "not-owner")
    assert [response.status_code for response in await writing(people.admin)] == [201, 200]


# ── the app that a workflow belongs to ──────────────────────────────────────────────────────────────────────


async def test_the_app_of_a_workflow_can_be_searched_by_however_its_config_changes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(config={"appId": "app_1", "mine": 1}, nodes=[TRIGGER])
    assert await read_app_id(harness, workflow_id) == "app_1"
    assert await read_app_id(harness, await people.owner.create(config={"mine": 1})) is None
    await change(
        people.owner, workflow_id, config={"appId": "app-2"}, nodes=[TRIGGER, STEP], connections=[EDGE]
    )
    assert await read_app_id(harness, workflow_id) == "app-2"
    await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/versions/1/restore")
    assert await read_app_id(harness, workflow_id) == "app_1"
    assert (await change(people.owner, workflow_id, config={"appId": None}))["config"] == {"mine": 1}
    assert await read_app_id(harness, workflow_id) is None


async def test_an_app_that_is_none_is_refused(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(config={"appId": "app_1"})
    for value in ("", "a b", "a.b", "ü", "x" * 65, 1, True, ["app_1"], {"a": 1}):
        body = {"name": "x", "config": {"appId": value}}
        for response in (
            await people.owner.api.post(WORKFLOWS, json=body),
            await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json=body),
        ):
            assert_refused(response, 422, "validation-failed")
            assert [detail["path"] for detail in response.json()["error"]["details"]] == ["config.appId"]
    assert (await people.owner.workflow(workflow_id))["config"] == {"appId": "app_1"}
