"""Runs that call registered models: usage and cost are shown, keys never, and access is checked at the call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from messages.local_broker import LocalBroker
from tests.fakes.model_server import KEY, ModelFault, ScriptedAnswer, serve_models
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused
from tests.integration.test_gateway_ai_models import MODELS, PRICE, create_model, create_provider
from tests.integration.test_waiting_runs import execute_workflow, wait_until_ended
from workers.main import run_worker
from workers.settings import WorkerSettings

USED = {
    "calls": 1,
    "inputTokens": 100,
    "outputTokens": 20,
    "cacheReadTokens": 0,
    "cacheWriteTokens": 0,
    "reasoningTokens": 0,
    "isEstimated": False,
    "cost": "0.000065",
}


@asynccontextmanager
async def serve_worker(harness: GatewayHarness, url: str) -> AsyncIterator[None]:
    """Run a worker that may call the models at a URL."""
    gateway = harness.gateway
    shared = gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"})
    host = url.removeprefix("http://").removesuffix("/v1")
    settings = WorkerSettings(**shared, lease_seconds=5, sweep_seconds=0.2, model_hosts=(host,))
    broker = LocalBroker(channel=uuid4().hex)
    try:
        async with run_worker(settings, gateway.store, broker, gateway.database):
            yield
    finally:
        await broker.close()


async def ask_model(person: UserClient, model_id: str) -> tuple[str, dict[str, Any]]:
    """Run a workflow that asks a model; return the execution with its spans and log as text, and its progress."""
    execution_id = await execute_workflow(person, await create_question(person, model_id))
    return execution_id, await wait_until_ended(person, execution_id)


async def wait_until_waiting(person: UserClient, execution_id: str) -> None:
    path = f"/api/v1/executions/{execution_id}/progress?wait=0"
    while (shown := (await person.api.get(path)).json())["status"] != "waiting":
        assert shown["status"] in {"pending", "running"}, shown
        await asyncio.sleep(0.02)


async def create_question(person: UserClient, model_id: str) -> str:
    """Create a workflow that asks a model, and return its id."""
    return await person.create(
        nodes=[
            {"id": "start", "nodeId": "manual"},
            {"id": "ask", "nodeId": "llm", "config": {"model": model_id, "prompt": "How is Oslo?"}},
        ],
        connections=[{"source": "start", "target": "ask"}],
    )


@pytest.mark.every_database
async def test_usage_and_cost_are_shown_and_the_key_is_not(
    harness: GatewayHarness, people: OrganizationUsers, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serve_models() as served, serve_worker(harness, served.url):
        model_id = await create_model(
            people.owner, await create_provider(people.owner, served.url), price=PRICE
        )
        execution_id, ended = await ask_model(people.owner, model_id)
    assert (ended["status"], ended["outputs"]["ask"]["response"]) == ("completed", "Cold."), ended["error"]
    shown = await people.owner.api.get(f"/api/v1/executions/{execution_id}")
    assert shown.json()["usage"] == USED
    why = await people.owner.api.get(f"/api/v1/executions/{execution_id}/why")
    assert why.json()["usage"] == USED
    spans = await people.owner.api.get(f"/api/v1/executions/{execution_id}/spans")
    assert {span["nodeId"]: span.get("usage") for span in spans.json()["spans"]} == {
        "start": None,
        "ask": USED,
    }
    listed = await people.owner.api.get("/api/v1/executions")
    assert "usage" not in listed.json()["executions"][0]
    for person, costs in ((people.owner, ["0.000065"]), (people.admin, ["0.000065"]), (people.colleague, [])):
        month = (await person.api.get("/api/v1/ai/costs")).json()
        assert [(row["modelId"], row["calls"], row["cost"]) for row in month["costs"]] == [
            (model_id, 1, cost) for cost in costs
        ]
    of_workflow = f"/api/v1/ai/costs?workflow_id={shown.json()['workflowId']}"
    assert (await people.owner.api.get(of_workflow)).json()["cost"] == "0.000065"
    assert (await people.owner.api.get("/api/v1/ai/costs?workflow_id=wf_other")).json()["costs"] == []
    pages = [
        (await people.owner.api.get(f"/dashboard/{path}")).text
        for path in (
            f"runs/{execution_id}?node=ask",
            f"workflows/{shown.json()['workflowId']}",
            "models",
        )
    ]
    tokens = f"1 call, {USED['inputTokens']} tokens in, {USED['outputTokens']} out, $0.000065"
    assert pages[0].count(tokens) == 2, "of the run and of its node"
    assert [page.count(f'data-costs="{model_id}"') for page in pages] == [0, 1, 1]
    past = (await people.owner.api.get("/api/v1/ai/costs?month=2020-01")).json()
    assert past == {"month": "2020-01", "cost": "0", "costs": [], "budget": None}
    assert_refused(await people.owner.api.get("/api/v1/ai/costs?month=2020-13"), 400, "invalid-query")
    assert served.headers[0]["authorization"].endswith(KEY)
    assert KEY not in "".join((shown.text, spans.text, listed.text, *capfd.readouterr()))


async def test_a_call_that_may_exceed_the_budget_of_its_run_is_not_made(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with serve_models() as served, serve_worker(harness, served.url):
        provider_id = await create_provider(people.owner, served.url)
        model_id = await create_model(people.owner, provider_id, price=PRICE)
        workflow_id = await create_question(people.owner, model_id)
        path = f"/api/v1/workflows/{workflow_id}"
        await people.owner.api.put(path, json={"settings": {"aiBudget": {"maxCost": "0.001"}}})
        refused = await execute_workflow(people.owner, workflow_id)
        ended = await wait_until_ended(people.owner, refused)
        assert (ended["status"], served.requests) == ("failed", [])
        assert ended["error"]["cause"]["code"] == "model-budget-exceeded"
        await people.owner.api.put(path, json={"settings": {"aiBudget": {"maxCost": "0.003"}}})
        answered = await wait_until_ended(people.owner, await execute_workflow(people.owner, workflow_id))
    assert (answered["status"], len(served.requests)) == ("completed", 1), answered["error"]


async def test_the_budget_of_a_month_holds_for_all_runs_and_why_names_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    settings = "/api/v1/ai/settings"
    budget = {"maxCost": "0.003", "maxTokens": None, "onLimit": "fail"}
    assert (await people.owner.api.get(settings)).json()["monthBudget"] is None
    assert_refused(await people.owner.api.put(settings, json={"monthBudget": budget}), 403, "admin-required")
    for wrong in ({"maxCost": "-1"}, {"maxTokens": 0}, {"onLimit": "ignore"}):
        refused = await people.admin.api.put(settings, json={"monthBudget": wrong})
        assert_refused(refused, 422, "validation-failed")
    stored = await people.admin.api.put(settings, json={"monthBudget": budget})
    assert (stored.status_code, stored.json()["monthBudget"]) == (200, budget), stored.text
    assert (await people.owner.api.get(settings)).json() == stored.json()
    async with serve_models() as served, serve_worker(harness, served.url):
        provider_id = await create_provider(people.owner, served.url)
        model_id = await create_model(people.owner, provider_id, price=PRICE)
        _, answered = await ask_model(people.owner, model_id)
        assert answered["status"] == "completed", answered["error"]
        await people.admin.api.put(settings, json={"monthBudget": {"maxCost": "0.002"}})
        _, failed = await ask_model(people.owner, model_id)
        assert failed["error"]["cause"]["code"] == "month-budget-exceeded"
        await people.admin.api.put(settings, json={"monthBudget": {"maxCost": "0.002", "onLimit": "wait"}})
        execution_id = await execute_workflow(people.owner, await create_question(people.owner, model_id))
        await wait_until_waiting(people.owner, execution_id)
        why = (await people.owner.api.get(f"/api/v1/executions/{execution_id}/why")).json()
        assert len(served.billed) == 1
        await people.owner.api.post(f"/api/v1/executions/{execution_id}/stop")
        await wait_until_ended(people.owner, execution_id)
        await people.admin.api.put(settings, json={"monthBudget": budget})
        again = await people.owner.api.post(f"/api/v1/executions/{execution_id}/replay", json={})
        ended = await wait_until_ended(people.owner, again.json()["executionId"])
    assert (ended["status"], len(served.billed)) == ("completed", 2), ended["error"]
    (blocker,) = why["blockers"]
    assert (blocker["code"], blocker["details"]["error"]) == ("retry-at", "month-budget-exceeded")
    assert "waits for the next month" in blocker["message"]
    costs = (await people.owner.api.get("/api/v1/ai/costs")).json()
    used = {"spentCost": "0.00013", "reservedCost": "0", "spentTokens": 240, "reservedTokens": 0}
    assert costs["budget"] == {**budget, **used}
    none = await people.admin.api.put(settings, json={"monthBudget": None})
    assert none.json()["monthBudget"] is None
    assert (await people.owner.api.get("/api/v1/ai/costs")).json()["budget"] is None


async def test_a_run_waits_for_a_rate_limit_and_names_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    limited = ScriptedAnswer(fault=ModelFault.RATE_LIMITED, retry_after="3600")
    async with serve_models(limited, ScriptedAnswer()) as served, serve_worker(harness, served.url):
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        workflow_id = await create_question(people.owner, model_id)
        execution_id = await execute_workflow(people.owner, workflow_id)
        await wait_until_waiting(people.owner, execution_id)
        assert len(served.requests) == 1
        # Another run asks nothing, since the model is known to be blocked.
        other_id = await execute_workflow(people.owner, workflow_id)
        await wait_until_waiting(people.owner, other_id)
        assert len(served.requests) == 1
        why = (await people.owner.api.get(f"/api/v1/executions/{execution_id}/why")).json()
        model = (await people.owner.api.get(f"{MODELS}/{model_id}")).json()
    (blocker,) = why["blockers"]
    assert (blocker["code"], blocker["details"]["error"]) == ("retry-at", "model-rate-limited")
    assert "until the provider of its language model accepts calls again" in blocker["message"]
    assert blocker["until"][:16] == model["blockedUntil"][:16]


@pytest.mark.every_database
async def test_a_run_waits_for_the_limits_of_a_model_and_names_them(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with serve_models() as served, serve_worker(harness, served.url):
        provider_id = await create_provider(people.owner, served.url)
        model_id = await create_model(people.owner, provider_id, limits={"requestsPerMinute": 1})
        _, ended = await ask_model(people.owner, model_id)
        assert ended["status"] == "completed", ended["error"]
        execution_id = await execute_workflow(people.owner, await create_question(people.owner, model_id))
        await wait_until_waiting(people.owner, execution_id)
        why = (await people.owner.api.get(f"/api/v1/executions/{execution_id}/why")).json()
        cancelled = await people.owner.api.post(f"/api/v1/executions/{execution_id}/cancel")
    (blocker,) = why["blockers"]
    assert (blocker["code"], blocker["details"]["error"]) == ("retry-at", "model-limit-reached")
    assert "until the limits of its language model admit the call" in blocker["message"]
    assert (cancelled.status_code, len(served.requests)) == (200, 1)


async def test_a_short_rate_limit_is_waited_out_without_spending_attempts(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    limits = [ScriptedAnswer(fault=ModelFault.RATE_LIMITED, retry_after="0.2")] * 3
    async with serve_models(*limits, ScriptedAnswer()) as served, serve_worker(harness, served.url):
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        _, ended = await ask_model(people.owner, model_id)
    assert (ended["status"], ended["outputs"]["ask"]["response"]) == ("completed", "Cold."), ended["error"]


async def test_a_failed_call_hides_the_key_and_counts_nothing(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    refusing = ScriptedAnswer(fault=ModelFault.REPEATS_KEY)
    async with serve_models(refusing) as served, serve_worker(harness, served.url):
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        execution_id, ended = await ask_model(people.owner, model_id)
    assert ended["error"]["cause"]["code"] == "model-key-refused"
    shown = await people.owner.api.get(f"/api/v1/executions/{execution_id}")
    assert (shown.json()["usage"]["calls"], shown.json()["usage"]["cost"]) == (0, "0")
    assert KEY not in shown.text


async def test_a_run_may_call_a_model_as_long_as_its_user_may(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """A share that ends after the acceptance of a run ends its calls too."""
    guest, shared = people.colleague, {"sharedWith": [people.colleague.user.id]}
    async with serve_models() as served:
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url), **shared)
        path = f"{MODELS}/{model_id}?force=true"
        workflow_id = await create_question(guest, model_id)
        for guests, status in (([guest.user.id], "completed"), ([], "failed")):
            execution_id = await execute_workflow(guest, workflow_id)
            assert (await people.owner.api.put(path, json={"sharedWith": guests})).status_code == 200
            async with serve_worker(harness, served.url):
                ended = await wait_until_ended(guest, execution_id)
            assert ended["status"] == status
    assert ended["error"]["cause"]["code"] == "model-not-found"
    assert model_id in ended["error"]["cause"]["message"]
    assert len(served.billed) == 1


async def test_a_run_keeps_the_default_model_of_its_acceptance(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """A later default holds for later runs, of workflows and of those that nodes start."""
    settings, owner = "/api/v1/ai/settings", people.owner
    async with serve_models() as served, serve_worker(harness, served.url):
        source_id = await create_provider(owner, served.url)
        model_id = await create_model(owner, source_id, isShared=True)
        asked = await create_question(owner, "default")
        nodes = [
            {"id": "start", "nodeId": "manual"},
            {"id": "sub", "nodeId": "sub-workflow", "config": {"workflowId": asked}},
        ]
        outer = await owner.create(nodes=nodes, connections=[{"source": "start", "target": "sub"}])
        used: list[str] = []
        executions: list[str] = []
        for default in (model_id, "echo"):
            changed = await people.admin.api.put(settings, json={"defaultModelId": default})
            assert changed.status_code == 200, changed.text
            for workflow_id, node in ((asked, "ask"), (outer, "sub")):
                executions.append(await execute_workflow(owner, workflow_id))
                ended = await wait_until_ended(owner, executions[-1])
                assert ended["status"] == "completed", ended
                used.append(json.dumps(ended["outputs"][node]))
        assert [model_id in output for output in used] == [True, True, False, False]
        # The recorded definition names the model, whatever the default is now.
        body = {"definition": "original", "from": ["ask"]}
        replayed = await owner.api.post(f"/api/v1/executions/{executions[0]}/replay", json=body)
        assert replayed.status_code == 201, replayed.text
        ended = await wait_until_ended(owner, replayed.json()["executionId"])
        assert (ended["status"], len(served.billed)) == ("completed", 3)


def find_call(city: str) -> ScriptedAnswer:
    return ScriptedAnswer("", tool_calls=[{"name": "find", "arguments": f'{{"city": "{city}"}}'}])


@pytest.mark.every_database
async def test_the_steps_of_an_agent_are_shown_with_their_costs_and_a_resumed_run_continues_them(
    harness: GatewayHarness, people: OrganizationUsers, capfd: pytest.CaptureFixture[str]
) -> None:
    target = {"node": {"type": "set", "config": {"values": {"city": "{{ args.city }}", "degrees": -3}}}}
    tool = {"name": "find", "description": "Finds a city.", "target": target}
    broken = ScriptedAnswer(fault=ModelFault.SERVER_ERROR)
    async with (
        serve_models(find_call("Oslo"), broken, ScriptedAnswer()) as served,
        serve_worker(harness, served.url),
    ):
        model_id = await create_model(
            people.owner, await create_provider(people.owner, served.url), price=PRICE
        )
        workflow_id = await people.owner.create(
            nodes=[
                {"id": "start", "nodeId": "manual"},
                {"id": "agent", "nodeId": "agent", "config": {"model": model_id, "prompt": "How is Oslo?"}},
                {"id": "find", "nodeId": "tool", "config": tool},
            ],
            connections=[
                {"source": "start", "target": "agent"},
                {"source": "find", "target": "agent", "targetPort": "tools"},
            ],
        )
        failed_id = await execute_workflow(people.owner, workflow_id)
        assert (await wait_until_ended(people.owner, failed_id))["status"] == "failed"
        failed = await people.owner.api.get(f"/api/v1/executions/{failed_id}/spans/agent")
        resumed = await people.owner.api.post(f"/api/v1/executions/{failed_id}/resume", json={})
        resumed_id = resumed.json()["executionId"]
        ended = await wait_until_ended(people.owner, resumed_id)
    assert (ended["status"], ended["totalNodes"]) == ("completed", 2), ended["error"]
    assert ended["outputs"]["agent"]["response"] == "Cold."
    assert len(served.billed) == 2, "the first answer is not paid again"
    answer, call, missing = failed.json()["steps"]
    assert (answer["kind"], answer["status"], answer["usage"]) == ("model", "completed", USED)
    assert answer["result"]["toolCalls"][0]["name"] == "find"
    assert (call["kind"], call["name"], call["effect"], call["arguments"]) == (
        *("tool", "find", "pure"),
        {"city": "Oslo"},
    )
    assert call["result"] == '{"city":"Oslo","degrees":-3}'
    assert (missing["status"], missing["result"], missing["attempt"]) == ("failed", None, 1)
    span = await people.owner.api.get(f"/api/v1/executions/{resumed_id}/spans/agent")
    assert [step["status"] for step in span.json()["steps"]] == ["completed"] * 3
    assert (span.json()["steps"][2]["attempt"], span.json()["usage"]) == (2, USED), "its own answer alone"
    start = await people.owner.api.get(f"/api/v1/executions/{resumed_id}/spans/start")
    assert "steps" not in start.json()
    assert KEY not in "".join((failed.text, span.text, json.dumps(ended), *capfd.readouterr()))


async def test_why_names_the_model_that_an_agent_waits_for_and_a_cancel_closes_its_connection(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    stalled = ScriptedAnswer(fault=ModelFault.STALL)
    async with serve_models(stalled) as served, serve_worker(harness, served.url):
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        workflow_id = await people.owner.create(
            nodes=[
                {"id": "start", "nodeId": "manual"},
                {"id": "agent", "nodeId": "agent", "config": {"model": model_id, "prompt": "How is Oslo?"}},
            ],
            connections=[{"source": "start", "target": "agent"}],
        )
        execution_id = await execute_workflow(people.owner, workflow_id)
        while not served.connections:  # noqa: ASYNC110 - of another task
            await asyncio.sleep(0.02)
        why = (await people.owner.api.get(f"/api/v1/executions/{execution_id}/why")).json()
        assert not served.connections[0].is_closing()
        await people.owner.api.post(f"/api/v1/executions/{execution_id}/cancel")
        ended = await wait_until_ended(people.owner, execution_id)
        while not served.connections[0].is_closing():  # noqa: ASYNC110 - of another task
            await asyncio.sleep(0.02)
        assert not served.released.is_set(), "the provider was still writing"
    (blocker,) = why["blockers"]
    assert (blocker["code"], blocker["details"]["steps"][0]["name"]) == ("node-running", model_id)
    assert blocker["message"].endswith(f"waits for the answer of the model {model_id}")
    assert (ended["status"], len(served.requests)) == ("cancelled", 1)


async def test_a_replay_reuses_an_agent_unless_its_prompt_has_changed(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    target = {"node": {"type": "set", "config": {"values": {"degrees": -3}}}}
    configs: dict[str, dict[str, Any]] = {
        "agent": {"prompt": "How is Oslo?"},
        "model": {},
        "find": {"name": "find", "description": "Finds a city.", "target": target},
    }
    async with (
        serve_models(find_call("Oslo"), ScriptedAnswer()) as served,
        serve_worker(harness, served.url),
    ):
        model_id = await create_model(people.owner, await create_provider(people.owner, served.url))
        configs["model"]["model"] = model_id
        types = {"agent": "agent", "model": "llm", "find": "tool"}
        workflow_id = await people.owner.create(
            nodes=[
                {"id": "start", "nodeId": "manual"},
                *({"id": name, "nodeId": kind, "config": configs[name]} for name, kind in types.items()),
            ],
            connections=[
                {"source": "start", "target": "agent"},
                {"source": "model", "target": "agent", "targetPort": "ai"},
                {"source": "find", "target": "agent", "targetPort": "tools"},
            ],
        )
        first = await execute_workflow(people.owner, workflow_id)
        assert (await wait_until_ended(people.owner, first))["status"] == "completed"
        path = f"/api/v1/executions/{first}/replay"
        again = (await people.owner.api.post(path, json={"definition": "current"})).json()["executionId"]
        ended = await wait_until_ended(people.owner, again)
        assert (ended["status"], ended["outputs"]["agent"]["response"]) == ("completed", "Cold.")
        assert len(served.requests) == 2, "the replay has asked no model"
        node = f"/api/v1/workflows/{workflow_id}/nodes/agent"
        await people.owner.api.put(node, json={"config": {"prompt": "How is Rome?"}})
        plan = (await people.owner.api.post(path, json={"definition": "current", "dryRun": True})).json()
    (agent,) = [one for one in plan["nodes"] if one["nodeId"] == "agent"]
    assert agent["decision"] == "rerun"
