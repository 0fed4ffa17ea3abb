"""Pages of the dashboard without a browser: sign-in, policy, escaping and rights."""

from __future__ import annotations

import asyncio
import hashlib
import html
import re
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from typing import Any

import httpx2
import msgspec
import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from engine.model_calls import FailedModelCall, ModelSettlement, TokenUsage
from engine.services import RunCaller
from execution.stored_model_ledger import StoredModelLedger
from gateway.dashboard import assets, routes
from gateway.dashboard.page import POLICY
from gateway.dashboard.pages import access, ai_registry, overview
from gateway.dashboard.pages import run as run_page
from gateway.dashboard.pages import workflow as workflow_page
from gateway.drift import recent_observations
from gateway.executions import source_usage
from models import ids
from models.access import ApiKey, UserRole
from models.blocked_interval import BlockedInterval
from models.deployment import ObservedState
from models.execution import Execution, SpanRow
from models.execution_status import ExecutionStatus
from models.ingest import SenderToken
from models.timestamps import hour_of
from scheduler.run_hours import RunHourCounter
from tests.fakes.mcp_server import build_tool, serve_tools
from tests.integration import input_waits
from tests.integration.deployed_workflows import deploy_with_pod
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, create_gateway
from tests.integration.test_gateway_ai_models import allow_loopback, create_model, create_provider
from tests.integration.test_gateway_enqueue import QUEUE
from tests.integration.test_gateway_tool_servers import accept_offered, create_tool_server, refresh
from tests.integration.test_waiting_runs import execute_workflow, serve_worker, wait_until_ended
from tests.services import PostgresServer

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>"
HOSTILE = f"{MARKUP}\"'{{{{ 7 * 7 }}}}"


