"""Pages and answers of runs whose nodes are in every state, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import col

from engine.run_records import NodeSpan, SpanStatus
from gateway import routes
from gateway.dashboard.pages import run_node
from gateway.dashboard.pages.run import VIEWS
from gateway.http.operation_docs import EVENT_STREAM
from journal.store import RunWrite
from models.execution import Execution
from models.loss_limits import MAX_LOST_ATTEMPTS
from tests.custom_types import custom_graph, custom_type
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient
from tests.integration.test_waiting_runs import (
    ASKS,
    claim_for_dead_worker,
    execute_workflow,
    get_json,
    serve_worker,
    sub_workflow_graph,
    wait_until_ended,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.every_database]


def order_graph(backoff: float) -> dict[str, Any]:
    """Return a graph that loops, skips a branch, and fails at a request that is retried once."""
    condition = {"left": "{{ trigger.body.total }}", "operator": "greater-than", "right": 5}
    return {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "lines", "nodeId": "loop", "config": {"items": [{"sku": "a"}, {"sku": "b"}]}},
            {"id": "each", "nodeId": "set", "config": {"values": {"line": "{{ item.sku }}"}}},
            {"id": "large", "nodeId": "conditional", "config": {"condition": condition}},
            {"id": "small", "nodeId": "set", "config": {"values": {"small": True}}},
            {
                "id": "call",
                "nodeId": "http-request",
                "config": {"url": "https://orders.invalid/", "method": "POST"},
                "retry": {"maxAttempts": 2, "backoff": backoff},
            },
            {"id": "after", "nodeId": "set", "config": {"values": {"sent": True}}},
        ],
        "connections": [
            {"source": "start", "target": "lines"},
            {"source": "lines", "sourcePort": "continue", "target": "each"},
            {"source": "lines", "sourcePort": "done", "target": "large"},
            {"source": "large", "sourcePort": "true", "target": "call"},
            {"source": "large", "sourcePort": "false", "target": "small"},
            {"source": "call", "target": "after"},
        ],
    }


async def waiting_graph(person: UserClient) -> dict[str, Any]:
    """Return a graph that waits for a person, for a task of a custom type, and for another run."""
    assert (await person.api.post("/api/v1/workflow-nodes", json=custom_type())).is_success
    graphs = (ASKS, custom_graph(), sub_workflow_graph(await person.create(**ASKS)))
    return {
        "nodes": list({node["id"]: node for graph in graphs for node in graph["nodes"]}.values()),
        "connections": [edge for graph in graphs for edge in graph["connections"]],
    }


async def wait_for_states(person: UserClient, execution_id: str, *states: tuple[str, str]) -> None:
    """Wait until nodes of a run have these states, each with its node."""
    while True:
        graph = await get_json(person, f"/{execution_id}/graph")
        if {*states} <= {(state["nodeId"], state["status"]) for state in graph["states"]}:
            return
        await asyncio.sleep(0.05)


async def lose_worker(harness: GatewayHarness, person: UserClient, workflow_id: str) -> str:
    """Start a run whose worker begins the node `call` and is never heard of again; return the run's id."""
    execution_id = await execute_workflow(person, workflow_id)
    run = await claim_for_dead_worker(harness, execution_id)
    begun = NodeSpan("call", "", "http-request", SpanStatus.RUNNING, sequence=1, started_at=datetime.now(UTC))
    assert await harness.gateway.store.record([RunWrite(execution_id, run.shard, run.token, spans=[begun])])
    return execution_id


