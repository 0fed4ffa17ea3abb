"""Traces of requests and runs, as a collector gets them."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import func, select
from sqlmodel import col

from gateway.openapi.openapi_document import TRACEPARENT
from models.model_spending import ModelCost
from pilotflame.log_lines import as_json
from telemetry import log_context, tracing
from telemetry.trace_export import run_tracer
from telemetry.trace_settings import TraceSettings
from tests.custom_types import custom_graph, custom_type
from tests.fakes.model_server import ModelFault, ScriptedAnswer, serve_models
from tests.http_receiver import HttpReceiver, run_receiver
from tests.integration.gateway_harness import GatewayHarness, UserClient, create_gateway
from tests.integration.task_workers import TaskWorkerClient
from tests.integration.test_gateway_ai_models import create_model, create_provider
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan, run_otlp_receiver
from tests.services import PostgresServer
from tests.system.wait_conditions import wait_until
from workers.main import run_worker
from workers.settings import WorkerSettings

CALLER_TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER_SPAN: Final = "00f067aa0ba902b7"
CALLER: Final = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
UNSAMPLED: Final = f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"
SECRET: Final = "s3cr3t-in-a-value"
VIEWER: Final = "https://traces.example.com/trace/{trace_id}?orgId=1"
LOOPBACK: Final = (IPv4Network("127.0.0.1/32"),)


@pytest.fixture(scope="module")
async def collector() -> AsyncIterator[OtlpReceiver]:
    async with run_otlp_receiver() as receiver:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
            monkeypatch.setenv("PILOTFLAME_TRACE_URL", VIEWER)
            yield receiver


@pytest.fixture(scope="module")
async def target() -> AsyncIterator[HttpReceiver]:
    async with run_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def harness(
    request: pytest.FixtureRequest,
    collector: OtlpReceiver,
    postgres: PostgresServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[GatewayHarness]:
    """Yield a gateway with a worker in its process; both send traces."""
    folder: Path = tmp_path_factory.mktemp("traces")
    async with create_gateway(request.param, postgres, folder) as harness:
        gateway = harness.gateway
        shared = gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"})
        settings = WorkerSettings(
            **shared, outbound_allowed_networks=LOOPBACK, sweep_seconds=0.2, lease_seconds=60
        )
        traces = TraceSettings(otlp_url=collector.url, trace_hosts="127.0.0.*")
        async with (
            run_tracer(traces, "test"),
            run_worker(settings, gateway.store, gateway.broker, gateway.database),
        ):
            yield harness


@pytest.fixture
async def user(harness: GatewayHarness) -> UserClient:
    return (await harness.people()).owner


async def run_to_end(
    user: UserClient, workflow_id: str, headers: dict[str, str], inputs: dict[str, Any] | None = None
) -> tuple[str, str]:
    """Run a workflow to its end; return its id and the `traceparent` of the answer."""
    path = f"/api/v1/workflows/{workflow_id}/execute"
    answer = await user.api.post(path, json={"inputs": inputs or {}}, headers=headers)
    execution_id: str = answer.json()["executionId"]
    documented: Any = TRACEPARENT.schema["pattern"]
    assert re.search(documented, answer.headers[TRACEPARENT.name])
    await wait_until(lambda: has_ended(user, execution_id), what="the run ends")
    return execution_id, answer.headers["traceparent"]


async def has_ended(user: UserClient, execution_id: str) -> bool:
    progress = (await user.api.get(f"/api/v1/executions/{execution_id}/progress?wait=5")).json()
    assert progress["status"] != "failed", progress["error"]
    return bool(progress["status"] == "completed")


async def received(collector: OtlpReceiver, execution_id: str, nodes: int) -> list[ReceivedSpan]:
    """Return the spans of a run once its segment and at least `nodes` nodes have arrived."""

    def is_complete() -> bool:
        spans = collector.of_run(execution_id)
        segments = [span for span in spans if span.attributes.get("pilotflame.run.status") == "completed"]
        return len(segments) == 1 and sum("pilotflame.node.id" in span.attributes for span in spans) >= nodes

    await wait_until(is_complete, what=f"the spans of {execution_id} arrive")
    return collector.of_run(execution_id)


async def received_nodes(collector: OtlpReceiver, execution_id: str, nodes: int) -> list[ReceivedSpan]:
    """Return the spans of a run once so many nodes have arrived."""

    def is_complete() -> bool:
        spans = collector.of_run(execution_id)
        return sum("pilotflame.node.id" in span.attributes for span in spans) >= nodes

    await wait_until(is_complete, what=f"the nodes of {execution_id} arrive")
    return collector.of_run(execution_id)


def node_of(spans: list[ReceivedSpan], node_id: str, attempt: int = 1) -> ReceivedSpan:
    (found,) = [
        span
        for span in spans
        if span.attributes.get("pilotflame.node.id") == node_id
        and span.attributes["pilotflame.node.attempt"] == attempt
    ]
    return found


async def test_a_run_links_to_its_request_and_passes_its_trace_on_to_trusted_hosts(
    collector: OtlpReceiver, target: HttpReceiver, user: UserClient
) -> None:
    call = {
        "id": "call",
        "nodeId": "http-request",
        "config": {"url": target.url(f"/{SECRET}"), "method": "POST"},
    }
    call["config"]["body"] = {"value": "{{ data.body.secret }}"}  # type: ignore[index]  # a JSON object
    workflow_id = await user.create(
        nodes=[{"id": "start", "nodeId": "manual"}, call],
        connections=[{"sourceNodeId": "start", "targetNodeId": "call"}],
    )
    execution_id, answered = await run_to_end(
        user, workflow_id, {"traceparent": CALLER, "baggage": f"user={SECRET}"}, {"secret": SECRET}
    )
    spans = await received(collector, execution_id, 2)
    answer = tracing.parse_traceparent(answered)
    assert answer is not None
    assert (answer.trace_id, answer.is_sampled) == (CALLER_TRACE, True)
    await wait_until(lambda: any(span.span_id == answer.span_id for span in collector.spans))
    (request,) = [span for span in collector.spans if span.span_id == answer.span_id]
    assert request.name == "POST /api/v1/workflows/{id}/execute"
    assert (request.kind, request.parent_id) == ("server", CALLER_SPAN)
    assert request.attributes["http.response.status_code"] == 201
    by_name = {span.name: span for span in spans}
    accepted, segment, sent = by_name["run accepted"], by_name["run segment"], by_name["http-request"]
    assert accepted.links == ((CALLER_TRACE, answer.span_id),)
    assert {span.trace_id for span in spans} == {accepted.trace_id} != {CALLER_TRACE}
    assert (accepted.parent_id, segment.parent_id) == ("", accepted.span_id)
    assert sent.parent_id == node_of(spans, "start").parent_id == segment.span_id
    outgoing = target.received[-1].headers
    assert outgoing["traceparent"] == f"00-{sent.trace_id}-{sent.span_id}-01"
    assert "baggage" not in outgoing
    assert SECRET in target.received[-1].path
    assert not any(SECRET.encode() in body for body in collector.bodies)


async def test_an_awaited_run_is_a_child_of_its_request(collector: OtlpReceiver, user: UserClient) -> None:
    workflow_id = await user.create(nodes=[{"id": "start", "nodeId": "manual"}])
    execution_id, answered = await run_to_end(user, workflow_id, {"traceparent": CALLER, "Prefer": "wait=20"})
    spans = await received(collector, execution_id, 1)
    (accepted,) = [span for span in spans if span.name == "run accepted"]
    assert (accepted.trace_id, accepted.links) == (CALLER_TRACE, ())
    assert f"-{accepted.parent_id}-" in answered


async def test_each_attempt_and_each_claim_has_one_span_and_none_spans_a_wait(
    collector: OtlpReceiver, target: HttpReceiver, user: UserClient
) -> None:
    target.answers[:] = ["503 Service Unavailable"]
    calls = {"id": "call", "nodeId": "http-request", "retry": {"maxAttempts": 2, "backoff": 0.2}}
    workflow_id = await user.create(
        nodes=[
            {"id": "start", "nodeId": "manual"},
            {**calls, "config": {"url": target.url("/again")}},
            {"id": "pause", "nodeId": "wait", "config": {"seconds": 3}},
            {"id": "last", "nodeId": "set", "config": {"values": {"a": 1}}},
        ],
        connections=[
            {"sourceNodeId": "start", "targetNodeId": "call"},
            {"sourceNodeId": "call", "targetNodeId": "pause"},
            {"sourceNodeId": "pause", "targetNodeId": "last"},
        ],
    )
    execution_id, _ = await run_to_end(user, workflow_id, {})
    spans = await received(collector, execution_id, 5)
    failed, repeated = node_of(spans, "call"), node_of(spans, "call", 2)
    assert (failed.is_error, failed.attributes["error.type"]) == (True, "http-503")
    assert not repeated.is_error
    segments = [span for span in spans if "pilotflame.run.status" in span.attributes]
    paused, resumed = sorted(segments, key=lambda span: span.began_at)
    assert [one.attributes["pilotflame.run.status"] for one in (paused, resumed)] == ["waiting", "completed"]
    assert paused.ended_at < resumed.began_at
    # None spans the wait between them.
    assert not [one for one in spans if one.began_at <= paused.ended_at and resumed.began_at <= one.ended_at]
    assert max(Counter(span.span_id for span in spans).values()) == 1
    assert len({span.trace_id for span in spans}) == 1


async def test_a_caller_with_a_key_decides_whether_its_runs_are_traced(
    collector: OtlpReceiver, harness: GatewayHarness, user: UserClient
) -> None:
    workflow_id = await user.create(nodes=[{"id": "start", "nodeId": "manual"}])
    untraced, answered = await run_to_end(user, workflow_id, {"traceparent": UNSAMPLED})
    assert answered.endswith("-00")
    stranger = await harness.client()
    refused = await stranger.get("/api/v1/workflows", headers={"traceparent": UNSAMPLED})
    assert refused.status_code == 401
    assert refused.headers["traceparent"].endswith("-01"), "without a key, the share of the operator counts"
    for malformed in (
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "ff" + CALLER[2:],
        "nonsense",
        CALLER + "-x",
    ):
        answer = await user.api.get("/api/v1/workflows", headers={"traceparent": malformed})
        assert CALLER_TRACE not in answer.headers["traceparent"]
    traced, _ = await run_to_end(user, workflow_id, {})
    await received(collector, traced, 1)
    assert not collector.of_run(untraced)
    assert "traceUrl" not in (await user.api.get(f"/api/v1/executions/{untraced}")).json()


@pytest.mark.parametrize("is_awaited", [False, True])
async def test_a_run_shows_the_address_of_its_trace(
    collector: OtlpReceiver,
    harness: GatewayHarness,
    user: UserClient,
    is_awaited: bool,  # noqa: FBT001 - a parameter of a case
) -> None:
    workflow_id = await user.create(nodes=[{"id": "start", "nodeId": "manual"}])
    headers = {"traceparent": CALLER, **({"Prefer": "wait=9"} if is_awaited else {})}
    execution_id, _ = await run_to_end(user, workflow_id, headers)
    spans = await received(collector, execution_id, 1)
    trace_id = next(span.trace_id for span in spans if span.name == "run segment")
    assert (trace_id == CALLER_TRACE) is is_awaited
    page = VIEWER.replace("{trace_id}", trace_id)
    for query in ("", "?summary=true"):
        shown = (await user.api.get(f"/api/v1/executions/{execution_id}{query}")).json()
        assert shown["traceUrl"] == page
    browser = await harness.browser()
    assert (await browser.post("/session", json={"key": user.key})).status_code == 201
    shown_page = await browser.get(f"/dashboard/runs/{execution_id}")
    assert f'<a href="{page}" rel="noreferrer">' in shown_page.text


async def test_runs_that_other_runs_start_or_continue_link_to_them(
    collector: OtlpReceiver, user: UserClient
) -> None:
    child_id = await user.create(nodes=[{"id": "start", "nodeId": "manual"}])
    workflow_id = await user.create(
        nodes=[
            {"id": "start", "nodeId": "manual"},
            {"id": "sub", "nodeId": "sub-workflow", "config": {"workflowId": child_id}},
        ],
        connections=[{"sourceNodeId": "start", "targetNodeId": "sub"}],
    )
    parent, _ = await run_to_end(user, workflow_id, {})
    spans = await received(collector, parent, 2)
    segments = {(span.trace_id, span.span_id) for span in spans if span.name == "run segment"}
    listed = (await user.api.get(f"/api/v1/executions?workflow_id={child_id}")).json()["executions"]
    children = await received(collector, listed[0]["id"], 1)
    (accepted,) = [span for span in children if span.name == "run accepted"]
    assert set(accepted.links) <= segments
    assert accepted.links
    replayed = await user.api.post(
        f"/api/v1/executions/{parent}/replay",
        json={"definition": "original", "from": ["start"], "confirm": ["sub"]},
    )
    assert replayed.status_code == 201, replayed.text
    replay = replayed.json()["executionId"]
    await wait_until(lambda: has_ended(user, replay))
    (accepted,) = [span for span in await received(collector, replay, 1) if span.name == "run accepted"]
    assert f"-{accepted.links[0][1]}-" in replayed.headers["traceparent"]


async def test_log_lines_carry_the_ids_of_their_request_run_and_node() -> None:
    def line(**fields: str) -> dict[str, Any]:
        decoded: dict[str, Any] = json.loads(as_json(None, "info", {"event": "tested", **fields}))
        return decoded

    async def in_a_run() -> dict[str, Any]:
        log_context.fields.set({"execution_id": "exec_1", "trace_id": CALLER_TRACE, "node_id": "step"})
        return line(node_id="other")

    in_run = await asyncio.create_task(in_a_run())
    assert (in_run["execution_id"], in_run["trace_id"]) == ("exec_1", CALLER_TRACE)
    assert in_run["node_id"] == "other", "a field of the call counts"
    assert "execution_id" not in line(), "other tasks have ids of their own"


async def test_a_task_carries_the_span_of_its_node(collector: OtlpReceiver, user: UserClient) -> None:
    added = await user.api.post("/api/v1/workflow-nodes", json=custom_type())
    assert added.status_code == 201, added.text
    workflow_id = await user.create(**custom_graph())
    started = await user.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    execution_id = started.json()["executionId"]
    worker = TaskWorkerClient(user.api)
    (task,) = await worker.claim()
    assert await worker.complete(task) == "ok"
    await wait_until(lambda: has_ended(user, execution_id), what="the run ends")
    node = node_of(await received_nodes(collector, execution_id, 2), "work")
    context = tracing.parse_traceparent(task["traceparent"])
    assert context == tracing.TraceContext(node.trace_id, node.span_id, is_sampled=True)


async def test_calls_of_models_and_tools_have_spans_by_the_conventions_for_generative_ai(
    collector: OtlpReceiver, user: UserClient
) -> None:
    """An agent calls a tool, and an `llm` its second model; no text of their conversations is in a span."""
    wanted = [{"name": "find", "arguments": json.dumps({"city": SECRET})}]
    script = (
        ScriptedAnswer("", tool_calls=wanted),
        ScriptedAnswer(f"Cold in {SECRET}."),
        ScriptedAnswer(fault=ModelFault.SERVER_ERROR),
    )
    async with serve_models(*script) as served:
        model_id = await create_model(user, await create_provider(user, served.url))
        target = {"node": {"type": "set", "config": {"values": {"city": "{{ args.city }}"}}}}
        schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        tool = {"name": "find", "description": "d", "parameters": schema, "target": target}
        prompt = {"prompt": f"What of {SECRET}?"}
        workflow_id = await user.create(
            nodes=[
                {"id": "start", "nodeId": "manual"},
                {"id": "helper", "nodeId": "agent", "config": {"model": model_id, **prompt}},
                {"id": "tool", "nodeId": "tool", "config": tool},
                {
                    "id": "ask",
                    "nodeId": "llm",
                    "config": {"model": model_id, "fallbackModelIds": ["echo"], **prompt},
                },
            ],
            connections=[
                {"source": "start", "target": "helper"},
                {"source": "helper", "target": "ask"},
                {"source": "tool", "target": "helper", "targetPort": "tools"},
            ],
        )
        execution_id, _ = await run_to_end(user, workflow_id, {"traceparent": CALLER})
    spans = await received(collector, execution_id, 3)
    agent, ask = node_of(spans, "helper"), node_of(spans, "ask")
    conversation = f"{execution_id}:helper:0"
    assert agent.name == "invoke_agent helper"
    assert agent.attributes["gen_ai.operation.name"] == "invoke_agent"
    inside = {
        (span.name, *span.attributes.get("gen_ai.response.finish_reasons", ())): span
        for span in spans
        if span.parent_id == agent.span_id
    }
    assert len(inside) == 3
    first, called = inside["chat scripted-1", "tool_call"], inside["execute_tool find",]
    assert not inside["chat scripted-1", "stop"].is_error
    usage = {"input_tokens": 100, "output_tokens": 20, "cache_read.input_tokens": 0}
    usage["cache_creation.input_tokens"] = 0
    assert first.kind == "client"
    assert first.attributes == {
        "pilotflame.execution.id": execution_id,
        "pilotflame.model.id": model_id,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "scripted-1",
        "gen_ai.response.model": first.attributes["gen_ai.response.model"],
        "gen_ai.response.finish_reasons": ["tool_call"],
        "gen_ai.conversation.id": conversation,
        **{f"gen_ai.usage.{name}": count for name, count in usage.items()},
    }
    assert (called.kind, called.is_error) == ("internal", False)
    expected = {"gen_ai.tool.name": "find", "gen_ai.conversation.id": conversation}
    assert called.attributes.items() >= expected.items()
    assert called.attributes["gen_ai.tool.call.id"]
    asked = {span.name: span for span in spans if span.parent_id == ask.span_id}
    assert asked["chat scripted-1"].attributes["error.type"] == "model-unavailable"
    assert asked["chat echo"].attributes["gen_ai.provider.name"] == "echo"
    assert SECRET.encode() not in b"".join(collector.bodies)


async def test_reused_answers_of_a_replay_have_no_second_span_usage_or_cost(
    collector: OtlpReceiver, harness: GatewayHarness, user: UserClient
) -> None:
    wanted = [{"name": "find", "arguments": json.dumps({"city": "Oslo"})}]
    async with serve_models(ScriptedAnswer("", tool_calls=wanted), ScriptedAnswer("Cold.")) as served:
        price = {"input": "1", "output": "10"}
        model_id = await create_model(user, await create_provider(user, served.url), price=price)
        target = {"node": {"type": "set", "config": {"values": {"city": "{{ args.city }}"}}}}
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}
        tool = {"name": "find", "description": "d", "parameters": schema, "target": target}
        agent = {"model": model_id, "prompt": "How is Oslo?", "maxIterations": 1, "onLimit": "error"}
        workflow_id = await user.create(
            nodes=[
                {"id": "start", "nodeId": "manual"},
                {"id": "agent", "nodeId": "agent", "config": agent},
                {"id": "tool", "nodeId": "tool", "config": tool},
            ],
            connections=[
                {"source": "start", "target": "agent"},
                {"source": "tool", "target": "agent", "targetPort": "tools"},
            ],
        )
        begun = await user.api.post(
            f"/api/v1/workflows/{workflow_id}/execute", json={}, headers={"traceparent": CALLER}
        )
        first: str = begun.json()["executionId"]
        await wait_until(lambda: has_status(user, first, "failed"), what="the agent reaches its limit")
        node = f"/api/v1/workflows/{workflow_id}/nodes/agent"
        changed = await user.api.put(node, json={"config": {**agent, "maxIterations": 5}})
        assert changed.status_code == 200, changed.text
        answer = await user.api.post(
            f"/api/v1/executions/{first}/replay",
            json={"definition": "current"},
            headers={"traceparent": CALLER},
        )
        again: str = answer.json()["executionId"]
        await wait_until(lambda: has_status(user, again, "completed"), what="the replay completes")
        assert len(served.requests) == 2
    steps = (await user.api.get(f"/api/v1/executions/{again}/steps")).json()["steps"]
    assert [step["reused"] for step in steps] == [True, True, False]
    spans = await received_nodes(collector, again, 1)
    operations = [span.attributes.get("gen_ai.operation.name") for span in spans]
    assert sorted(each for each in operations if each) == ["chat", "invoke_agent"]
    used = {"inputTokens": 100, "outputTokens": 20, "cost": "0.0003"}
    for execution_id in (first, again):
        shown = (await user.api.get(f"/api/v1/executions/{execution_id}")).json()
        assert shown["usage"].items() >= used.items(), "each run has one answer of its own"
    path = f"/api/v1/ai/models/{model_id}/metrics"

    async def are_counted() -> bool:
        return bool((await user.api.get(path)).json()["total"]["requests"] >= 2)

    await wait_until(are_counted, what="both answers are counted")
    assert (await user.api.get(path)).json()["total"].items() >= {"requests": 2, "cost": "0.0006"}.items()
    month_sums = select(func.sum(ModelCost.calls), func.sum(ModelCost.cost))
    async with harness.gateway.database.read() as connection:
        sums = (await connection.execute(month_sums.where(col(ModelCost.model_id) == model_id))).one()
    assert tuple(map(int, sums)) == (2, 600_000)


async def has_status(user: UserClient, execution_id: str, status: str) -> bool:
    found = (await user.api.get(f"/api/v1/executions/{execution_id}/progress?wait=5")).json()
    return bool(found["status"] == status)
