"""Graph of a run, differences between two runs of a node, and statistics of nodes, on both databases."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.executions import execution_rows, node_statistics, run_graph_rows
from gateway.executions.run_graph_rows import RunHead
from gateway.workflows import version_rows
from journal.store import ExecutionKey
from models import schema_migration
from models.access import ApiCaller, UserRole
from models.workflow import WorkflowVersion
from scheduler.run_hours import RunHourCounter
from tests.integration.gateway_harness import GRAPH, TRIGGER, GatewayHarness, OrganizationUsers, UserClient
from tests.integration.query_plans import explain_statement
from tests.integration.test_waiting_runs import execute_workflow, get_json, serve_worker, wait_until_ended
from tests.upgrades import schemas

SECRET = "sk-live-0123456789abcdefghij"
NODES: list[dict[str, Any]] = [
    {"id": "start", "nodeId": "manual"},
    {"id": "lines", "nodeId": "loop", "config": {"items": "{{ data.body.lines }}"}},
    {"id": "each", "nodeId": "set", "config": {"mode": "replace", "values": {"sku": "{{ item }}"}}},
    {"id": "large", "nodeId": "conditional"},
    {"id": "small", "nodeId": "set", "config": {"mode": "replace", "values": {"small": True}}},
    {
        "id": "note",
        "nodeId": "set",
        "config": {"mode": "replace", "values": {"total": "{{ trigger.body.total }}", "by": "Ada"}},
    },
]
NODES[3]["config"] = {
    "condition": {"left": "{{ trigger.body.total }}", "operator": "greater-than", "right": 5_000}
}
EDGES = [
    {"source": "start", "target": "lines"},
    {"source": "lines", "sourcePort": "continue", "target": "each"},
    {"source": "lines", "sourcePort": "done", "target": "large"},
    {"source": "large", "sourcePort": "true", "target": "note"},
    {"source": "large", "sourcePort": "false", "target": "small"},
]


async def run_order(person: UserClient, workflow_id: str, total: int, lines: int = 3) -> str:
    run = await execute_workflow(
        person, workflow_id, total=total, lines=[f"sku-{number}" for number in range(lines)]
    )
    await wait_until_ended(person, run)
    return run


@pytest.mark.every_database
async def test_a_run_shows_the_definition_that_ran_with_the_state_of_each_node(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    headers = {"Authorization": f"Bearer {SECRET}"}
    config = {"url": "https://a.invalid/", "method": "GET", "headers": headers}
    secret = {"id": "call", "nodeId": "http-request", "config": config}
    workflow_id = await owner.create(
        nodes=[*NODES, secret], connections=[*EDGES, {"source": "small", "target": "call"}]
    )
    async with serve_worker(harness):
        first = await run_order(owner, workflow_id, 9_000)
        run = await run_order(owner, workflow_id, 9_000, lines=run_graph_rows.SHOWN_ITERATIONS + 5)
    graph = await get_json(owner, f"/{run}/graph")
    assert [node["id"] for node in graph["nodes"]] == [node["id"] for node in [*NODES, secret]]
    assert all("config" not in node and node["position"]["x"] >= 0 for node in graph["nodes"])
    assert graph["nodes"][0]["effect"] == "pure"
    assert graph["nodes"][-1]["effect"] == "read", "by the method of the request"
    assert len(graph["connections"]) == len(EDGES) + 1
    assert graph["isCurrent"] is True
    assert graph["previousExecutionId"] == first
    states = {one["nodeId"]: one for one in graph["states"]}
    assert states["large"]["port"] == "true"
    assert states["note"]["previousDurationMs"] is not None
    assert states["small"]["status"] == "skipped"
    assert states["lines"]["iterations"] == [], (
        "records of a loop about its iterations are no iterations of it"
    )
    assert states["each"]["iterationCounts"] == {"completed": run_graph_rows.SHOWN_ITERATIONS + 5}
    assert [one["iteration"] for one in states["each"]["iterations"]] == [
        str(number) for number in range(run_graph_rows.SHOWN_ITERATIONS)
    ]
    assert states["each"]["status"] == "completed"
    assert states["each"]["endedAt"] >= states["each"]["startedAt"]
    assert "outputData" not in str(graph)

    edited = await owner.api.put(
        f"/api/v1/workflows/{workflow_id}", json={"nodes": NODES[:1], "connections": []}
    )
    assert edited.status_code == 200, edited.text
    later = await get_json(owner, f"/{run}/graph?expand=config")
    assert later["isCurrent"] is False
    assert len(later["nodes"]) == len(NODES) + 1, "the workflow has changed, the run has not"
    assert SECRET not in str(later)
    assert later["nodes"][-1]["config"]["url"] == "https://a.invalid/"
    last = await get_json(owner, f"/{run}/spans/each?iteration={run_graph_rows.SHOWN_ITERATIONS + 4}")
    assert last["outputData"] == {"sku": f"sku-{run_graph_rows.SHOWN_ITERATIONS + 4}"}
    assert (await people.stranger.api.get(f"/api/v1/executions/{run}/graph")).status_code == 404
    await owner.api.delete(f"/api/v1/workflows/{workflow_id}")
    assert (await get_json(owner, f"/{run}/graph"))["isCurrent"] is None


async def read_version_before(person: UserClient, query: str) -> int | None:
    """Return the version to go back to of the only group of failed runs."""
    (group,) = (await person.api.get(f"/api/v1/executions/failures{query}")).json()["groups"]
    version: int | None = group["previousVersion"]
    return version


@pytest.mark.every_database
async def test_a_run_has_the_number_of_its_version(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await owner.create(name="Orders", **GRAPH)
    path = f"/api/v1/workflows/{workflow_id}"
    fatal = {"id": "step", "nodeId": "stop-with-error", "label": "Write", "config": {"message": "No"}}
    async with serve_worker(harness):
        good = await execute_workflow(owner, workflow_id)
        assert (await wait_until_ended(owner, good))["status"] == "completed"
        edited = await owner.api.put(path, json={"nodes": [TRIGGER, fatal]})
        assert edited.status_code == 200, edited.text
        tagged = await people.admin.api.put(path, json={"tags": ["later"]})
        assert tagged.status_code == 200, tagged.text
        failed = await execute_workflow(owner, workflow_id)
        assert (await wait_until_ended(owner, failed))["status"] == "failed"

    async def read_versions(execution_id: str) -> set[tuple[int | None, int | None]]:
        """Return the version of a run and that of its base, as the answer and its summary have them."""
        shown = [await get_json(owner, f"/{execution_id}{query}") for query in ("", "?summary=true")]
        return {(one["version"], one.get("baseVersion")) for one in shown}

    assert await read_versions(good) == {(1, None)}
    assert await read_versions(failed) == {(None, 1)}
    listed = (await get_json(owner, f"?workflow_id={workflow_id}"))["executions"]
    assert {one["id"]: one["version"] for one in listed} == {good: 1, failed: None}
    graph = await get_json(owner, f"/{failed}/graph")
    assert (graph["previousExecutionId"], graph["previousVersion"]) == (good, 1)
    # A later change of its tags is none of the definition.
    assert graph["lastChange"] == {
        "at": graph["lastChange"]["at"],
        "userId": owner.user.id,
        "userName": owner.user.name or owner.user.email,
    }
    assert graph["lastChange"]["at"] < (await get_json(owner, f"/{failed}"))["createdAt"]
    assert (await get_json(owner, f"/{good}/graph"))["lastChange"] is None
    page = (await owner.api.get(f"/dashboard/runs/{failed}")).text
    assert "edit of version 1</a>" in page
    assert "act=restore&amp;version=1" in page
    assert 'id="change"' in page
    assert "versions?from=1&amp;to=current" in page
    # The overview leads back to the version until the workflow is changed again.
    await RunHourCounter(harness.gateway.database).count_runs()
    assert await read_version_before(owner, "?expand=previousVersion") == 1
    assert await read_version_before(owner, "") is None
    assert "Go back to version 1…" in (await owner.api.get("/dashboard/overview")).text
    assert "Go back to version 1…" in page

    for tag in ("v2", "v3"):
        stored = await owner.api.post(f"{path}/versions", json={"versionTag": tag})
        assert stored.status_code == 201, stored.text
    assert await read_versions(failed) == {(2, None)}, "the first that was stored afterwards"
    assert (await get_json(owner, f"/{failed}/same-failures"))["executions"][0]["version"] == 2
    assert ">version 2</a>" in (await owner.api.get(f"/dashboard/runs/{failed}")).text

    def move_third(connection: AsyncConnection) -> Awaitable[object]:
        third = update(WorkflowVersion).where(
            col(WorkflowVersion.workflow_id) == workflow_id, col(WorkflowVersion.version) == 3
        )
        return connection.execute(third.values(created_at=datetime(2020, 1, 1, tzinfo=UTC)))

    await harness.gateway.database.transaction(move_third)
    assert await read_versions(failed) == {(3, None)}, "the newest that was stored before"

    changed = await people.admin.api.put(f"{path}/nodes/step", json={"config": {"message": "Yes"}})
    assert changed.status_code == 200, changed.text
    assert await read_version_before(owner, "?expand=previousVersion") is None
    assert (await get_json(owner, f"/{failed}/graph"))["lastChange"] == graph["lastChange"]
    # Who may not read a workflow, such as a deleted one, learns nothing of its changes.
    await owner.api.delete(path)
    assert (await get_json(owner, f"/{failed}/graph"))["lastChange"] is None


async def test_a_change_before_the_last_completed_run_is_not_the_last_change(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await owner.create(name="Orders", **GRAPH)
    path = f"/api/v1/workflows/{workflow_id}"
    edited = await owner.api.put(path, json={"settings": {"timeout": 60}})
    assert edited.status_code == 200, edited.text
    async with serve_worker(harness):
        good = await execute_workflow(owner, workflow_id)
        assert (await wait_until_ended(owner, good))["status"] == "completed"
    other = await owner.api.post(f"{path}/execute", json={"definition": {"nodes": [TRIGGER]}})
    assert other.status_code == 201, other.text
    graph = await get_json(owner, f"/{other.json()['executionId']}/graph")
    assert (graph["previousExecutionId"], graph["lastChange"]) == (good, None)


@pytest.mark.every_database
async def test_versions_of_older_releases_are_those_of_their_runs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, database = people.owner, harness.gateway.database
    workflow_id = await owner.create(**GRAPH, settings={"timeout": 60})
    run = await execute_workflow(owner, workflow_id)
    await schemas.downgrade(database.url.render_as_string(hide_password=False), "0058")
    await schema_migration.migrate(database.url)
    assert (await get_json(owner, f"/{run}"))["version"] == 1


@pytest.mark.every_database
async def test_versions_of_runs_are_found_by_indexes(harness: GatewayHarness) -> None:
    database, now = harness.gateway.database, datetime(2026, 1, 1, tzinfo=UTC)
    head = RunHead("org_1", "wf_1", "hash", now, "failed")
    statements = {
        "ix_workflow_version_definition": version_rows.select_versions_of_runs(1, ["exec_1", "exec_2"]),
        "INDEX": version_rows.select_newest_version("wf_1", now),
        "ix_execution_data_workflow": run_graph_rows.completed_before(ExecutionKey("exec_1", 1), head),
        "ix_audit_entry_object": run_graph_rows.changes_statement(head, head),
    }
    for index, statement in statements.items():
        plan = await explain_statement(database, statement)
        assert index.casefold() in plan.casefold()
        for table in ("execution", "execution_data", "workflow_version", "audit_entry"):
            assert f"SCAN {table}'" not in plan
            assert f"Seq Scan on {table} " not in plan


async def test_the_worst_iteration_is_the_state_of_a_node_in_a_loop(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nodes = [
        NODES[0],
        {**NODES[1], "config": {"items": "{{ data.body.lines }}", "onItemError": "continue"}},
        {"id": "check", "nodeId": "stop-with-error", "config": {"message": "No"}},
    ]
    workflow_id = await people.owner.create(
        nodes=nodes,
        connections=[EDGES[0], {"source": "lines", "sourcePort": "continue", "target": "check"}],
    )
    async with serve_worker(harness):
        run = await run_order(people.owner, workflow_id, 1)
    (state,) = [
        one for one in (await get_json(people.owner, f"/{run}/graph"))["states"] if one["nodeId"] == "check"
    ]
    assert state["status"] == "failed"
    assert state["iterationCounts"]["failed"] >= 1


async def test_a_node_is_compared_with_the_last_completed_run_by_path(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await owner.create(nodes=NODES, connections=EDGES)
    async with serve_worker(harness):
        first = await run_order(owner, workflow_id, 6_000)
        alone = await get_json(owner, f"/{first}/spans/note/diff")
        assert (alone["with"], alone["input"]) == (None, None)
        changed = [{**node} for node in NODES]
        changed[5] = {
            **NODES[5],
            "config": {"mode": "replace", "values": {"total": "{{ trigger.body.total }}", "by": "Bo"}},
        }
        await owner.api.put(f"/api/v1/workflows/{workflow_id}", json={"nodes": changed})
        second = await run_order(owner, workflow_id, 7_000)
    found = await get_json(owner, f"/{second}/spans/note/diff")
    assert found["with"]["executionId"] == first
    assert sorted(found["output"]["changes"], key=lambda change: change["path"]) == [
        {"path": "by", "before": "Ada", "after": "Bo"},
        {"path": "total", "before": 6_000, "after": 7_000},
    ]
    assert found["definition"]["changes"] == [{"path": "values.by", "before": "Ada", "after": "Bo"}]
    assert {change["path"] for change in found["config"]["changes"]} == {"values.by"}
    same = await get_json(owner, f"/{second}/spans/each/diff?iteration=1&with={first}")
    assert same["output"] == {"changes": [], "equalPaths": 1, "isCut": False}
    assert same["iteration"] == "1"
    hidden = await people.stranger.create(nodes=NODES, connections=EDGES, status="active")
    foreign = await people.stranger.api.post(f"/api/v1/workflows/{hidden}/execute", json={})
    refused = await owner.api.get(
        f"/api/v1/executions/{second}/spans/note/diff?with={foreign.json()['executionId']}"
    )
    assert refused.status_code == 404
    assert (await owner.api.get(f"/api/v1/executions/{second}/spans/none/diff")).status_code == 404


@pytest.mark.every_database
async def test_statistics_count_the_ends_and_failures_of_each_node(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = people.owner
    nodes = [NODES[0], {"id": "check", "nodeId": "stop-with-error", "config": {"message": "No"}}]
    nodes.append(
        {
            "id": "odd",
            "nodeId": "conditional",
            "config": {"condition": {"left": "{{ data.body.total }}", "operator": "equals", "right": 1}},
        }
    )
    edges = [
        {"source": "start", "target": "odd"},
        {"source": "odd", "sourcePort": "true", "target": "check"},
    ]
    workflow_id = await owner.create(nodes=nodes, connections=edges)
    async with serve_worker(harness):
        for total in (1, 2, 2):
            await run_order(owner, workflow_id, total)
    found = (await owner.api.get(f"/api/v1/workflows/{workflow_id}/statistics")).json()
    assert found["runs"] == 3
    assert [one["nodeId"] for one in found["nodes"]] == ["check", "odd", "start"]
    of_node = {one["nodeId"]: one for one in found["nodes"]}
    assert (of_node["odd"]["ended"], of_node["odd"]["failed"]) == (3, 0)
    assert (of_node["check"]["ended"], of_node["check"]["failed"]) == (1, 1)
    assert of_node["odd"]["p95Ms"] >= of_node["odd"]["p50Ms"] >= 0
    answer = await people.stranger.api.get(f"/api/v1/workflows/{workflow_id}/statistics")
    assert answer.status_code == 404
    monkeypatch.setattr(node_statistics, "SPANS", 4)
    newest = (await owner.api.get(f"/api/v1/workflows/{workflow_id}/statistics")).json()
    assert [(one["nodeId"], one["ended"]) for one in newest["nodes"]] == [("odd", 2), ("start", 2)]
    assert newest["runs"] == 2


def test_quantiles_are_values_that_were_measured() -> None:
    values = list(range(1, 101))
    assert node_statistics.quantile(values, 95) == 95
    assert node_statistics.quantile(values, 50) == 50
    assert node_statistics.quantile([7], 95) == 7
    assert node_statistics.quantile([], 95) is None


@pytest.mark.every_database
async def test_a_run_names_those_in_its_place(harness: GatewayHarness, people: OrganizationUsers) -> None:
    owner = people.owner
    fatal = {"id": "step", "nodeId": "stop-with-error", "config": {"message": "No"}}
    workflow_id = await owner.create(**{**GRAPH, "nodes": [TRIGGER, fatal]})
    async with serve_worker(harness):
        run = await execute_workflow(owner, workflow_id)
        await wait_until_ended(owner, run)
        assert "successors" not in await get_json(owner, f"/{run}?summary=true")
        resumed = (await owner.api.post(f"/api/v1/executions/{run}/resume")).json()["executionId"]
        await wait_until_ended(owner, resumed)
        again = {"again": True, "definition": "original"}
        replay = await owner.api.post(f"/api/v1/executions/{run}/replay", json=again)
        replayed = replay.json()["executionId"]
        await wait_until_ended(owner, replayed)
    for query in ("", "?summary=true"):
        found = (await get_json(owner, f"/{run}{query}"))["successors"]
        assert {(one["id"], one["kind"], one["status"]) for one in found} == {
            (resumed, "resume", "failed"),
            (replayed, "replay", "failed"),
        }
    page = (await owner.api.get(f"/dashboard/runs/{run}?node=step")).text
    assert page.count("data-successor") == 2
    assert "Nothing happens until" not in page
    assert f"/dashboard/runs/{run}/replay?from=step" in page
    user = owner.user
    caller = ApiCaller("", user.id, user.organization_id, user.shard, UserRole.MEMBER, frozenset())
    statement = execution_rows.successors_statement(caller, run, run)
    plan = await explain_statement(harness.gateway.database, statement)
    assert "Seq Scan on execution " not in plan
    assert "SCAN execution'" not in plan


async def test_a_summary_of_a_run_has_the_fields_of_a_list_and_its_lease(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(nodes=NODES, connections=EDGES)
    run = await execute_workflow(people.owner, workflow_id, total=1, lines=[])
    (listed,) = (await get_json(people.owner, f"?workflow_id={workflow_id}"))["executions"]
    assert await get_json(people.owner, f"/{run}?summary=true") == {**listed, "attempt": 0, "lease": None}
    refused = await people.stranger.api.get(f"/api/v1/executions/{run}?summary=true")
    assert refused.status_code == 404


@pytest.mark.every_database
async def test_a_called_tool_has_a_state_with_its_calls_and_their_time(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    own = {
        "name": "remember",
        "description": "Remembers.",
        "parameters": {"type": "object"},
        "target": {"node": {"type": "set", "config": {"values": {"done": True}}}},
    }
    nodes = [
        {"id": "start", "nodeId": "manual"},
        {"id": "agent", "nodeId": "agent", "config": {"model": "echo", "prompt": "Use remember."}},
        {"id": "memory", "nodeId": "tool", "config": own},
        {"id": "other", "nodeId": "set", "config": {"values": {"done": False}}},
    ]
    edges = [{"source": "start", "target": "agent"}]
    edges += [{"source": tool, "target": "agent", "targetPort": "tools"} for tool in ("memory", "other")]
    workflow_id = await people.owner.create(nodes=nodes, connections=edges)
    async with serve_worker(harness):
        run = await execute_workflow(people.owner, workflow_id)
        assert (await wait_until_ended(people.owner, run))["status"] == "completed"
    states = {state["nodeId"]: state for state in (await get_json(people.owner, f"/{run}/graph"))["states"]}
    assert set(states) == {"start", "agent", "memory"}, "the other tool was not called"
    memory = states["memory"]
    assert (memory["status"], memory["calls"], "calls" in states["agent"]) == ("completed", 1, False)
    (call,) = [
        step for step in (await get_json(people.owner, f"/{run}/steps"))["steps"] if step["kind"] == "tool"
    ]
    assert (memory["startedAt"], memory["endedAt"]) == (call["startedAt"], call["endedAt"])
    browser = await harness.browser()
    assert (await browser.post("/session", json={"key": people.owner.key})).is_success
    page = (await browser.get(f"/dashboard/runs/{run}")).text
    assert "tool · 1 call" in page
    assert page.count("not reached") == 2, "the other tool, in the list and in the summary"