async def make_runs(harness: GatewayHarness, person: UserClient) -> Sequence[str]:
    """Return the ids of runs whose nodes were retried, lost, skipped, canceled, reused, or wait."""
    graph = order_graph(0.01)
    retried_workflow = await person.create(status="active", **graph)
    call_alone = [node for node in graph["nodes"] if node["id"] in {"start", "call"}]
    lost_workflow = await person.create(nodes=call_alone, connections=[{"source": "start", "target": "call"}])
    lost, crashed = [await lose_worker(harness, person, lost_workflow) for _ in range(2)]
    poison = update(Execution).where(col(Execution.id) == crashed).values(attempt=MAX_LOST_ATTEMPTS)
    await harness.gateway.database.transaction(lambda connection: connection.execute(poison))
    async with serve_worker(harness):
        retried = await execute_workflow(person, retried_workflow, total=9)
        retrying = await execute_workflow(person, await person.create(**order_graph(3_600)), total=9)
        waits = await person.create(**await waiting_graph(person))
        waiting, canceled = [await execute_workflow(person, waits) for _ in range(2)]
        for execution_id in (waiting, canceled):
            await wait_for_states(
                person, execution_id, ("ask", "waiting"), ("work", "waiting"), ("sub", "waiting")
            )
        await wait_for_states(person, retrying, ("call", "retrying"))
        assert (await person.api.post(f"/api/v1/executions/{canceled}/cancel")).is_success
        for execution_id in (retried, lost, crashed, canceled):
            await wait_until_ended(person, execution_id)
        replayed = (
            await person.api.post(f"/api/v1/executions/{retried}/replay", json={"confirm": ["call"]})
        ).json()
        reused: str = replayed["executionId"]
        await wait_until_ended(person, reused)
    return retried, retrying, lost, crashed, waiting, canceled, reused


def list_addresses(
    execution: Mapping[str, Any], graph: Mapping[str, Any], spans: Sequence[str]
) -> Iterator[str]:
    """Yield the address of every page and GET that ends by itself; of those with the id of a run or workflow, for this
    run, and for each of its nodes, spans and tabs.
    """
    own_ids = {"executions": execution["id"], "runs": execution["id"], "workflows": execution["workflowId"]}
    nodes = [node["id"] for node in graph["nodes"]]
    for route in (*routes.TABLE, *routes.FOR_BROWSERS):
        _, *folders = route.path.split("/")
        if route.method != "GET" or "*" in folders or route.docs.media_type == EVENT_STREAM:
            continue
        if "{id}" not in folders:
            yield route.path
            continue
        own_id = own_ids.get(folders[folders.index("{id}") - 1])
        if own_id is None:
            continue
        path = route.path.replace("{id}", own_id)
        if "{sub}" in path:
            yield from (path.replace("{sub}", name) for name in (*nodes, *spans))
        elif path.endswith("/progress"):
            yield f"{path}?wait=0"
        elif "{" not in path:
            yield path
        if route.path == "/dashboard/runs/{id}":
            yield from (f"{path}?view={view}" for view in VIEWS)
            yield from (f"{path}?node={node}" for node in nodes)
            yield from (f"{path}?tab={tab}" for tab in run_node.TABS)


async def test_every_page_and_answer_opens_for_runs_whose_nodes_are_in_any_state(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    reader = people.admin
    browser = await harness.browser()
    assert (await browser.post("/session", json={"key": reader.key})).is_success
    opened = set[str]()
    states = set[str]()
    broken = []
    for execution_id in await make_runs(harness, reader):
        execution = await get_json(reader, f"/{execution_id}")
        graph = await get_json(reader, f"/{execution_id}/graph")
        spans = (await get_json(reader, f"/{execution_id}/spans?limit=100"))["spans"]
        states |= {"reused" if span["reusedFrom"] else span["status"] for span in spans}
        for address in list_addresses(execution, graph, [span["id"] for span in spans]):
            if address not in opened and (await browser.get(address)).is_server_error:
                broken.append(address)
            opened.add(address)
    assert states == {"completed", "failed", "retrying", "reused", "running", "skipped", "waiting"}
    assert not broken
    # Skipped nodes count as well: a list must not say that they have completed.
    assert ">Nodes settled<" in (await browser.get("/dashboard/runs")).text