@pytest.fixture(scope="module")
async def harness(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    async with create_gateway("sqlite", postgres, tmp_path_factory.mktemp("dashboard")) as harness:
        yield harness


async def sign_in(harness: GatewayHarness, key: str) -> httpx2.AsyncClient:
    browser = await harness.browser()
    assert (await browser.post("/session", json={"key": key})).status_code == 201
    return browser


async def test_the_root_leads_to_the_sign_in_and_from_there_to_the_wanted_page(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await harness.browser()
    browser.follow_redirects = True
    page = await browser.get("/")
    assert page.url.path == "/sign-in"
    assert page.url.params["next"].startswith("/dashboard")
    assert "API key" in page.text
    assert '<span class="faint end">localhost:8000</span>' in page.text
    wanted = await browser.get("/dashboard/runs?status=failed")
    assert wanted.url.params["next"] == "/dashboard/runs?status=failed"
    signed_in = await sign_in(harness, people.owner.key)
    signed_in.follow_redirects = True
    assert "<h1>Runs</h1>" in (await signed_in.get("/dashboard/runs")).text


async def test_plain_http_from_elsewhere_gets_a_page_that_explains_it(harness: GatewayHarness) -> None:
    browser = await harness.browser(address="10.0.0.9", host="flows.example.com")
    page = await browser.get("/sign-in")
    assert "Signing in needs HTTPS" in page.text
    assert "PILOTFLAME_PUBLIC_URL" in page.text
    assert 'type="password"' not in page.text


async def test_every_answer_has_the_strict_policy_and_is_not_stored(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await sign_in(harness, people.owner.key)
    for path, status in (("/sign-in", 200), ("/dashboard/runs", 200), ("/dashboard/nothing", 404)):
        page = await browser.get(path)
        assert page.status_code == status
        assert page.headers["Content-Security-Policy"] == POLICY
        assert page.headers["Cache-Control"] == "no-store"
        assert "Cookie" in page.headers["Vary"]
        assert not re.search(r"\sstyle=|<script>|\son[a-z]+=|javascript:", page.text)
    assert "unsafe" not in POLICY


async def test_an_unchanged_page_is_sent_once(harness: GatewayHarness, people: OrganizationUsers) -> None:
    owner = people.owner
    workflow_id = await owner.create(status="active", **GRAPH)
    started = await owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    run_id = started.json()["executionId"]
    # A run that has not ended waits longer and longer, as its page shows.
    assert (await owner.api.post(f"/api/v1/executions/{run_id}/cancel")).is_success
    browser = await sign_in(harness, owner.key)
    for path in (
        *("/dashboard/overview", "/dashboard/runs", f"/dashboard/runs/{run_id}"),
        f"/dashboard/workflows/{workflow_id}",
    ):
        shown = await browser.get(path)
        tag = shown.headers["ETag"]
        assert f'data-tag="{tag}"' in html.unescape(shown.text)
        again = await browser.get(path, headers={"If-None-Match": tag})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag), path
    other = await browser.get(f"{path}?view=table", headers={"If-None-Match": tag})
    assert other.status_code == 200


async def test_texts_of_users_are_shown_as_text(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(name=HOSTILE, status="active", **GRAPH)
    await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    browser = await sign_in(harness, people.owner.key)
    page = await browser.get("/dashboard/runs", params={"trigger_type": HOSTILE})
    assert "<img" not in page.text
    assert "<script>" not in page.text
    page = await browser.get("/dashboard/runs")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "<img" not in page.text


async def test_a_page_shows_only_objects_that_its_visitor_may_see(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="A secret plan", status="active", **GRAPH)
    started = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    execution_id = started.json()["executionId"]
    for person, sees in ((people.owner, True), (people.colleague, False), (people.stranger, False)):
        page = await (await sign_in(harness, person.key)).get("/dashboard/runs")
        assert (execution_id in page.text) is sees
        assert ("A secret plan" in page.text) is sees
    viewer = await harness.person(await harness.organization(), UserRole.VIEWER)
    assert (await (await sign_in(harness, viewer.key)).get("/dashboard/runs")).status_code == 200


async def test_a_run_shows_its_lease_and_the_processes_that_it_has_lost(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(status="active", **GRAPH)
    started = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    path = f"/api/v1/executions/{started.json()['executionId']}"
    pending = (await people.owner.api.get(path)).json()
    assert (pending["attempt"], pending["lease"]) == (0, None)
    until = harness.gateway.clock() + timedelta(hours=1)
    held = {"status": ExecutionStatus.RUNNING, "lease_owner": "worker-of-today", "lease_until": until}
    span = SpanRow(
        execution_id=pending["id"],
        node_id="step",
        shard=people.owner.user.shard,
        id=ids.new_id("span"),
        sequence=1,
        label="Step",
        type="set",
        status="running",
        started_at=harness.gateway.clock(),
    )
    browser = await sign_in(harness, people.owner.key)
    page = (await browser.get(f"/dashboard/runs/{pending['id']}")).text
    assert "Why it does not move" in page

    async def claim(connection: AsyncConnection) -> None:
        of_run = col(Execution.id) == pending["id"]
        await connection.execute(update(Execution).where(of_run).values(attempt=2, **held))
        await connection.execute(insert(SpanRow).values(span.model_dump()))

    await harness.gateway.database.transaction(claim)
    for query in ("", "?summary=true"):
        running = (await people.owner.api.get(path + query)).json()
        assert running["attempt"] == 2
        assert running["lease"]["owner"] == "worker-of-today"
    listed = (await people.owner.api.get("/api/v1/executions?status=running")).json()["executions"]
    assert all(not {"attempt", "lease"} & set(one) for one in listed)
    page = (await browser.get(f"/dashboard/runs/{pending['id']}")).text
    assert "1 process lost" in page
    assert "worker-of-today" in page
    assert "What it is doing" in page
    assert re.search(r'aria-labelledby="why" data-still-from="[^"]+Z" hidden>', page), (
        "it moves until seconds pass"
    )


async def test_texts_of_a_run_are_shown_as_text(harness: GatewayHarness, people: OrganizationUsers) -> None:
    nodes = [
        {"id": "start", "nodeId": "manual", "label": HOSTILE},
        {"id": "step", "nodeId": "set", "label": HOSTILE, "config": {"values": {"a": MARKUP}}},
    ]
    edges = [{"sourceNodeId": "start", "targetNodeId": "step"}]
    workflow_id = await people.owner.create(
        name=HOSTILE, description=HOSTILE, status="active", nodes=nodes, connections=edges
    )
    started = await people.owner.api.post(
        f"/api/v1/workflows/{workflow_id}/execute", json={"triggerInputs": {HOSTILE: HOSTILE}}
    )
    execution_id = started.json()["executionId"]
    await fail_with(harness, execution_id, HOSTILE)
    browser = await sign_in(harness, people.owner.key)
    for query in ("", "?node=step&tab=config", "?node=step&tab=output", "?node=step&tab=logs", "?view=map"):
        page = await browser.get(f"/dashboard/runs/{execution_id}{query}")
        assert page.status_code == 200
        assert "<img" not in page.text
        assert "<script>" not in page.text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text


async def test_a_data_source_shows_its_users_and_the_failures_of_their_nodes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    token = {"name": "CRM <b>", "type": "http-bearer", "secrets": {"token": "t"}}
    source_id = (await people.owner.api.post("/api/v1/datasources", json=token)).json()["dataSourceId"]
    step = {
        "id": "step",
        "nodeId": "set",
        "label": "Ask",
        "config": {"values": {"deep": [{"by": source_id}]}},
    }
    workflow_id = await people.owner.create(
        name="Customer sync",
        status="active",
        nodes=[{"id": "start", "nodeId": "manual"}, step],
        connections=[],
    )
    for reason in ("", "The CRM is <i>away</i>"):
        started = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
        if reason:
            await fail_with(harness, started.json()["executionId"], reason)
    usage = (await people.owner.api.get(f"/api/v1/datasources/{source_id}/usage")).json()
    nodes = [{"nodeId": "step", "label": "Ask", "type": "set"}]
    named: dict[str, Any] = {"workflowId": workflow_id, "name": "Customer sync"}
    named |= {"version": 1, "deployedVersion": None, "isNamedByDeployed": False}
    named["deploymentStatus"] = "not-deployed"
    assert usage["workflows"] == [{**named, "nodes": nodes}]
    assert (usage["ended"], usage["failed"], usage["lastSuccessAt"]) == (1, 1, None)
    assert sum(hour["failed"] for hour in usage["hours"]) == 1
    assert usage["lastFailure"]["executionId"] == started.json()["executionId"]
    assert usage["lastFailure"]["message"] == "The CRM is <i>away</i>"
    await people.owner.api.put(f"/api/v1/datasources/{source_id}/visibility", json={"isPublic": True})
    colleague = {"name": "x", "scopes": ["datasources:read"]}
    made = (await people.colleague.api.post("/api/v1/auth/keys", json=colleague)).json()
    seen = (await (await harness.client(made["key"])).get(f"/api/v1/datasources/{source_id}/usage")).json()
    assert (seen["workflows"], seen["ended"]) == ([], 0)
    browser = await sign_in(harness, people.owner.key)
    page = (await browser.get(f"/dashboard/sources?source={source_id}")).text
    assert "Customer sync" in page
    assert f"/dashboard/runs/{started.json()['executionId']}?node=step" in page
    assert "The CRM is &lt;i&gt;away&lt;/i&gt;" in page
    assert f"DELETE /api/v1/datasources/{source_id}?force=true" in page
    assert "fail without it: Customer sync." in page
    assert "No deployment restarts; none of them has pods now." in page
    await deploy_with_pod(harness, people.owner, workflow_id)
    page = (await browser.get(f"/dashboard/sources?source={source_id}")).text
    assert "these have pods that take them: " in page
    assert [word in page for word in ("version 1<", "deployed 1, without it<")] == [True, True]
    assert (await people.owner.api.get(f"/api/v1/datasources/{source_id}")).json()[
        "secretsFingerprint"
    ] in page
    assert "everybody in the organization" in page
    of_colleague = (
        await (await sign_in(harness, people.colleague.key)).get(f"/dashboard/sources?source={source_id}")
    ).text
    assert "Customer sync" not in of_colleague
    assert f"DELETE /api/v1/datasources/{source_id}" not in of_colleague


async def test_use_of_a_data_source_tells_since_when_it_counts_and_no_message_of_private_runs(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_usage, "RUNS", 2)
    token = {"name": "CRM", "type": "http-bearer", "secrets": {"token": "t"}}
    source_id = (await people.owner.api.post("/api/v1/datasources", json=token)).json()["dataSourceId"]
    step = {"id": "step", "nodeId": "set", "label": "Ask", "config": {"values": {"by": source_id}}}
    nodes = [{"id": "start", "nodeId": "manual"}, step]
    workflow_id = await people.owner.create(name="Sync", status="active", nodes=nodes, connections=[])
    for path in (f"datasources/{source_id}", f"workflows/{workflow_id}"):
        shown = await people.owner.api.put(f"/api/v1/{path}/visibility", json={"isPublic": True})
        assert shown.status_code == 200
    runs = [
        (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})).json()[
            "executionId"
        ]
        for _ in range(3)
    ]
    await fail_with(harness, runs[-1], "The phone number +1 555 0100 is wrong")

    async def hide(connection: AsyncConnection) -> None:
        await connection.execute(
            update(Execution).where(col(Execution.id) == runs[-1]).values(is_private=True)
        )

    await harness.gateway.database.transaction(hide)
    path = f"/api/v1/datasources/{source_id}/usage"
    usage = (await people.owner.api.get(path)).json()
    second = (await people.owner.api.get(f"/api/v1/executions/{runs[1]}")).json()
    assert usage["since"] == second["createdAt"], "older runs are not read, though this one lacks the node"
    with monkeypatch.context() as no_hours:
        no_hours.setattr(source_usage, "HOURS", 0)
        aged = (await people.owner.api.get(path)).json()
    assert (aged["ended"], aged["lastFailure"]["executionId"]) == (0, runs[-1]), "of before these hours"
    assert (usage["failed"], usage["lastFailure"]["executionId"]) == (1, runs[-1])
    assert "555 0100" in usage["lastFailure"]["message"]
    failure = (await people.colleague.api.get(path)).json()["lastFailure"]
    assert (failure["executionId"], failure["nodeId"], failure["message"]) == (None, "step", "")


async def test_tools_of_a_server_show_their_changes_since_acceptance(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash that a button accepts is that of the shown definition; texts of the server are shown as text."""
    allow_loopback(harness, monkeypatch)
    async with serve_tools(tools=[build_tool("find", "Finds notes.")]) as served:
        path = await create_tool_server(people.owner, served.url)
        shown = (await refresh(people.owner, path))["toolServer"]
        accepted = await people.owner.api.post(f"{path}/accept", json=accept_offered(shown, "find"))
        assert accepted.status_code == 200, accepted.text
        served.tools = [build_tool("find", HOSTILE), build_tool("send")]
        shown = (await refresh(people.owner, path))["toolServer"]
    source_id = await create_provider(people.owner)
    model_id = await create_model(people.owner, source_id, price={"input": "0.25", "output": "2"})
    address = f"/dashboard/models?server={path.rpartition('/')[2]}"
    owner = (await (await sign_in(harness, people.owner.key)).get(address)).text
    _, _, changed = owner.partition('data-tool="find"')
    changed, _, new = changed.partition('data-tool="send"')
    assert "changed since its acceptance" in changed
    assert [text in changed for text in ("data-change", "Finds notes.", html.escape(MARKUP))] == [True] * 3
    for part, tool in ((changed, shown["tools"][0]), (new, shown["tools"][1])):
        # Once to be read, and once in each of the two buttons.
        assert part.count(tool["offered"]["hash"]) == 3
    assert ("Withdraw" in changed, "Withdraw" in new) == (True, False)
    assert "<img" not in owner
    assert [text in owner for text in (model_id, "$0.25 in, $2 out", "not tested")] == [True] * 3
    # Others don't see the model, nor may they accept a tool.
    await people.owner.api.put(
        f"/api/v1/datasources/{path.rpartition('/')[2]}/visibility", json={"isPublic": True}
    )
    other = (await (await sign_in(harness, people.colleague.key)).get(address)).text
    assert [text in other for text in ('data-tool="find"', "/accept", model_id)] == [True, False, False]
    # Shared with a user, who may not share it on.
    shared = {"sharedWith": [people.colleague.user.id]}
    await people.owner.api.put(f"/api/v1/ai/models/{model_id}", json=shared)
    form = f'data-request="PUT /api/v1/ai/models/{model_id}"'
    pages = [
        (await (await sign_in(harness, key)).get("/dashboard/models")).text
        for key in (people.owner.key, people.colleague.key)
    ]
    assert [form in page for page in pages] == [True, False]
    assert f"{people.owner.user.id}, you, and admins" in pages[1]
    # People are boxes to check, unless they were too many for each model.
    admin = await sign_in(harness, people.admin.key)
    assert "Single users</legend>" in (await admin.get("/dashboard/models")).text
    monkeypatch.setattr(ai_registry, "SHOWN_BOXES", 0)
    typed = (await admin.get("/dashboard/models")).text
    assert ["Ids of single users" in typed, f">{people.colleague.user.id}</textarea>" in typed] == [
        True,
        True,
    ]


async def test_turns_of_an_agent_inside_of_another_are_folded_into_its_call(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """The inner agent waits for an approval of a call, whose arguments are shown as they are."""

    def build_tool(name: str, parameters: Mapping[str, Any], node_type: str, **config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
        schema = {"type": "object", "properties": parameters, "required": [*parameters]}
        target = {"node": {"type": node_type, "config": config}}
        own = {"name": name, "description": "d", "parameters": schema, "target": target, "approval": "always"}
        return {"id": name, "nodeId": "tool", "config": own}

    inner = {"model": "echo", "prompt": "Use remember."}
    outer = {"model": "echo", "prompt": "Use research.", "budget": {"maxTokens": 100_000}}
    nodes: list[dict[str, Any]] = [
        {"id": "start", "nodeId": "manual"},
        {"id": "agent", "nodeId": "agent", "config": outer},
        build_tool("research", {}, "agent", **inner),
        build_tool("remember", {"city": {"const": MARKUP}}, "set", values={"city": "{{ args.city }}"}),
    ]
    del nodes[2]["config"]["approval"]
    edges = [
        {"source": "start", "target": "agent"},
        {"source": "research", "target": "agent", "targetPort": "tools"},
        {"source": "remember", "target": "research", "targetPort": "tools"},
    ]
    workflow_id = await people.owner.create(name="Nested", nodes=nodes, connections=edges)
    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, workflow_id)
        path = f"/api/v1/executions/{execution_id}"
        while (run := (await people.owner.api.get(path)).json())["status"] != "waiting":
            assert run["status"] in {"pending", "running"}, run
            await asyncio.sleep(0.05)
    browser = await sign_in(harness, people.owner.key)
    page = (await browser.get(f"/dashboard/runs/{execution_id}?node=agent")).text
    graph = (await people.owner.api.get(f"{path}/graph")).json()
    (agent,) = [state["agent"] for state in graph["states"] if "agent" in state]
    assert [(step["number"], step["name"], step["status"]) for step in agent["openSteps"]] == [
        (1, "research", "started")
    ]
    assert (agent["maxTokens"], agent["maxCost"], agent["usage"]["calls"]) == (100_000, None, 1)
    _, _, row = page.partition('id="node-agent"')
    assert re.search(r"data-from=\"2\"><span>step 2: calls research · \$0 · \d+ of 100,000 tokens<", row)
    _, _, folded = page.partition('<details data-inner="1">')
    folded, _, _ = folded.partition("</details>")
    assert "1 turn of its agent" in folded
    assert "A person has to approve it" in folded
    steps = (await people.owner.api.get(f"{path}/steps")).json()["steps"]
    (asked,) = [step["question"] for step in steps if "question" in step]
    (pending,) = (await people.owner.api.get(f"{path}/pending-inputs")).json()["inputs"]
    assert [asked[name] for name in ("nodeId", "iteration")] == [pending["nodeId"], pending["iteration"]]
    assert asked["hash"] == pending["toolCall"]["hash"]
    linked = re.search(r'href="(/dashboard/approvals[^"]+)"', folded)
    assert linked is not None
    assert asked["url"].endswith(html.unescape(linked[1]))
    inbox = (await browser.get(html.unescape(linked[1]))).text
    assert html.escape(pending["title"]) in inbox
    assert html.escape(MARKUP) in folded
    assert "<img" not in page


async def test_turns_of_an_agent_say_that_their_contents_are_not_recorded(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    config = {"model": "echo", "prompt": f"Report {MARKUP}.", "recordContent": False}
    workflow_id = await people.owner.create(
        name="Unrecorded",
        nodes=[{"id": "start", "nodeId": "manual"}, {"id": "agent", "nodeId": "agent", "config": config}],
        connections=[{"source": "start", "target": "agent"}],
    )
    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, workflow_id)
        assert (await wait_until_ended(people.owner, execution_id))["status"] == "completed"
    browser = await sign_in(harness, people.owner.key)
    page = (await browser.get(f"/dashboard/runs/{execution_id}?node=agent")).text
    _, _, turn = page.partition('data-turn="1"')
    assert "conversation 1, not recorded" in turn
    assert 'aria-label="Answer of turn 1' not in turn


async def test_a_model_shows_its_status_metrics_and_cost_of_the_month(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, colleague = people.owner, people.colleague
    source_id = await create_provider(owner)
    model_id = await create_model(owner, source_id, isShared=True)
    unpriced_id = await create_model(owner, source_id, name="Unpriced")
    workflow_id = await owner.create(name="Asking", **GRAPH)
    caller = RunCaller(owner.user.organization_id, owner.user.id, workflow_id, "exec_1", "exec_1")
    ledger = StoredModelLedger(harness.gateway.database)
    unpriced = ModelSettlement("0", "ask:", unpriced_id, TokenUsage(1, 1), None, 5_000)
    await ledger.settle(caller, unpriced, is_reserved=False)
    for key in ("1", "2"):
        usage = TokenUsage(1_200, 34)
        settlement = ModelSettlement(key, "ask:", model_id, usage, 40_000_000, 5_000)
        await ledger.settle(caller, settlement, is_reserved=False)
    await ledger.count_failure(caller, FailedModelCall(model_id, "model-unavailable"))
    page = (await (await sign_in(harness, owner.key)).get(f"/dashboard/models?model={model_id}")).text
    _, _, panel = page.partition('id="model-title"')
    assert [text in panel for text in ("untested", "<dd data-requests>3,", "2,400 in, 68 out")] == [True] * 3
    assert [text in panel for text in ("model-unavailable", "$0.08", "in the median")] == [True] * 3
    assert '<td class="number opt2" data-cost>$0.08</td>' in page
    # An unknown cost is not $0.
    assert page.count('<td class="number opt2" data-cost></td>') == 1
    guest = (await (await sign_in(harness, colleague.key)).get(f"/dashboard/models?model={model_id}")).text
    _, _, panel = guest.partition('id="model-title"')
    assert [text in panel for text in ("untested", "for the owner", "data-requests")] == [True, True, False]
    # No cost of workflows that one may not read.
    assert '<td class="number opt2" data-cost></td>' in guest


async def test_a_replay_shows_the_answers_that_it_takes_over(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    config = {"model": "echo", "prompt": "Use remember.", "maxIterations": 1, "onLimit": "error"}
    schema = {"type": "object", "properties": {}}
    tool = {"name": "remember", "description": "d", "parameters": schema}
    tool |= {"target": {"node": {"type": "set", "config": {"values": {"done": True}}}}}
    nodes = [
        {"id": "start", "nodeId": "manual"},
        {"id": "agent", "nodeId": "agent", "config": config},
        {"id": "remember", "nodeId": "tool", "config": tool},
    ]
    edges = [
        {"source": "start", "target": "agent"},
        {"source": "remember", "target": "agent", "targetPort": "tools"},
    ]
    api = people.owner.api
    workflow_id = await people.owner.create(name="Limited", nodes=nodes, connections=edges)
    browser = await sign_in(harness, people.owner.key)

    async def finish(execution_id: str) -> str:
        path = f"/api/v1/executions/{execution_id}"
        while (status := (await api.get(path)).json()["status"]) in {"pending", "running"}:  # noqa: ASYNC110 - of a worker
            await asyncio.sleep(0.05)
        return str(status)

    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, workflow_id)
        assert await finish(execution_id) == "failed"
        plan = (await browser.get(f"/dashboard/runs/{execution_id}/replay?definition=original")).text
        assert "1 recorded answer is taken over; another request ends the node" in plan
        more = {"config": {**config, "maxIterations": 3}}
        changed = await api.put(f"/api/v1/workflows/{workflow_id}/nodes/agent", json=more)
        assert changed.status_code == 200, changed.text
        path = f"/api/v1/executions/{execution_id}/replay"
        replayed = await api.post(path, json={"definition": "current"})
        assert replayed.status_code == 201, replayed.text
        again = replayed.json()["executionId"]
        assert await finish(again) == "completed"
    page = (await browser.get(f"/dashboard/runs/{again}?node=agent")).text
    _, _, turns = page.partition('data-turn="1"')
    first, _, second = turns.partition('data-turn="2"')
    assert ("data-reused" in first, "data-reused" in second) == (True, False)


async def test_a_preview_keeps_the_zone_and_delay_that_the_form_leaves(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    config = {"cron": "0 3 * * *", "timezone": "Asia/Tokyo", "jitterSeconds": 3_600}
    nodes = [{"id": "start", "nodeId": "schedule-trigger", "config": config}]
    workflow_id = await people.owner.create(name="Nightly", nodes=nodes, connections=[])
    # A leap day: no page shows other days because a minute begins meanwhile.
    cron = "0 3 29 2 *"
    address = f"/api/v1/workflows/{workflow_id}/schedule/preview"
    expected = (await people.owner.api.post(address, json={**config, "cron": cron})).json()["nextRuns"]
    assert expected[0]["at"] != expected[0]["startsAt"]
    browser = await sign_in(harness, people.owner.key)
    query = {"cron": cron, "timezone": ""}
    page = await browser.get(f"/dashboard/workflows/{workflow_id}/trigger", params=query)
    for run in expected:
        assert run["startsAt"] in page.text
        assert run["localTime"] in page.text


async def test_audited_data_sources_lead_to_their_page(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    token = {"name": "CRM", "type": "http-bearer", "secrets": {"token": "t"}}
    source_id = (await people.admin.api.post("/api/v1/datasources", json=token)).json()["dataSourceId"]
    browser = await sign_in(harness, people.admin.key)
    page = (await browser.get("/dashboard/audit?userId=user_gone")).text
    assert '<option value="user_gone" selected>' in page
    page = (await browser.get(f"/dashboard/audit?objectId={source_id}")).text
    (address,) = set(re.findall(f'href="([^"]*{source_id})" class="mono" data-row', page))
    page = (await browser.get(address)).text
    assert 'id="source-title">CRM<' in page
    assert f'href="/dashboard/audit?objectId={source_id}"' in page


async def test_the_audit_page_shows_decisions_with_reason_and_inputs_and_filters_by_each_cell(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH, status="active")
    assert (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/deploy")).status_code < 300
    browser = await sign_in(harness, people.admin.key)
    links = (await browser.get(f"/dashboard/workflows/{workflow_id}")).text
    assert f'href="/dashboard/audit?objectId={workflow_id}"' in links
    page = (await browser.get(f"/dashboard/audit?objectId={workflow_id}")).text
    for text in ("deployment.started", "workflow.deployed", "Because: deployed", "&#34;lifecyclePolicy&#34;"):
        assert text in page, text
    request_id, *_ = re.findall(r"requestId=(req_[a-z0-9]+)", page)
    page = (await browser.get(f"/dashboard/audit?requestId={request_id}")).text
    assert page.count("<tr id=") == page.count(f"{request_id}</a>")
    assert "deployment.started" not in page
    page = (await browser.get("/dashboard/audit?reason=deployed")).text
    assert "deployment.started" in page
    assert "workflow.deployed" not in page
    assert '<input type="hidden" name="reason" value="deployed">' in page
    exported = re.findall(r'data-exports="([^"]*)"', page)
    assert exported == ["/api/v1/audit?kind=all&amp;reason=deployed"]
    viewer = await sign_in(harness, people.owner.key)
    assert "/dashboard/audit" not in (await viewer.get(f"/dashboard/workflows/{workflow_id}")).text


async def fail_with(harness: GatewayHarness, execution_id: str, text: str) -> None:
    """Record that the node `step` of a run has failed, with a text everywhere."""
    now = harness.gateway.clock()
    cause = {"code": text, "message": text, "nodeId": "step", "method": text, "url": text}
    error = {"code": "node-error", "message": text, "nodeId": "step", "attempt": 1, "cause": cause}
    encoded = msgspec.json.encode(text).decode()

    async def fail(connection: AsyncConnection) -> None:
        values = {"status": "failed", "error": error, "started_at": now, "ended_at": now, "has_journal": True}
        await connection.execute(update(Execution).where(col(Execution.id) == execution_id).values(values))
        shard = await connection.scalar(select(col(Execution.shard)).where(col(Execution.id) == execution_id))
        span = SpanRow(
            execution_id=execution_id,
            node_id="step",
            iteration="",
            shard=shard or 0,
            id=ids.new_id("span"),
            sequence=2,
            label=text,
            type="set",
            status="failed",
            started_at=now,
            ended_at=now,
            output=encoded,
            error=msgspec.json.encode({"code": text, "message": text}).decode(),
        )
        await connection.execute(insert(SpanRow).values(span.model_dump()))

    await harness.gateway.database.transaction(fail)


async def test_the_page_of_a_run_with_a_hundred_nodes_is_small(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nodes = [{"id": "n0", "nodeId": "manual"}] + [
        {"id": f"n{number}", "nodeId": "set", "label": f"Step {number}", "config": {"values": {"a": number}}}
        for number in range(1, 100)
    ]
    edges = [{"sourceNodeId": f"n{number}", "targetNodeId": f"n{number + 1}"} for number in range(99)]
    workflow_id = await people.owner.create(status="active", nodes=nodes, connections=edges)
    started = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    browser = await sign_in(harness, people.owner.key)
    for query in ("", "?view=map", "?node=n50&tab=config"):
        page = await browser.get(f"/dashboard/runs/{started.json()['executionId']}{query}")
        assert page.status_code == 200
        assert "Step 99" in page.text
        assert int(page.headers["Content-Length"]) < 30_000
    hidden = await (await sign_in(harness, people.colleague.key)).get(str(page.url))
    assert hidden.status_code == 404
    assert "Step" not in hidden.text


async def test_a_refusal_of_a_route_becomes_a_page(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await sign_in(harness, people.owner.key)
    page = await browser.get("/dashboard/runs?status=nonsense")
    assert page.status_code == 400
    assert "<code>invalid-query</code>" in page.text
    assert page.headers["X-Request-Id"] in page.text
    private = await people.admin.create(name="Of the admin")
    page = await browser.get(f"/dashboard/workflows/{private}")
    assert page.status_code == 404
    assert "Others see an object only if it is shared with them" in page.text
    assert "/dashboard/workflows" in page.text
    assert "/dashboard/audit" not in page.text, "the navigation is that of the visitor"
    page = await browser.get("/dashboard/runs/exec_01m8m5q5d2e0tvt11hq4v0099q")
    assert "There is no such run" in page.text


async def test_a_workflow_is_shown_to_the_organization_by_its_owner(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Shown to all", **GRAPH)
    owner, colleague = [await sign_in(harness, one.key) for one in (people.owner, people.colleague)]
    address = f"/dashboard/workflows/{workflow_id}"
    assert "you, and admins" in (await owner.get(address)).text
    assert (await colleague.get(address)).status_code == 404
    await people.owner.api.put(f"/api/v1/workflows/{workflow_id}/visibility", json={"isPublic": True})
    for browser, may_hide in ((owner, True), (colleague, False)):
        page = (await browser.get(address)).text
        assert "everybody in the organization" in page
        assert (f"PUT /api/v1/workflows/{workflow_id}/visibility" in page) is may_hide


async def test_hostile_parameters_of_the_pages_of_runs_are_refused_or_shown_as_text(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Asked badly", status="active", **GRAPH)
    started = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    run_id = started.json()["executionId"]
    await fail_with(harness, run_id, HOSTILE)
    browser = await sign_in(harness, people.owner.key)
    for given in ("", "..", "\0", "²", "٣", "-1", "9" * 5_000, "999999999", HOSTILE):
        for path, names in (
            ("", ("alike",)),
            (f"/{run_id}", ("view", "open", "iteration")),
            (f"/{run_id}", ("node", "tab", "with")),
            (f"/{run_id}/replay", ("definition", "refresh")),
            (f"/{run_id}/replay", ("from",)),
            (f"/{run_id}/replay", ("skip",)),
        ):
            page = await browser.get(f"/dashboard/runs{path}", params=dict.fromkeys(names, given))
            assert page.status_code in {200, 400, 404, 422}, (path, names, given)
            assert "<img" not in page.text
            assert "<script>" not in page.text
    for act, since, status in (
        ("retry", "2026-01-01T00:00:00 02:00", 200),  # an unescaped plus sign, which the API accepts too
        ("replay", "0001-01-01T00:00:00+14:00", 400),
        ("retry", HOSTILE, 400),
    ):
        query = {"status": "failed", "since": since, "act": act}
        page = await browser.get("/dashboard/runs", params=query)
        assert page.status_code == status, query


async def test_the_page_of_a_plan_leaves_a_write_out_and_shows_the_consequences(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    pay = {
        "id": "step",
        "nodeId": "http-request",
        "label": "Pay",
        "config": {"method": "POST", "url": "http://a/"},
    }
    behind = {"id": "thank", "nodeId": "set", "config": {"values": {"done": True}}}
    edges = [
        {"sourceNodeId": "start", "targetNodeId": "step"},
        {"sourceNodeId": "step", "targetNodeId": "thank"},
    ]
    nodes = [{"id": "start", "nodeId": "manual"}, pay, behind]
    workflow_id = await people.owner.create(status="active", nodes=nodes, connections=edges)
    started = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    run_id = started.json()["executionId"]
    await fail_with(harness, run_id, "http-422")
    browser = await sign_in(harness, people.owner.key)
    path = f"/dashboard/runs/{run_id}/replay"
    page = (await browser.get(path)).text
    (address,) = re.findall(rf'href="({path}\?skip=step)">Leave it out', page)
    page = (await browser.get(address)).text
    for text in (
        "Left out: it has no recorded output",
        "Only writes that are left out lead to it",
        "1 write is left out and sends nothing",
        "and 2 nodes are skipped",
        "Nothing is written to the outside.",
        '<input type="hidden" name="skip" value="step">',
        f'<a href="{path}">Run it after all',
    ):
        assert text in page, text
    (sent,) = re.findall(r'data-sends="([^"]*planHash[^"]*)"', page)
    assert "&#34;skip&#34;: [&#34;step&#34;]" in sent


async def test_files_are_compressed_once_and_cached_for_good(harness: GatewayHarness) -> None:
    browser = await harness.browser()
    for name, file in assets.read_files().items():
        answer = await browser.get(f"{assets.PREFIX}{assets.version()}/{name}")
        assert answer.content == file.plain
        assert answer.headers["Content-Encoding"] == "gzip"
        assert "immutable" in answer.headers["Cache-Control"]
    older = await browser.get(f"{assets.PREFIX}0123456789abcdef/style.css")
    assert older.headers["Cache-Control"] == "no-store"
    for missing in ("nothing.js", "VENDORED.md", "../page.py", "%2e%2e/page.py"):
        assert (await browser.get(f"{assets.PREFIX}{assets.version()}/{missing}")).status_code == 404
    sizes = {name: len(file.compressed) for name, file in assets.read_files().items()}
    assert sizes["style.css"] < 12_000
    assert sum(size for name, size in sizes.items() if name.endswith(".js")) < 60_000


def test_vendored_files_are_those_of_their_packages() -> None:
    table = (assets.FOLDER / "VENDORED.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|.*`([0-9a-f]{64})` \|$", table, re.MULTILINE)
    assert rows
    for name, digest in rows:
        assert hashlib.sha256((assets.FOLDER / name).read_bytes()).hexdigest() == digest


async def test_the_dashboard_can_be_removed(harness: GatewayHarness, people: OrganizationUsers) -> None:
    without = await harness.with_settings(dashboard="off")
    browser = await without.browser()
    paths = [path.replace("{id}", "any") for path in routes.PAGES]
    for path in ("/sign-in", "/dashboard", *paths, f"{assets.PREFIX}{assets.version()}/style.css"):
        answer = await browser.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not-found"
    assert (await browser.post("/session", json={"key": people.owner.key})).status_code == 404
    assert (await browser.get("/")).headers["Location"] == "docs/"


PAGES = (
    ("/dashboard/schedule", "No workflow has an active schedule"),
    ("/dashboard/sources", "Hostile source"),
    ("/dashboard/models", "No language model is visible to you."),
    ("/dashboard/keys", "API keys"),
    ("/dashboard/audit", "workflow.created"),
    ("/dashboard/health", "Why runs do not move"),
)
"""Pages of lists, with a text that each has for an admin."""


@pytest.mark.parametrize(("path", "text"), PAGES)
async def test_pages_of_lists_show_their_objects_as_text(
    harness: GatewayHarness, people: OrganizationUsers, path: str, text: str
) -> None:
    await people.owner.create(name=HOSTILE, **GRAPH)
    source = {"name": f"Hostile source {HOSTILE}", "type": "http-basic", "settings": {}, "secrets": {}}
    source |= {"settings": {"username": HOSTILE}, "secrets": {"password": "p"}}
    await people.admin.api.post("/api/v1/datasources", json=source)
    await people.admin.api.post("/api/v1/auth/keys", json={"name": HOSTILE, "scopes": ["workflows:read"]})
    browser = await sign_in(harness, people.admin.key)
    page = await browser.get(path)
    assert page.status_code == 200, page.text
    assert text in page.text
    assert "<img" not in page.text
    assert "<script>" not in page.text
    assert 'aria-current="page"' in page.text


async def test_keys_have_their_sessions_below_and_trigger_tokens_their_state(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await owner.create(name="Old token", **QUEUE)
    token = f"/api/v1/workflows/{workflow_id}/trigger-token"
    await owner.api.post(token, json={})
    replaced = (await owner.api.post(token, json={"overlapSeconds": 600})).json()
    made = (await owner.api.post("/api/v1/auth/keys", json={"name": "Nightly"})).json()
    browser = await sign_in(harness, made["key"])

    async def age(connection: AsyncConnection) -> None:
        long_ago = harness.gateway.clock() - timedelta(days=91)
        of_key = update(ApiKey).where(col(ApiKey.id) == made["id"])
        await connection.execute(of_key.values(created_at=long_ago, last_used_at=long_ago))
        of_token = update(SenderToken).where(col(SenderToken.id) == replaced["id"])
        await connection.execute(of_token.values(created_at=long_ago))

    await harness.gateway.database.transaction(age)
    page = (await browser.get("/dashboard/keys", headers={"user-agent": "x"})).text
    session_id = re.search(r'<tr id="(session_\w+)" class="under"', page)
    assert session_id is not None
    key_row = page.index(f'<tr id="{made["id"]}"')
    assert key_row < session_id.start()
    assert "<tr id=" not in page[key_row + 1 : session_id.start()]
    assert "Unused for 90 days" in page[key_row : session_id.start()]
    assert "Other sessions" not in page
    rows = page[page.index("Trigger tokens") :].split("<tr id=")
    of_token = {row[1 : row.index('"', 1)]: row for row in rows[1:]}
    assert "Unused for 90 days" in of_token[replaced["id"]]
    (other,) = [row for name, row in of_token.items() if name.startswith("tok_") and "Replaced" in row]
    assert "ends" in other
    assert f"{replaced['id']}-actions" in of_token
    assert replaced["token"] not in page

    await owner.api.put(f"/api/v1/workflows/{workflow_id}/visibility", json={"isPublic": True})
    colleague = await sign_in(harness, people.colleague.key)
    seen = (await colleague.get("/dashboard/keys")).text
    assert replaced["id"] in seen
    assert f"{replaced['id']}-actions" not in seen


async def test_keys_are_listed_page_by_page(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "KEYS_LIMIT", 2)
    for number in range(4):
        await people.owner.api.post("/api/v1/auth/keys", json={"name": f"Key {number}"})
    expected = [one["id"] for one in (await people.owner.api.get("/api/v1/auth/keys")).json()["keys"]]
    browser = await sign_in(harness, people.owner.key)
    seen: list[str] = []
    address: str | None = "/dashboard/keys"
    while address is not None:
        page = (await browser.get(address)).text
        assert f"<p>{len(expected)}</p>" in page
        seen += re.findall(r'<tr id="(key_\w+)"', page)
        more = re.search(r'href="([^"]+)" rel="next">Show more<', page)
        address = None if more is None else more[1]
    assert seen == expected


def test_browsers_are_named_by_their_user_agent() -> None:
    chrome = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"
    assert access.name_browser(chrome) == "Chrome, Linux"
    assert access.name_browser(f"{chrome} Edg/140.0.0.0") == "Edge, Linux"
    phone = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) Version/18.0 Mobile Safari/604.1"
    assert access.name_browser(phone) == "Safari, iPhone"
    assert access.name_browser("curl/8.5.0") == "curl/8.5.0"


async def test_a_workflow_page_shows_the_graph_the_last_run_and_actions(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name=HOSTILE, status="active", **GRAPH)
    started = (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})).json()
    browser = await sign_in(harness, people.owner.key)
    listed = await browser.get("/dashboard/workflows?search=script")
    assert f"/dashboard/workflows/{workflow_id}" in listed.text
    page = await browser.get(f"/dashboard/workflows/{workflow_id}")
    assert page.status_code == 200, page.text
    assert page.text.count('class="node') == len(GRAPH["nodes"])
    assert started["executionId"] in page.text
    assert f"POST /api/v1/workflows/{workflow_id}/execute" in page.text
    assert f"POST /api/v1/workflows/{workflow_id}/deploy" in page.text
    level_path = f"/api/v1/workflows/{workflow_id}/log-level"
    assert f'data-request="PUT {level_path}"' in page.text
    assert (await people.owner.api.put(level_path, json={"level": "debug"})).status_code == 200
    assert (
        '<span class="tag mono">debug</span> until'
        in (await browser.get(f"/dashboard/workflows/{workflow_id}")).text
    )
    for text in (listed.text, page.text):
        assert "<img" not in text
        assert "<script>" not in text
    colleague = await sign_in(harness, people.colleague.key)
    assert (await colleague.get(f"/dashboard/workflows/{workflow_id}")).status_code == 404
    reader = await harness.person(await harness.organization(), UserRole.VIEWER)
    assert (
        "No workflow is shared with you yet"
        in (await (await sign_in(harness, reader.key)).get("/dashboard/workflows")).text
    )


async def test_findings_of_drift_wait_for_a_second_observation_once(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    grace_seconds, waits, sleep = 0.317, [], asyncio.sleep
    monkeypatch.setattr(recent_observations, "GRACE_SECONDS", grace_seconds)

    async def note(seconds: float) -> None:
        if seconds == grace_seconds:
            waits.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    reports = [(await people.admin.api.get("/api/v1/admin/drift")).json() for _ in range(3)]
    assert reports[0]["findings"] == reports[2]["findings"] != []
    assert len(waits) == 1
    assert (await people.stranger.api.get("/api/v1/admin/drift")).status_code == 200
    assert len(waits) == 2, "organizations have observations of their own"


async def test_the_overview_lists_problems_for_a_person_and_groups_failures(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = [{"id": "start", "nodeId": "queue-trigger", "label": "Message"}, GRAPH["nodes"][-1]]
    connections = [{"sourceNodeId": "start", "targetNodeId": queue[-1]["id"]}]
    workflow_id = await people.owner.create(
        name="Broken", status="active", nodes=queue, connections=connections
    )
    for number in range(2):
        body = {"message": number}
        started = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/enqueue", json=body)
        await fail_execution(harness, started.json()["executionId"])
    stuck = await people.owner.create(name="Mails", status="active", **GRAPH)
    observed = {"observed": ObservedState.FAILED, "observed_reason": "No such image", "start_failures": 3}
    await deploy_with_pod(harness, people.owner, stuck, **observed)
    idle = await people.owner.create(name="Payments", status="active", **GRAPH)
    await deploy_with_pod(harness, people.owner, idle)
    await RunHourCounter(harness.gateway.database).count_runs()
    browser = await sign_in(harness, people.owner.key)
    page = await browser.get("/dashboard/overview")
    assert page.status_code == 200, page.text
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.text))
    for sentence in (
        *("No worker is present.", "2 runs of Broken failed at “start” since", "The disk is full"),
        *("wake. No such image", "3 tries", "2 dead letters: 2 of Broken"),
        *("2 runs", "0 completed 2 failed", "1 awake", "1 start failed", "Payments stops · idle since"),
    ):
        assert sentence in text
    assert f'status=failed&amp;workflow_id={workflow_id}">2</a>' in page.text
    assert re.search(r'href="/dashboard/runs/\w+\?node=start&amp;tab=diff">Diff<', page.text)
    assert re.search(r'href="/dashboard/runs/\w+/replay">Replay plan<', page.text)
    present = hour_of(harness.gateway.clock())
    query = {"since": present - timedelta(hours=3), "until": present - timedelta(hours=2)}
    earlier = await browser.get(
        "/dashboard/overview", params={name: at.isoformat() for name, at in query.items()}
    )
    assert "No run has failed" in earlier.text
    assert "causes=all" not in page.text + earlier.text
    failing = await people.owner.create(name="Other", status="active", **GRAPH)
    started = await people.owner.api.post(f"/api/v1/workflows/{failing}/execute", json={})
    await fail_execution(harness, started.json()["executionId"])
    await RunHourCounter(harness.gateway.database).count_runs()
    monkeypatch.setattr(overview, "SHOWN_CAUSES", 1)
    newest = (await browser.get("/dashboard/overview")).text
    assert ("The newest 1 causes" in newest, newest.count("data-failed")) == (True, 1)
    everything = (await browser.get("/dashboard/overview?causes=all")).text
    assert ("Show more" in everything, everything.count("data-failed")) == (False, 2)
    assert earlier.text.count('<rect class="brush"') == 5
    assert "status=failed&amp;since=" in earlier.text
    for wrong in ("since=x&until=y", "since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z"):
        assert '<rect class="brush"' not in (await browser.get(f"/dashboard/overview?{wrong}")).text
    assert page.text.count('<path class="bad"') == 1
    rows = re.findall(r'<tr id="(\w+)"', (await browser.get("/dashboard/workflows")).text)
    assert rows == [stuck, workflow_id, failing, idle], "the worst first"
    assert (await browser.get("/dashboard")).headers["Location"] == "dashboard/overview"


async def test_a_failed_run_is_shown_with_an_incomplete_error(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Broken", status="active", **GRAPH)
    started = (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})).json()
    await fail_execution(harness, started["executionId"])
    browser = await sign_in(harness, people.owner.key)
    page = await browser.get(f"/dashboard/runs/{started['executionId']}")
    assert page.status_code == 200, page.text
    assert "The disk is full" in page.text


def test_the_map_of_a_workflow_marks_lost_paths_and_the_last_delivery() -> None:
    nodes = [{"id": one, "type": "queue-trigger" if one == "start" else "set"} for one in ("start", "a", "b")]
    figures = {one: {"p95Ms": 1_000, "failed": 1, "ended": 4} for one in ("start", "a", "b")}
    warnings = [{"type": "unresolved-mapping", "nodeId": "a"}, {"type": "inline-secret", "nodeId": "b"}]
    delivered = {"deliveries": [{"createdAt": "2026-11-29T21:25:00Z"}]}
    notes = workflow_page.list_notes(nodes, figures, warnings, delivered)
    assert notes == {
        "start": "last delivery 11-29 21:25",
        "a": "a path is unresolved",
        "b": "p95 1 s · 25 % failed",
    }
    assert workflow_page.list_notes(nodes, {}, (), {"deliveries": []}) == {}


def test_a_failed_run_names_the_writes_before_it() -> None:
    nodes = [
        {"id": node_id, "effect": effect}
        for node_id, effect in (("a", "write"), ("b", "read"), ("c", "write"), ("old", None))
    ]

    def list_writes(code: str, *states: tuple[str, str]) -> object:
        shown = [
            {"nodeId": node_id, "nodeLabel": node_id.upper(), "status": status, "iterationCounts": {}}
            for node_id, status in states
        ]
        return run_page.list_writes({"nodes": nodes, "states": shown}, {"code": code, "nodeId": "c"})

    assert list_writes("timeout", ("b", "completed"), ("a", "skipped")) == []
    assert list_writes("timeout", ("a", "completed"), ("b", "completed"), ("c", "failed")) == ["A", "C"]
    assert list_writes("unresolved-mapping", ("a", "completed"), ("c", "failed")) == ["A"]
    assert list_writes("timeout", ("old", "completed"), ("c", "failed")) is None


async def fail_execution(harness: GatewayHarness, execution_id: str) -> None:
    cause = {"code": "disk-full", "message": "The disk is full", "nodeId": "start"}
    error = {
        "code": "node-error",
        "message": "The disk is full",
        "nodeId": "start",
        "attempt": 1,
        "cause": cause,
    }
    values = {"status": ExecutionStatus.FAILED, "error": error}

    async def change(connection: AsyncConnection) -> None:
        await connection.execute(update(Execution).where(col(Execution.id) == execution_id).values(**values))

    await harness.gateway.database.transaction(change)


async def test_a_question_is_shown_with_its_form_to_permitted_users(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Price change", status="active", **GRAPH)
    started = (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})).json()
    fields = {
        "comment": {"type": "string", "title": HOSTILE},
        "limit": {"type": "number"},
        "kind": {"enum": ["a", "b"]},
        "sure": {"type": "boolean"},
        "more": {"type": "object"},
    }
    request = {
        **input_waits.REQUEST,
        "schema": {"type": "object", "properties": fields, "required": ["kind"]},
    }
    database = harness.gateway.database
    await input_waits.wait_for_input(database, started["executionId"], request=request)
    page = await (await sign_in(harness, people.owner.key)).get("/dashboard/approvals")
    assert page.status_code == 200, page.text
    assert "Write 120 rows?" in page.text
    assert f"POST /api/v1/executions/{started['executionId']}/input" in page.text
    assert page.text.count('data-in="data"') == len(fields)
    assert re.search(r'value="approve" data-press="y" [^>]*>Yes, write <kbd', page.text)
    assert "<img" not in page.text
    interval = BlockedInterval(
        execution_id=started["executionId"],
        started_at=harness.gateway.clock(),
        shard=people.owner.user.shard,
        organization_id=people.owner.user.organization_id,
        code="awaiting-input",
    )
    await database.transaction(
        lambda connection: connection.execute(insert(BlockedInterval).values(interval.model_dump()))
    )
    overview = (await (await sign_in(harness, people.owner.key)).get("/dashboard/overview")).text
    assert "<b>1 question waits for an answer</b>" in overview
    assert "1 run waits" in overview
    assert "/dashboard/runs?reason=awaiting-input" in overview
    colleague = await (await sign_in(harness, people.colleague.key)).get("/dashboard/approvals")
    assert "No question waits for you" in colleague.text


async def test_an_inbox_has_a_tab_for_each_way_in_which_questions_are_assigned(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, colleague = people.owner, people.colleague
    workflow_id = await owner.create(name="Price change", status="active", **GRAPH)
    await owner.api.put(f"/api/v1/workflows/{workflow_id}/visibility", json={"isPublic": True})
    questions: list[dict[str, Any]] = [
        {"title": "For the colleague", "assignees": [colleague.user.id], "approvals": 2},
        {"title": "For everybody", "choices": [], "schema": None},
        {"title": "For admins", "assignees": ["role:admin"]},
    ]
    asked = []
    for question in questions:
        started = (await owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})).json()
        asked.append(started["executionId"])
        request = {**input_waits.REQUEST, **question}
        await input_waits.wait_for_input(harness.gateway.database, asked[-1], request=request)
    browser = await sign_in(harness, colleague.key)
    mine = (await browser.get("/dashboard/approvals")).text
    for chip in ("<b>1</b> for me", "<b>1</b> for my groups", "<b>3</b> all open"):
        assert chip in mine
    assert ("For the colleague" in mine, "For admins" in mine) == (True, False)
    unasked = (await (await sign_in(harness, owner.key)).get("/dashboard/approvals")).text
    assert ("<b>0</b> for me" in unasked, "For everybody" in unasked, "For admins" in unasked) == (
        True,
        True,
        False,
    )
    assert unasked.count("/api/v1/pending-inputs?") == 2, "the questions of all are examined once"
    groups = (await browser.get("/dashboard/approvals?tab=groups")).text
    assert "Send the answer <kbd" in groups, "a question without choices has a button, too"
    assert 'name="note"' in groups
    shown = (await browser.get(f"/dashboard/approvals?tab=all&question={asked[2]}:approval:")).text
    assert "This question is for other people." in shown
    assert "Reassign…" not in shown
    body = {"nodeId": "approval", "choice": "approve", "data": {}}
    assert (await colleague.api.post(f"/api/v1/executions/{asked[0]}/input", json=body)).is_success
    answered = (await browser.get("/dashboard/approvals?tab=answered")).text
    assert f"/dashboard/runs/{asked[0]}?node=approval" in answered
    waiting = (await browser.get("/dashboard/approvals")).text
    assert "You have answered. It waits for other people." in waiting
    body["nodeId"] = "approval"
    assert (await people.admin.api.post(f"/api/v1/executions/{asked[2]}/input", json=body)).is_success
    gone = (await browser.get(f"/dashboard/approvals?tab=all&question={asked[2]}:approval:")).text
    assert "This question no longer waits here" in gone
    assert "For everybody" in gone
    assert "data-press" not in gone, "a key or click meant for it must not answer another question"


async def test_a_page_without_rights_is_refused_and_not_in_the_navigation(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    browser = await sign_in(harness, people.owner.key)
    assert (await browser.get("/dashboard/audit")).status_code == 403
    page = await browser.get("/dashboard/health")
    assert "/dashboard/audit" not in page.text
    assert "Findings" not in page.text, "drift is for admins"
    assert "</b><span>workers" in page.text


async def test_a_schedule_is_shown_with_its_next_run_and_its_problem(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    trigger = {"id": "clock", "nodeId": "schedule-trigger", "config": {"cron": "30 7 * * mon-fri"}}
    await people.owner.create(name="Every morning", status="active", nodes=[trigger], connections=[])
    page = await (await sign_in(harness, people.owner.key)).get("/dashboard/schedule")
    assert "Every morning" in page.text
    assert "30 7 * * mon-fri, UTC" in re.sub("<[^>]+>", "", page.text)
    assert re.search(r"in \d+ (h|d|min)", page.text)
