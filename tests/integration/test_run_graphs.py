"""Graph of a run, differences between two runs of a node, and statistics of nodes, on both databases."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.executions import node_statistics, run_graph_rows
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient
from tests.integration.test_waiting_runs import execute_workflow, get_json, serve_worker, wait_until_ended

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
    harness: GatewayHarness, people: OrganizationUsers
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


def test_quantiles_are_values_that_were_measured() -> None:
    values = list(range(1, 101))
    assert node_statistics.quantile(values, 95) == 95
    assert node_statistics.quantile(values, 50) == 50
    assert node_statistics.quantile([7], 95) == 7
    assert node_statistics.quantile([], 95) is None


async def test_a_summary_of_a_run_has_the_fields_of_a_list_and_its_lease(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(nodes=NODES, connections=EDGES)
    run = await execute_workflow(people.owner, workflow_id, total=1, lines=[])
    (listed,) = (await get_json(people.owner, f"?workflow_id={workflow_id}"))["executions"]
    assert await get_json(people.owner, f"/{run}?summary=true") == {**listed, "attempt": 0, "lease": None}
    refused = await people.stranger.api.get(f"/api/v1/executions/{run}?summary=true")
    assert refused.status_code == 404
