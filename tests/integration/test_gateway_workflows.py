"""Workflows over HTTP: endpoints of the contract, permissions, and repeated requests."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import httpx2
import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col
from starlette.routing import Route

from journal.store import AcceptanceVerdict, RunAcceptance
from models import ids
from models.database import Database
from models.execution import Execution
from models.execution_status import ExecutionStatus
from models.workflow import Workflow, WorkflowShare, WorkflowTag, WorkflowVersion
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

T = TypeVar("T")
WORKFLOWS = "/api/v1/workflows"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z")
SUMMARY = {
    "id", "name", "description", "status", "version", "tags", "organizationId", "ownerId", "isPublic", "isTemplate",
    "createdAt", "updatedAt",
}  # fmt: skip
OBJECT = SUMMARY | {"nodes", "connections", "config", "settings", "sharedWith"}


async def list_names(person: UserClient, query: str = "") -> list[str]:
    """Return the names that a list shows."""
    response = await person.api.get(f"{WORKFLOWS}?{query}")
    assert response.status_code == 200, response.text
    return [workflow["name"] for workflow in response.json()["workflows"]]


async def count(harness: GatewayHarness, condition: Any) -> int:  # noqa: ANN401 - any condition on one table
    async with harness.gateway.database.read() as connection:
        return await connection.scalar(select(func.count()).where(condition)) or 0


# ── the contract's bodies ───────────────────────────────────────────────────────────────────────────────────


async def test_the_contract_s_workflow_is_created_and_shown_as_it_says(people: OrganizationUsers) -> None:
    node = {
        "id": "node_1",
        "nodeId": "manual",
        "label": "Extract Orders",
        "position": {"x": 100, "y": 200},
        "config": {},
    }
    edge = {"sourceNodeId": "node_1", "sourcePort": "output", "targetNodeId": "node_2", "targetPort": "input"}
    created = await people.owner.api.post(
        WORKFLOWS,
        json={
            "name": "Daily ETL Pipeline",
            "description": "Extracts data from MySQL, transforms, and loads to S3",
            "status": "draft",
            "nodes": [
                node,
                {"id": "node_2", "nodeId": "set", "config": {"values": {"a": 1}}},
            ],
            "connections": [edge],
            "tags": ["etl"],
            "settings": {"timeout": 3600, "retryOnFailure": True, "maxRetries": 3},
        },
    )
    assert created.status_code == 201
    assert set(created.json()) == {"workflowId"}
    workflow_id = created.json()["workflowId"]
    assert re.fullmatch(r"wf_[0-9a-z]{26}", workflow_id)
    shown = await people.owner.workflow(workflow_id)
    assert set(shown) >= OBJECT
    assert shown["id"] == workflow_id
    assert (shown["status"], shown["version"], shown["tags"]) == ("draft", 1, ["etl"])
    assert shown["settings"] == {
        "timeout": 3600,
        "retryOnFailure": True,
        "maxRetries": 3,
        "parallelism": 16,
        "strictMappings": True,
    }
    assert (shown["config"], shown["sharedWith"], shown["isPublic"], shown["isTemplate"]) == (
        {},
        [],
        False,
        False,
    )
    assert TIME.fullmatch(shown["createdAt"])
    assert TIME.fullmatch(shown["updatedAt"])
    assert shown["nodes"][0].items() >= node.items()
    assert shown["connections"][0].items() >= edge.items()
    assert shown["connections"][0]["id"].startswith("conn-")


async def test_a_list_shows_the_contract_s_fields_and_the_total(people: OrganizationUsers) -> None:
    for number in range(3):
        await people.owner.create(name=f"Workflow {number}", **GRAPH)
    body = (await people.owner.api.get(f"{WORKFLOWS}?limit=2&offset=1")).json()
    assert set(body) == {"count", "limit", "offset", "workflows"}
    assert (body["count"], body["limit"], body["offset"]) == (3, 2, 1)
    assert [set(workflow) for workflow in body["workflows"]] == [SUMMARY, SUMMARY]
    assert [workflow["name"] for workflow in body["workflows"]] == ["Workflow 1", "Workflow 0"]


async def test_the_least_that_makes_a_workflow_is_a_name(people: OrganizationUsers) -> None:
    shown = await people.owner.workflow(await people.owner.create(name="  Bare   "))
    assert (shown["name"], shown["description"], shown["status"]) == ("Bare", "", "draft")
    assert (shown["nodes"], shown["connections"], shown["tags"]) == ([], [], [])
    assert shown["settings"] == {
        "timeout": 3600,
        "retryOnFailure": False,
        "maxRetries": 3,
        "parallelism": 16,
        "strictMappings": True,
    }


async def test_optional_fields_may_be_null(people: OrganizationUsers) -> None:
    fields = ("description", "status", "nodes", "connections", "tags", "settings", "config")
    shown = await people.owner.workflow(await people.owner.create(**dict.fromkeys(fields)))
    assert shown["status"] == "draft"


async def test_both_spellings_of_types_and_edges_are_taken(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(
        nodes=[{"id": "a", "type": "manual"}, {"id": "b", "nodeType": "set"}, {"nodeId": "set"}],
        connections=[
            {"source": "a", "target": "b"},
            {"sourceNodeId": "a", "targetNodeId": "b", "targetPort": "input", "id": "mine"},
        ],
    )
    shown = await people.owner.workflow(workflow_id)
    assert [node["nodeId"] for node in shown["nodes"]] == ["manual", "set", "set"]
    assert shown["nodes"][2]["id"].startswith("node-")
    assert shown["nodes"][1]["label"] == "Set"
    ends = [(edge["sourceNodeId"], edge["targetNodeId"], edge["sourcePort"]) for edge in shown["connections"]]
    assert ends == [("a", "b", "output")] * 2
    assert shown["connections"][1]["id"] == "mine"


async def test_a_shown_object_can_be_sent_back_unchanged(people: OrganizationUsers) -> None:
    graph = {
        "nodes": [
            TRIGGER,
            STEP
            | {
                "version": "1.0.0",
                "inputMappings": {"userId": "data.user.id"},
                "passThroughValues": {"tenant": "tenantId"},
                "retry": {"maxAttempts": 3, "backoff": 0.5},
                "timeout": 30,
            },
        ],
        "connections": [EDGE],
    }
    workflow_id = await people.owner.create(tags=["a", "b"], config={"appId": "app_1"}, **graph)
    shown = await people.owner.workflow(workflow_id)
    again = (await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json=shown)).json()
    assert again == shown
    assert shown["nodes"][1]["inputMappings"] == {"userId": "data.user.id"}
    assert shown["nodes"][1]["passThroughValues"] == {"tenant": "tenantId"}
    assert shown["nodes"][1]["retry"] == {"maxAttempts": 3, "backoff": 0.5}
    assert shown["nodes"][1]["timeout"] == 30


async def test_names_are_kept_in_one_unicode_form(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(name="Cafe\u0301 🚀", tags=["  a ", "a", "Å"])
    shown = await people.owner.workflow(workflow_id)
    assert shown["name"] == "Café 🚀"
    assert shown["tags"] == ["a", "Å"]


async def test_creation_stores_the_first_version(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(name="Versioned", **GRAPH)
    async with harness.gateway.database.read() as connection:
        statement = select(WorkflowVersion).where(col(WorkflowVersion.workflow_id) == workflow_id)
        row = (await connection.execute(statement)).one()
    assert (row.version, row.version_tag, row.description) == (1, "v1.0.0", "Initial version")
    assert row.created_by == people.owner.user.id
    assert [node["id"] for node in row.snapshot["nodes"]] == ["start", "step"]


# ── changing ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_update_changes_only_its_fields(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(
        name="Before", description="Old", tags=["etl"], config={"appId": "app_1"}, **GRAPH
    )
    before = await people.owner.workflow(workflow_id)
    await wait_until_after(before["updatedAt"])
    response = await people.owner.api.put(
        f"{WORKFLOWS}/{workflow_id}",
        json={"name": "Updated ETL Pipeline", "tags": ["etl", "v2"], "settings": {"timeout": 7200}},
    )
    assert response.status_code == 200
    after = response.json()
    assert after == await people.owner.workflow(workflow_id)
    assert (after["name"], after["tags"]) == ("Updated ETL Pipeline", ["etl", "v2"])
    assert after["settings"] == {
        "timeout": 7200,
        "retryOnFailure": False,
        "maxRetries": 3,
        "parallelism": 16,
        "strictMappings": True,
    }
    assert after["updatedAt"] > before["updatedAt"]
    assert {key for key in after if after[key] != before[key]} == {"name", "tags", "settings", "updatedAt"}


async def test_settings_merge_and_null_takes_a_key_away(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(settings={"timeout": 60, "maxRetries": 1, "strictMappings": True})
    path = f"{WORKFLOWS}/{workflow_id}"
    merged = (
        await people.owner.api.put(
            path, json={"settings": {"timeout": None, "onFailure": {"url": "https://example.com"}}}
        )
    ).json()
    assert merged["settings"] == {
        "timeout": 3600,
        "retryOnFailure": False,
        "maxRetries": 1,
        "parallelism": 16,
        "strictMappings": True,
        "onFailure": {"url": "https://example.com"},
    }
    assert_refused(
        await people.owner.api.put(path, json={"settings": {"timeout": -1}}), 422, "validation-failed"
    )


async def test_a_new_workflow_is_strict_unless_it_says_otherwise_and_one_that_was_stored_stays_as_it_is(
    people: OrganizationUsers,
) -> None:
    async def settings(**given: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
        shown: dict[str, Any] = (await people.owner.workflow(await people.owner.create(**given)))["settings"]
        return shown

    assert (await settings())["strictMappings"] is True
    assert (await settings(settings={"strictMappings": None}))["strictMappings"] is True
    assert (await settings(settings={"strictMappings": False}))["strictMappings"] is False
    workflow_id = await people.owner.create()
    path = f"{WORKFLOWS}/{workflow_id}"
    stored = (await people.owner.api.put(path, json={"settings": {"strictMappings": None}})).json()
    assert "strictMappings" not in stored["settings"]
    changed = (await people.owner.api.put(path, json={"name": "Renamed", "settings": {"timeout": 60}})).json()
    assert "strictMappings" not in changed["settings"]


async def test_an_update_without_a_change_changes_nothing(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    before = await people.owner.workflow(workflow_id)
    for body in ({}, {"name": before["name"]}, before):
        assert (await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json=body)).json() == before
    assert (await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}")).json() == before


async def test_updates_at_the_same_time_are_all_kept(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    answers = await asyncio.gather(
        *(
            people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json={"config": {f"key{number}": number}})
            for number in range(4)
        )
    )
    assert {answer.status_code for answer in answers} == {200}
    config = (await people.owner.workflow(workflow_id))["config"]
    assert [config[f"key{number}"] for number in range(4)] == [0, 1, 2, 3]


async def test_every_change_moves_the_revision(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    await people.owner.api.put(path, json={"name": "New"})
    await people.owner.api.put(f"{path}/status", json={"status": "active"})
    await people.owner.api.put(path, json={"name": "New"})
    async with harness.gateway.database.read() as connection:
        revision = await connection.scalar(
            select(col(Workflow.revision)).where(col(Workflow.id) == workflow_id)
        )
    assert revision == 3


# ── status ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_status_is_set_and_the_whole_object_answers(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    for status in ("active", "paused", "active", "archived", "draft", "draft"):
        response = await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": status})
        assert response.status_code == 200
        assert set(response.json()) >= OBJECT
        assert response.json()["status"] == status


@pytest.mark.parametrize(
    "body", [{}, {"status": "on"}, {"status": None}, {"status": 1}, {"status": "Active"}]
)
async def test_a_status_that_is_none_is_refused(people: OrganizationUsers, body: dict[str, object]) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json=body)
    assert_refused(response, 422, "validation-failed")
    assert response.json()["error"]["details"][0]["path"] == "status"


@pytest.mark.parametrize(
    ("graph", "finding"),
    [
        ({"nodes": [], "connections": []}, "empty-workflow"),
        ({"nodes": [STEP], "connections": []}, "missing-trigger"),
        ({"nodes": [TRIGGER, STEP], "connections": [EDGE | {"targetNodeId": "nobody"}]}, "broken-connection"),
        ({"nodes": [TRIGGER, STEP, STEP], "connections": [EDGE]}, "duplicate-node-id"),
        ({"nodes": [TRIGGER, TRIGGER | {"id": "other"}], "connections": []}, "multiple-triggers"),
        ({"nodes": [TRIGGER, STEP], "connections": [EDGE | {"sourcePort": "nowhere"}]}, "invalid-port"),
    ],
)
async def test_only_a_valid_workflow_becomes_active(
    people: OrganizationUsers, graph: dict[str, Any], finding: str
) -> None:
    assert_refused(
        await people.owner.api.post(WORKFLOWS, json={"name": "x", "status": "active", **graph}),
        422,
        "validation-failed",
    )
    draft = await people.owner.create(**graph)
    response = await people.owner.api.put(f"{WORKFLOWS}/{draft}/status", json={"status": "active"})
    assert_refused(response, 422, "validation-failed")
    details = response.json()["error"]["details"]
    assert finding in [detail["type"] for detail in details]
    assert all({"type", "message", "suggestion"} <= set(detail) for detail in details)
    assert (await people.owner.workflow(draft))["status"] == "draft"


async def test_an_active_workflow_stays_valid(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(status="active", **GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    assert_refused(await people.owner.api.put(path, json={"nodes": []}), 422, "validation-failed")
    assert_refused(await people.owner.api.put(path, json={"nodes": [STEP]}), 422, "validation-failed")
    assert len((await people.owner.workflow(workflow_id))["nodes"]) == 2
    assert (await people.owner.api.put(path, json={"name": "Still active"})).status_code == 200
    assert (await people.owner.api.put(f"{path}/status", json={"status": "paused"})).status_code == 200
    assert (await people.owner.api.put(path, json={"nodes": []})).status_code == 200


# ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_list_filters_by_status_tag_and_words(people: OrganizationUsers) -> None:
    await people.owner.create(name="Invoices", tags=["finance", "daily"], status="archived")
    await people.owner.create(name="Orders", description="the DAILY run", tags=["sales"])
    await people.owner.create(name="100% _sure_", tags=["100%"])
    assert await list_names(people.owner, "status=archived") == ["Invoices"]
    assert await list_names(people.owner, "tag=daily") == ["Invoices"]
    assert await list_names(people.owner, "tag=dail") == []
    assert await list_names(people.owner, "search=daily") == ["Orders"]
    assert await list_names(people.owner, "search=INVO") == ["Invoices"]
    assert await list_names(people.owner, "search=%25") == ["100% _sure_"]
    assert await list_names(people.owner, "search=_sure") == ["100% _sure_"]
    assert await list_names(people.owner, "search=r_e") == []
    assert await list_names(people.owner, "search=%27%20OR%201=1") == []
    assert await list_names(people.owner, "tag=sales&status=draft&search=orders") == ["Orders"]
    assert (await people.owner.api.get(f"{WORKFLOWS}?tag=sales")).json()["count"] == 1


async def test_a_list_is_sorted_as_asked(people: OrganizationUsers) -> None:
    for name in ("B", "C", "A"):
        await people.owner.create(name=name)
    assert await list_names(people.owner) == ["A", "C", "B"]
    assert await list_names(people.owner, "sort=createdAt:asc") == ["B", "C", "A"]
    assert await list_names(people.owner, "sort=name:asc") == ["A", "B", "C"]
    assert await list_names(people.owner, "sort=name:desc&limit=1&offset=1") == ["B"]


async def test_tags_that_change_are_found_by_their_new_names(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Tagged", tags=["old", "same"])
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json={"tags": ["same", "new"]})
    assert await list_names(people.owner, "tag=old") == []
    assert (
        await list_names(people.owner, "tag=same") == await list_names(people.owner, "tag=new") == ["Tagged"]
    )
    await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}")
    assert await count(harness, col(WorkflowTag.workflow_id) == workflow_id) == 0


async def test_stats_count_the_organisation_by_status(people: OrganizationUsers) -> None:
    await people.owner.create(status="archived")
    await people.owner.create(status="active", **GRAPH)
    await people.colleague.create()
    await people.stranger.create()
    gone = await people.owner.create()
    await people.owner.api.delete(f"{WORKFLOWS}/{gone}")
    response = await people.owner.api.get(f"{WORKFLOWS}/stats")
    assert response.status_code == 200
    found = response.json()
    assert found.pop("readable") == {"total": 2, "active": 1, "paused": 0, "draft": 0, "archived": 1}
    assert found == {"total": 3, "active": 1, "paused": 0, "draft": 1, "archived": 1}
    page = (await people.owner.api.get("/dashboard/workflows")).text
    for number, label in ((2, "All"), (1, "Active"), (0, "Draft"), (1, "Archived")):
        assert f"<b>{number}</b> {label}</a>" in page


async def test_templates_are_in_no_list_and_no_count(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create()
    await change(harness, workflow_id, is_template=True)
    assert await list_names(people.owner) == []
    assert (await people.owner.api.get(f"{WORKFLOWS}/stats")).json()["total"] == 0


# ── permissions ─────────────────────────────────────────────────────────────────────────────────────────────


async def change(harness: GatewayHarness, workflow_id: str, **columns: Any) -> None:  # noqa: ANN401 - columns of any type
    async def work(connection: AsyncConnection) -> None:
        await connection.execute(update(Workflow).where(col(Workflow.id) == workflow_id).values(**columns))

    await harness.gateway.database.transaction(work)


async def share(harness: GatewayHarness, workflow_id: str, person: UserClient) -> None:
    row = {"workflow_id": workflow_id, "user_id": person.user.id, "shared_at": datetime.now(UTC)}

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(insert(WorkflowShare).values(row))

    await harness.gateway.database.transaction(work)


async def attempt_changes(person: UserClient, workflow_id: str) -> list[httpx2.Response]:
    """Try everything that changes a workflow."""
    path = f"{WORKFLOWS}/{workflow_id}"
    return [
        await person.api.put(path, json={"name": "Taken over"}),
        await person.api.put(path, json={}),
        await person.api.put(f"{path}/status", json={"status": "archived"}),
        await person.api.delete(path),
        await person.api.delete(f"{path}?force=true"),
    ]


async def test_a_workflow_is_invisible_to_other_organisations_and_to_other_members(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(name="Private", tags=["secret"])
    for person in (people.stranger, people.colleague):
        assert_refused(await person.api.get(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")
        for response in await attempt_changes(person, workflow_id):
            assert_refused(response, 404, "not-found")
        for query in ("", "search=Private", "tag=secret", "status=draft"):
            assert await list_names(person, query) == []
    assert (await people.owner.workflow(workflow_id))["name"] == "Private"


async def test_an_absent_workflow_and_one_of_others_look_alike(people: OrganizationUsers) -> None:
    theirs = await people.stranger.create()
    answers = [await people.admin.api.get(f"{WORKFLOWS}/{which}") for which in (theirs, "wf_nobody")]
    bodies = [answer.json() | {"requestId": ""} for answer in answers]
    assert bodies[0] == bodies[1]


async def test_an_admin_sees_and_manages_all_of_the_organisation(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(name="Mine")
    assert await list_names(people.admin) == ["Mine"]
    response = await people.admin.api.put(f"{WORKFLOWS}/{workflow_id}", json={"name": "Ours"})
    assert response.json()["ownerId"] == people.owner.user.id
    assert (await people.admin.api.delete(f"{WORKFLOWS}/{workflow_id}")).status_code == 204


async def test_a_share_allows_reading_and_no_changes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Shared")
    await share(harness, workflow_id, people.colleague)
    assert (await people.colleague.workflow(workflow_id))["sharedWith"] == [people.colleague.user.id]
    assert await list_names(people.colleague) == ["Shared"]
    for response in await attempt_changes(people.colleague, workflow_id):
        assert_refused(response, 403, "not-owner")
    assert (await people.owner.workflow(workflow_id))["name"] == "Shared"


async def test_a_share_with_another_organisation_s_user_opens_nothing(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create()
    await share(harness, workflow_id, people.stranger)
    assert_refused(await people.stranger.api.get(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")


async def test_a_public_workflow_is_read_by_the_organisation_and_changed_by_its_owner(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Public")
    await change(harness, workflow_id, is_public=True)
    assert await list_names(people.colleague) == ["Public"]
    assert await list_names(people.stranger) == []
    for response in await attempt_changes(people.colleague, workflow_id):
        assert_refused(response, 403, "not-owner")
    assert_refused(await people.stranger.api.get(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")


# ── deleting ────────────────────────────────────────────────────────────────────────────────────────────────


async def accept_run(harness: GatewayHarness, person: UserClient, workflow_id: str) -> str:
    """Accept a run that stays unclaimed."""
    workflow = await harness.gateway.workflows.load(workflow_id, await authenticate(harness, person))
    execution_id = ids.new_id("exec")
    (accepted,) = await harness.gateway.store.accept(
        [
            RunAcceptance(
                execution_id=execution_id,
                shard=workflow.shard,
                organization_id=workflow.organization_id,
                workflow_id=workflow.id,
                workflow_revision=workflow.revision,
                user_id=person.user.id,
                trigger_type="manual",
                trigger="{}",
                config="{}",
                definition_hash=workflow.definition_hash,
                definition=workflow.definition,
                timeout_seconds=60,
                total_nodes=workflow.total_nodes,
            )
        ]
    )
    assert accepted.verdict is AcceptanceVerdict.ACCEPTED
    return execution_id


async def authenticate(harness: GatewayHarness, person: UserClient) -> Any:  # noqa: ANN401 - models.access.ApiCaller
    route = Route("/sample", authenticate)
    headers = [(b"x-api-key", person.key.encode())]
    scope = {"method": "GET", "route": route, "headers": headers, "client": ("10.0.0.1", 1)}
    return await harness.gateway.authenticator.caller(scope)


async def test_a_deleted_workflow_is_gone(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    response = await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}")
    assert (response.status_code, response.content) == (204, b"")
    assert_refused(await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")
    assert_refused(await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")
    assert await list_names(people.owner) == []


@pytest.mark.every_database
async def test_a_workflow_with_live_runs_is_deleted_by_force_alone(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    execution_id = await accept_run(harness, people.owner, workflow_id)
    assert_refused(await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}"), 409, "workflow-running")
    assert_refused(
        await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}?force=false"), 409, "workflow-running"
    )
    assert (await people.owner.workflow(workflow_id))["id"] == workflow_id
    assert (await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}?force=true")).status_code == 204
    async with harness.gateway.database.read() as connection:
        status = await connection.scalar(
            select(col(Execution.status)).where(col(Execution.id) == execution_id)
        )
    assert status == ExecutionStatus.CANCELLED
    assert_refused(await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}"), 404, "not-found")


async def test_force_is_true_or_false(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    assert_refused(
        await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}?force=yes"), 400, "invalid-query"
    )


# ── repeated requests ───────────────────────────────────────────────────────────────────────────────────────


async def create_with_key(person: UserClient, key: str, **body: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
    return await person.api.post(WORKFLOWS, json={"name": "Once", **body}, headers={"Idempotency-Key": key})


async def test_a_repeated_creation_gets_the_first_answer_again(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    first = await create_with_key(people.owner, "key-1", tags=["a"])
    assert first.status_code == 201
    assert "Idempotent-Replayed" not in first.headers
    again = await create_with_key(people.owner, "key-1", tags=["a"])
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    assert await count(harness, col(Workflow.owner_id) == people.owner.user.id) == 1


async def test_a_key_with_another_body_is_a_mismatch(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await create_with_key(people.owner, "key-2")
    assert_refused(await create_with_key(people.owner, "key-2", tags=["b"]), 422, "idempotency-mismatch")
    assert await count(harness, col(Workflow.owner_id) == people.owner.user.id) == 1


async def test_a_key_belongs_to_one_user(people: OrganizationUsers) -> None:
    mine = await create_with_key(people.owner, "key-3")
    for other in (people.colleague, people.stranger):
        theirs = await create_with_key(other, "key-3")
        assert theirs.status_code == 201
        assert theirs.json() != mine.json()


async def test_equal_requests_at_the_same_time_make_one_workflow(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    answers = await asyncio.gather(*(create_with_key(people.owner, "key-4") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 4
    assert await count(harness, col(Workflow.owner_id) == people.owner.user.id) == 1


async def test_a_refused_request_frees_its_key(people: OrganizationUsers) -> None:
    assert_refused(await create_with_key(people.owner, "key-5", status="active"), 422, "validation-failed")
    assert (await create_with_key(people.owner, "key-5")).status_code == 201


async def test_a_commit_with_a_lost_answer_is_not_made_twice(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    transaction = harness.gateway.database.transaction

    async def answered_the_second_time(work: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:  # noqa: ANN401 - passed through unchanged
        await transaction(work)
        return await transaction(work)

    monkeypatch.setattr(harness.gateway.database, "transaction", answered_the_second_time)
    without_key = await people.owner.create(tags=["a"])
    with_key = await create_with_key(people.owner, "key-6")
    assert (await people.owner.workflow(without_key))["tags"] == ["a"]
    assert with_key.status_code == 201
    assert "Idempotent-Replayed" not in with_key.headers
    assert await count(harness, col(Workflow.owner_id) == people.owner.user.id) == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", "tab\there", "ümlaut"])
async def test_a_key_that_is_none_is_refused(people: OrganizationUsers, key: str) -> None:
    headers = {b"Idempotency-Key": key.encode("latin-1")}
    response = await people.owner.api.post(WORKFLOWS, json={"name": "x"}, headers=headers)
    assert_refused(response, 400, "invalid-idempotency-key")


# ── the cache that runs are accepted from ───────────────────────────────────────────────────────────────────


async def test_a_loaded_workflow_equals_its_row_and_follows_changes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(settings={"timeout": 60}, **GRAPH)
    owner = await authenticate(harness, people.owner)
    first = await harness.gateway.workflows.load(workflow_id, owner)
    assert first is await harness.gateway.workflows.load(workflow_id, owner)
    assert (first.status, first.revision, first.total_nodes, first.trigger_kind) == ("draft", 1, 2, "manual")
    assert first.settings["timeout"] == 60
    assert first.validation.is_valid
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json={"nodes": [TRIGGER]})
    harness.gateway.workflows.forget(first.organization_id, workflow_id)
    second = await harness.gateway.workflows.load(workflow_id, owner)
    assert (second.revision, second.total_nodes) == (2, 1)
    assert second.definition_hash != first.definition_hash


async def test_a_loaded_workflow_is_shown_only_to_its_readers(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await harness.gateway.workflows.load(workflow_id, await authenticate(harness, people.owner))
    await harness.gateway.workflows.load(workflow_id, await authenticate(harness, people.admin))
    for person in (people.colleague, people.stranger):
        with pytest.raises(Exception, match="no such workflow"):
            await harness.gateway.workflows.load(workflow_id, await authenticate(harness, person))


@pytest.mark.every_database
@pytest.mark.parametrize("verb", ["PUT", "DELETE"])
async def test_a_change_with_an_unanswered_commit_is_made_once(
    people: OrganizationUsers, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await people.owner.create()
    transaction = Database.transaction

    async def committed_twice(
        database: Database, work: Callable[[AsyncConnection], Awaitable[T]], *, locks: str | None = None
    ) -> T:
        await transaction(database, work, locks=locks)
        return await transaction(database, work, locks=locks)

    monkeypatch.setattr(Database, "transaction", committed_twice)
    path = f"/api/v1/workflows/{workflow_id}"
    tag = (await people.owner.api.get(path)).headers["ETag"]
    body = {"name": "Another"} if verb == "PUT" else None
    response = await people.owner.api.request(verb, path, headers={"If-Match": tag}, json=body)
    assert response.status_code == (200 if verb == "PUT" else 204), response.text
    if verb == "PUT":
        assert (response.headers["ETag"], response.json()["name"]) == ('"2"', "Another")
