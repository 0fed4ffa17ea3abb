"""Workflows applied from files: plans, conflicts, sets, pruning, names of data sources, all or nothing."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx2
import pytest

from tests.custom_types import custom_graph, custom_type
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)

WORKFLOWS = "/api/v1/workflows"


@pytest.fixture
async def people(harness: GatewayHarness) -> OrganizationUsers:
    return await harness.people()


def named(name: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {"name": name, **GRAPH, **fields}


async def post_apply(person: UserClient, *workflows: dict[str, Any], **options: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
    return await person.api.post(f"{WORKFLOWS}/apply", json={"workflows": [*workflows], **options})


async def apply(person: UserClient, *workflows: dict[str, Any], **options: Any) -> dict[str, str]:  # noqa: ANN401 - any JSON value
    """Apply workflows and return the action for each name."""
    response = await post_apply(person, *workflows, **options)
    assert response.status_code == 200, response.text
    changes = response.json()["changes"]
    counts: dict[str, int] = {}
    for one in changes:
        counts[one["action"]] = counts.get(one["action"], 0) + 1
    assert response.json()["counts"] == counts
    return {one["name"]: one["action"] for one in changes}


async def find(person: UserClient, name: str) -> dict[str, Any]:
    """Return a workflow by its name."""
    listed = (await person.api.get(WORKFLOWS, params={"search": name})).json()["workflows"]
    (found,) = [one for one in listed if one["name"] == name]
    whole: dict[str, Any] = (await person.api.get(f"{WORKFLOWS}/{found['id']}")).json()
    return whole


async def test_a_repeated_application_changes_nothing(people: OrganizationUsers) -> None:
    first, second = named("First"), named("Second", status="active", tags=["x"])
    assert await apply(people.owner, first, second, set="shop") == {"First": "create", "Second": "create"}
    before = await find(people.owner, "Second")
    assert (before["status"], before["tags"]) == ("active", ["x"])
    assert await apply(people.owner, first, second, set="shop") == dict.fromkeys(
        ("First", "Second"), "unchanged"
    )
    assert (await find(people.owner, "Second")) == before
    changed = {**second, "description": "New", "nodes": [TRIGGER, {**STEP, "config": {"values": {"a": 2}}}]}
    assert await apply(people.owner, first, changed, set="shop") == {"First": "unchanged", "Second": "update"}
    after = await find(people.owner, "Second")
    assert (after["id"], after["description"]) == (before["id"], "New")
    assert [one["id"] for one in after["connections"]] == [one["id"] for one in before["connections"]]
    assert [one["position"] for one in after["nodes"]] == [one["position"] for one in before["nodes"]]
    # What the file no longer has gets its default.
    assert await apply(people.owner, first, named("Second"), set="shop") == {
        "First": "unchanged",
        "Second": "update",
    }
    assert (await find(people.owner, "Second"))["tags"] == []


async def test_a_dry_run_shows_the_differences_and_changes_nothing(people: OrganizationUsers) -> None:
    await apply(people.owner, named("Kept"))
    before = await find(people.owner, "Kept")
    wanted = {"name": "Kept", "description": "D", "nodes": [TRIGGER], "connections": []}
    response = await post_apply(people.owner, wanted, named("New"), dryRun=True)
    kept, new = response.json()["changes"]
    assert (kept["action"], kept["workflowId"], new["action"], new["workflowId"]) == (
        "update",
        before["id"],
        "create",
        None,
    )
    assert kept["diff"]["fields"] == {"description": {"before": "", "after": "D"}}
    assert [one["id"] for one in kept["diff"]["nodes"]["removed"]] == ["step"]
    assert len(kept["diff"]["connections"]["removed"]) == 1
    assert "diff" not in new
    assert (await find(people.owner, "Kept")) == before
    assert (await people.owner.api.get(WORKFLOWS, params={"search": "New"})).json()["count"] == 0


async def test_an_edit_by_hand_is_a_conflict_until_it_is_forced(people: OrganizationUsers) -> None:
    await apply(people.owner, named("Edited"), named("Moved"), named("Other"), set="shop")
    found = await find(people.owner, "Edited")
    await people.owner.api.put(f"{WORKFLOWS}/{found['id']}", json={"description": "By hand"})
    moved = await find(people.owner, "Moved")
    nodes = [{**node, "position": {"x": 900, "y": 900}} for node in moved["nodes"]]
    await people.owner.api.put(f"{WORKFLOWS}/{moved['id']}", json={"nodes": nodes})
    changes = [named(name, description="By file") for name in ("Edited", "Moved", "Other")]
    refused = await post_apply(people.owner, *changes, set="shop")
    assert_refused(refused, 409, "apply-conflict")
    (problem,) = refused.json()["error"]["details"]
    assert (problem["path"], problem["code"]) == ("workflows.0", "edited-since-apply")
    assert (await find(people.owner, "Other"))["description"] == "", "nothing was applied"
    planned = await post_apply(people.owner, *changes, set="shop", dryRun=True)
    (conflict, *_) = planned.json()["changes"]
    assert (conflict["action"], conflict["conflict"]) == ("conflict", "edited-since-apply")
    assert conflict["diff"]["fields"]["description"] == {"before": "By hand", "after": "By file"}
    assert await apply(people.owner, *changes, set="shop", force=True) == dict.fromkeys(
        ("Edited", "Moved", "Other"), "update"
    )
    assert (await find(people.owner, "Moved"))["nodes"][0]["position"] == {"x": 900, "y": 900}
    assert await apply(people.owner, *changes, set="shop") == dict.fromkeys(
        ("Edited", "Moved", "Other"), "unchanged"
    )


async def test_a_status_changed_by_hand_is_kept_unless_the_file_names_it(people: OrganizationUsers) -> None:
    await apply(people.owner, named("Free"), named("Fixed", status="active"))
    for name in ("Free", "Fixed"):
        found = await find(people.owner, name)
        await people.owner.api.put(f"{WORKFLOWS}/{found['id']}/status", json={"status": "paused"})
    assert await apply(people.owner, named("Free", description="D")) == {"Free": "update"}
    assert (await find(people.owner, "Free"))["status"] == "paused"
    refused = await post_apply(people.owner, named("Fixed", status="active"))
    assert_refused(refused, 409, "apply-conflict")
    assert await apply(people.owner, named("Fixed", status="active"), force=True) == {"Fixed": "update"}
    assert (await find(people.owner, "Fixed"))["status"] == "active"


async def test_workflows_of_others_and_of_other_sets_are_not_taken_over(people: OrganizationUsers) -> None:
    await people.owner.create(name="By hand", **GRAPH)
    assert await apply(people.owner, named("By hand"), set="shop") == {"By hand": "unchanged"}
    await people.owner.create(name="Different", **GRAPH)
    refused = await post_apply(people.owner, named("Different", description="D"), set="shop")
    assert refused.json()["error"]["details"][0]["code"] == "not-applied-before"
    refused = await post_apply(people.owner, named("By hand"), set="other")
    assert_refused(refused, 409, "apply-conflict")
    assert "'shop'" in refused.json()["error"]["details"][0]["message"]
    assert await apply(people.owner, named("By hand"), set="other", force=True) == {"By hand": "unchanged"}

    twice = [await people.owner.create(name="Twice", **GRAPH) for _ in range(2)]
    refused = await post_apply(people.owner, named("Twice"))
    assert_refused(refused, 409, "apply-conflict")
    assert all(one in refused.text for one in twice)

    await people.admin.create(name="Foreign", **GRAPH)
    foreign = await find(people.admin, "Foreign")
    await people.admin.api.put(f"{WORKFLOWS}/{foreign['id']}/visibility", json={"isPublic": True})
    assert_refused(
        await post_apply(people.owner, named("Foreign", description="D"), force=True), 403, "not-owner"
    )
    # Another organization has names of its own.
    assert await apply(people.stranger, named("By hand"), set="shop") == {"By hand": "create"}


@pytest.mark.every_database
async def test_only_members_of_the_set_are_pruned(people: OrganizationUsers) -> None:
    await apply(people.owner, named("Stays"), named("Leaves"), named("Edited"), set="shop")
    await apply(people.owner, named("Elsewhere"), set="other")
    await people.owner.create(name="By hand", **GRAPH)
    assert await apply(people.owner, named("Stays"), set="shop") == {"Stays": "unchanged"}
    edited = await find(people.owner, "Edited")
    await people.owner.api.put(f"{WORKFLOWS}/{edited['id']}", json={"description": "By hand"})
    refused = await post_apply(people.owner, named("Stays"), set="shop", prune="archive")
    assert refused.json()["error"]["details"][0]["path"] == "set"
    assert await apply(people.owner, named("Stays"), set="shop", prune="archive", force=True) == {
        "Stays": "unchanged",
        "Leaves": "archive",
        "Edited": "archive",
    }
    statuses = {
        name: (await find(people.owner, name))["status"]
        for name in ("Stays", "Leaves", "Edited", "Elsewhere", "By hand")
    }
    assert statuses == {
        "Stays": "draft",
        "Leaves": "archived",
        "Edited": "archived",
        "Elsewhere": "draft",
        "By hand": "draft",
    }
    # A file that is there again takes its workflow out of the archive.
    assert (await apply(people.owner, named("Stays"), named("Leaves"), set="shop"))["Leaves"] == "update"
    assert (await find(people.owner, "Leaves"))["status"] == "draft"
    assert await apply(people.owner, set="shop", prune="delete", force=True) == dict.fromkeys(
        ("Stays", "Leaves", "Edited"), "delete"
    )
    listed = (await people.owner.api.get(WORKFLOWS)).json()["workflows"]
    assert {one["name"] for one in listed} == {"Elsewhere", "By hand"}


@pytest.mark.every_database
async def test_data_sources_are_named_in_files(people: OrganizationUsers) -> None:
    source = {"name": "orders-db", "type": "mysql", "secrets": {"password": "p"}}
    settings = {"host": "db.example.com", "database": "d", "user": "u", "tls": "require"}
    made = await people.owner.api.post("/api/v1/datasources", json={**source, "settings": settings})
    assert made.status_code == 201, made.text
    config = {"dataSource": "@orders-db", "query": "SELECT '@orders-db'"}
    query = {"id": "step", "type": "mysql-source", "config": config}
    reading = {"name": "Reading", "nodes": [TRIGGER, query], "connections": [EDGE]}
    await apply(people.owner, reading)
    stored = (await find(people.owner, "Reading"))["nodes"][1]["config"]
    assert (stored["dataSource"], stored["query"]) == (made.json()["dataSourceId"], "SELECT '@orders-db'")
    assert await apply(people.owner, reading) == {"Reading": "unchanged"}
    refused = await post_apply(people.stranger, reading)
    assert_refused(refused, 422, "validation-failed")
    assert refused.json()["error"]["details"][0]["path"] == "workflows.0.nodes.1.config.dataSource"


@pytest.mark.every_database
async def test_warnings_are_those_of_the_validation_and_strict_refuses_them(
    people: OrganizationUsers,
) -> None:
    await people.owner.api.post("/api/v1/workflow-nodes", json=custom_type())
    warned = {"name": "Warned", **custom_graph()}
    planned = (await post_apply(people.owner, named("Fine"), warned, dryRun=True)).json()["changes"]
    assert [[finding["type"] for finding in change["warnings"]] for change in planned] == [[], ["no-worker"]]
    for options in ({}, {"dryRun": True}):
        refused = await post_apply(people.owner, named("Fine"), warned, strict=True, **options)
        assert_refused(refused, 422, "validation-failed")
        (detail,) = refused.json()["error"]["details"]
        assert (detail["path"], detail["code"]) == ("workflows.1.nodes.1", "no-worker")
        assert detail["message"].startswith("Workflow 'Warned': ")
    assert (await people.owner.api.get(WORKFLOWS)).json()["count"] == 0
    assert await apply(people.owner, named("Fine"), strict=True) == {"Fine": "create"}
    for _ in range(2):  # also for a workflow that does not change
        change = (await post_apply(people.owner, warned)).json()["changes"][0]
        checked = await people.owner.api.post(f"{WORKFLOWS}/{change['workflowId']}/validate")
        assert change["warnings"] == checked.json()["warnings"]


async def test_errors_name_the_workflow_and_the_nearest_types(people: OrganizationUsers) -> None:
    unknown = named("Unknown", nodes=[{"id": "x", "type": "quux"}], status="gone")
    refused = await post_apply(people.owner, named("Fine"), unknown)
    assert_refused(refused, 422, "validation-failed")
    messages = [detail["message"] for detail in refused.json()["error"]["details"]]
    assert all(message.startswith("Workflow 'Unknown': ") for message in messages), messages
    assert re.search(r"no node type 'quux': did you mean \S+ or \S+ or \S+\?$", messages[1])


async def test_an_exported_document_can_be_applied(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(name="Exported", **GRAPH)
    document = (await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}/export")).json()
    assert await apply(people.owner, document) == {"Exported": "unchanged"}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"workflows": [named("A"), GRAPH]}, "workflows.1.name"),
        ({"workflows": [named("A"), named("A")]}, "workflows.1.name"),
        ({"workflows": [named("A", status="gone")]}, "workflows.0.status"),
        ({"workflows": [named("A", nodes=[{"id": "x", "type": "sett"}])]}, "workflows.0.nodes.0"),
        ({"workflows": [named("A", nodes=3)]}, "workflows.0.nodes"),
        ({"workflows": [named("A", nodse=[])]}, "workflows.0.nodse"),
        ({"workflows": [], "prune": "archive"}, "set"),
        ({"workflows": [], "set": "no spaces"}, "set"),
        ({"workflows": [named(f"W{n}") for n in range(201)]}, "workflows"),
        ({"workflows": [3]}, "workflows.0"),
        ({}, "workflows"),
    ],
    ids=range(11),
)
async def test_a_wrong_request_changes_nothing_and_names_every_field(
    people: OrganizationUsers, body: dict[str, Any], path: str
) -> None:
    refused = await people.owner.api.post(f"{WORKFLOWS}/apply", json=body)
    assert_refused(refused, 422, "validation-failed")
    assert refused.json()["error"]["details"][0]["path"].startswith(path)
    assert (await people.owner.api.get(WORKFLOWS)).json()["count"] == 0


async def test_an_active_workflow_never_becomes_invalid(people: OrganizationUsers) -> None:
    await apply(people.owner, named("Active", status="active"))
    cycle = {"sourceNodeId": "step", "targetNodeId": "step"}
    refused = await post_apply(people.owner, named("First"), named("Active", connections=[EDGE, cycle]))
    assert_refused(refused, 422, "validation-failed")
    assert (await people.owner.api.get(WORKFLOWS)).json()["count"] == 1


async def test_applications_at_once_create_each_workflow_once(people: OrganizationUsers) -> None:
    wanted = [named(f"W{number}") for number in range(10)]
    done = await asyncio.gather(*(apply(people.owner, *wanted, set="shop") for _ in range(4)))
    actions = [set(one.values()) for one in done]
    assert (actions.count({"create"}), actions.count({"unchanged"})) == (1, 3)
    assert (await people.owner.api.get(WORKFLOWS)).json()["count"] == 10
