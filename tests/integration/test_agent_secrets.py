"""Search for the secrets of an agent's model and tools in all that the model, people and the database get."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import exposition
from prometheus_client.registry import REGISTRY
from structlog.testing import capture_logs

from telemetry import tracing
from telemetry.tracing import FinishedSpan, Tracer
from tests.fakes.mcp_server import McpFault, McpServer, build_tool, serve_tools
from tests.fakes.model_server import ModelFault, ModelServer, ScriptedAnswer, serve_models
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers
from tests.integration.test_gateway_ai_models import allow_loopback, create_model
from tests.integration.test_gateway_data_sources import SOURCES
from tests.integration.test_gateway_tool_servers import SERVERS, accept_offered
from tests.integration.test_secrets_stay_secret import (
    LOOPBACK,
    AnswerCollector,
    RepeatingServers,
    database_files,
    dump,
)
from tests.integration.test_secrets_stay_secret import (
    repeating_servers as repeating_servers,  # noqa: PLC0414 - a fixture
)
from tests.integration.test_waiting_runs import execute_workflow, wait_for_question, wait_until_ended
from workers.main import run_worker
from workers.settings import WorkerSettings

pytestmark = pytest.mark.timeout(120)
CANARY = "canary-c40e5d"
MODEL_KEY = f"{CANARY}-model"
TOOL_KEY = f'{CANARY}-"tool"'
"""With quotes, which a server repeats in the escaped form of JSON."""
PARAMETERS = {"type": "object", "properties": {"text": {"type": "string"}}}
TRACES = (CANARY, b64encode(f'ada:{CANARY}-"basic"'.encode()).decode(), CANARY.encode().hex())


@asynccontextmanager
async def serve_worker(harness: GatewayHarness) -> AsyncIterator[None]:
    """Run a worker that may call all servers of this machine."""
    gateway = harness.gateway
    shared = gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"})
    settings = WorkerSettings(**shared, outbound_allowed_networks=LOOPBACK)
    async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
        yield


async def create_sources(reader: AnswerCollector, served: ModelServer) -> dict[str, str]:
    """Create the provider and the data sources of the tools, and return their ids by name."""
    bodies: Mapping[str, Mapping[str, Any]] = {
        "provider": {
            "type": "ai-provider",
            "settings": {"baseUrl": served.url},
            "secrets": {"key": MODEL_KEY},
        },
        "bearer": {"type": "http-bearer", "secrets": {"token": f"{CANARY}-bearer"}},
        "basic": {
            "type": "http-basic",
            "settings": {"username": "ada"},
            "secrets": {"password": f'{CANARY}-"basic"'},
        },
        "database": {
            "type": "postgresql",
            "settings": {"host": "127.0.0.1", "port": 1, "database": "d", "user": "u"},
            "secrets": {"password": f"{CANARY}-database"},
        },
    }
    ids = {}
    for name, body in bodies.items():
        created = await reader.ask("POST", SOURCES, {"name": name, **body})
        ids[name] = created["dataSourceId"]
    return ids


async def create_tool_server(reader: AnswerCollector, served: McpServer) -> str:
    """Create a tool server, accept its tool, and return its id."""
    body = {"name": "Notebook", "url": served.url, "apiKey": TOOL_KEY}
    source_id: str = (await reader.ask("POST", SERVERS, body))["dataSourceId"]
    path = f"{SERVERS}/{source_id}"
    await reader.ask("POST", f"{path}/test")
    refreshed = await reader.ask("POST", f"{path}/refresh")
    await reader.ask("POST", f"{path}/accept", accept_offered(refreshed["toolServer"], "add_note"))
    return source_id


def build_graph(model_id: str, url: str, ids: Mapping[str, str]) -> dict[str, Any]:
    """Return a graph of an agent with a tool for each data source."""
    targets: Mapping[str, dict[str, Any]] = {
        "look": {"type": "http-request", "config": {"url": f"{url}/", "dataSource": ids["bearer"]}},
        "break": {"type": "http-request", "config": {"url": f"{url}/broken", "dataSource": ids["basic"]}},
        "count": {
            "type": "postgresql-source",
            "config": {"dataSource": ids["database"], "query": "SELECT 1"},
        },
        "note": {
            "type": "mcp-tool",
            "config": {"toolServer": ids["tools"], "tool": "add_note", "arguments": "{{ args }}"},
        },
    }
    agent = {"model": model_id, "prompt": "Report.", "effects": ["read", "write"], "approval": "writes"}
    tools = [
        {
            "id": name,
            "nodeId": "tool",
            "config": {
                "name": name,
                "description": name,
                "parameters": PARAMETERS,
                "target": {"node": target},
                "maxAttempts": 1,
            },
        }
        for name, target in targets.items()
    ]
    return {
        "name": "Canary",
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "agent", "nodeId": "agent", "config": agent},
            *tools,
        ],
        "connections": [
            {"source": "start", "target": "agent"},
            *({"source": name, "target": "agent", "targetPort": "tools"} for name in targets),
        ],
    }


def call_tools(*names: str) -> ScriptedAnswer:
    """Return an answer of a provider that repeats its key in the text and in the arguments of its calls."""
    arguments = json.dumps({"text": f"I was sent {MODEL_KEY}"})
    calls = [{"name": name, "arguments": arguments} for name in names]
    return ScriptedAnswer(f"My key is {MODEL_KEY}.", tool_calls=calls)


async def read_run(reader: AnswerCollector, execution_id: str, workflow_id: str) -> None:
    """Read everything about an execution and its workflow."""
    run = f"/api/v1/executions/{execution_id}"
    parts = (
        "",
        "/progress",
        "/graph",
        "/spans",
        "/spans/agent",
        "/logs",
        "/steps",
        "/why",
        "/pending-inputs",
    )
    for part in parts:
        await reader.ask("GET", run + part)
    await reader.ask("GET", "/api/v1/pending-inputs")
    workflow = f"/api/v1/workflows/{workflow_id}"
    for part in ("", "/export", "/versions/1", "/nodes", "/why", "/statistics"):
        await reader.ask("GET", workflow + part)
    for action in ("/validate", "/compute-scopes"):
        await reader.ask("POST", workflow + action)


async def collect_places(harness: GatewayHarness) -> dict[str, str]:
    """Return all that the server keeps, and its metrics, by place."""
    kept = {
        "metrics": exposition.generate_latest(REGISTRY).decode(),
        "rows": await dump(harness),
    }
    return kept | {path.name: path.read_bytes().decode("latin-1") for path in database_files(harness)}


async def test_no_secret_reaches_a_model_a_person_or_a_row(
    harness: GatewayHarness,
    people: OrganizationUsers,
    repeating_servers: RepeatingServers,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    allow_loopback(harness, monkeypatch)
    person, reader, trail = people.owner, AnswerCollector(people.owner.api), AnswerCollector(people.admin.api)
    traced: list[FinishedSpan] = []
    monkeypatch.setattr(tracing, "tracer", Tracer(traced.append, sends_content=True))
    turns = [
        call_tools("look", "break", "count"),
        call_tools("note"),
        call_tools("note"),
        ScriptedAnswer(f"Done with {MODEL_KEY}."),
    ]
    tool = build_tool(description=f"Adds a note by {TOOL_KEY}.")
    with capture_logs() as lines:
        async with (
            serve_models(*turns) as models,
            serve_tools(key=TOOL_KEY, tools=[tool], fault=McpFault.REPEATS_KEY) as tools,
            serve_worker(harness),
        ):
            ids = await create_sources(reader, models)
            ids["tools"] = await create_tool_server(reader, tools)
            model_id = await create_model(person, ids["provider"], price={"input": "1", "output": "1"})
            workflow_id = await person.create(**build_graph(model_id, repeating_servers.url, ids))
            execution_id = await execute_workflow(person, workflow_id)
            for fault in (McpFault.REPEATS_KEY, McpFault.KEY_REFUSED):
                tools.fault = fault
                asked = await wait_for_question(person, execution_id)
                await read_run(reader, execution_id, workflow_id)
                answer = {"nodeId": asked["nodeId"], "iteration": asked["iteration"], "choice": "approve"}
                await reader.ask("POST", f"/api/v1/executions/{execution_id}/input", answer)
            ended = await wait_until_ended(person, execution_id)
            models.script = [ScriptedAnswer(fault=ModelFault.REPEATS_KEY)]
            failed_id = await execute_workflow(person, workflow_id)
            failed = await wait_until_ended(person, failed_id)
        for run_id in (execution_id, failed_id):
            await read_run(reader, run_id, workflow_id)
            for stream in ("events", "steps?follow=true"):
                events = await person.api.get(f"/api/v1/executions/{run_id}/{stream}")
                assert "event: " in events.text
                reader.texts.append(events.text)
        for source_id in ids.values():
            await reader.ask("GET", f"{SOURCES}/{source_id}")
        for path in ("models", "provider-keys", "tool-servers", "costs"):
            await reader.ask("GET", f"/api/v1/ai/{path}")
        await trail.ask("GET", "/api/v1/audit?limit=100")

    # The keys were used where they belong, and each tool was called.
    assert (ended["status"], failed["status"]) == ("completed", "failed"), (ended["error"], failed["error"])
    assert {headers["authorization"] for headers in models.headers} == {f"Bearer {MODEL_KEY}"}
    assert {headers["authorization"] for headers in tools.headers} == {f"Bearer {TOOL_KEY}"}
    assert {told["Authorization"].split()[0] for told in repeating_servers.told} == {"Bearer", "Basic"}
    told = [message for message in models.requests[3]["messages"] if message["role"] == "tool"]
    assert len(told) == 5

    places = {
        "the model": json.dumps(models.requests, ensure_ascii=False),
        "answers": "\n".join(reader.texts + trail.texts),
        "logs": repr(lines) + "".join(capfd.readouterr()),
        "spans": "\n".join(str(value) for span in traced for value in span.attributes.values()),
        **await collect_places(harness),
    }
    found = [(place, trace) for place, text in places.items() for trace in TRACES if trace in text]
    assert found == []
    assert all("[hidden]" in places[place] for place in ("the model", "answers", "rows", "spans"))


# ── contents that are not recorded ──────────────────────────────────────────────────────────────────────────

SAID = f"{CANARY}-said"
TOPIC = {"type": "object", "properties": {"topic": {"enum": ["order"]}}, "required": ["topic"]}
PROMPT = "Report {{ data.body.first }}{{ data.body.second }}."
"""The run gets both halves of the canary, which only a prompt puts together."""
HALVES = {"first": SAID[:9], "second": SAID[9:]}
NODES: Mapping[str, dict[str, Any]] = {
    "agent": {"prompt": PROMPT, "system": PROMPT},
    "llm": {"prompt": PROMPT, "outputSchema": TOPIC},
    "ai-gateway": {"userPrompt": PROMPT, "systemPrompt": PROMPT},
    "classifier": {"input": PROMPT, "labels": [{"name": "order"}, {"name": "invoice"}]},
    "extract": {"input": PROMPT, "schema": TOPIC},
    "llm-router": {"prompt": PROMPT, "routes": [{"port": "order"}]},
}


def build_workflow(kind: str, flag: dict[str, Any]) -> dict[str, Any]:
    """Return a graph of one node with a model; an agent has two tools, and an agent as a third one."""
    config = {**flag, **NODES[kind]}
    asking = {"id": kind, "nodeId": kind, "config": config, "inputMappings": {"more": PROMPT}}
    nodes: list[dict[str, Any]] = [{"id": "start", "nodeId": "manual"}, asking]
    edges = [{"source": "start", "target": kind}]
    if kind == "agent":
        targets: Mapping[str, dict[str, Any]] = {
            "note": {"type": "set", "config": {"values": {"text": "{{ args.text }}"}}},
            "log": {"type": "log", "config": {"message": "{{ args.text }}"}},
            "helper": {"type": "agent", "config": {"model": flag["model"], "prompt": "{{ args.text }}"}},
        }
        for name, target in targets.items():
            tool = {"name": name, "description": name, "parameters": PARAMETERS, "target": {"node": target}}
            nodes.append({"id": name, "nodeId": "tool", "config": tool})
            edges.append({"source": name, "target": "agent", "targetPort": "tools"})
        edges.append({"source": "note", "target": "helper", "targetPort": "tools"})
    return {"name": f"Said to {kind}", "nodes": nodes, "connections": edges}


class Whisperer:
    """Script in which every answer but the last one of a conversation holds the canary."""

    def __init__(self, served: ModelServer) -> None:
        self._served = served
        served.on_request = self.choose

    def choose(self) -> None:
        request = self._served.requests[-1]
        tools = [tool["function"]["name"] for tool in request.get("tools", ())]
        done = sum(message["role"] == "assistant" for message in request["messages"])
        arguments = json.dumps({"text": SAID})
        calls = [{"name": name, "arguments": arguments} for name in [*tools, f"{SAID}-tool"]]
        if tools:
            self._served.script = [
                ScriptedAnswer(SAID, tool_calls=calls) if done == 0 else ScriptedAnswer("Done.")
            ]
        else:
            # An answer that fits no schema, which a correction quotes and an error too.
            is_text = "json" not in json.dumps(request).lower()
            self._served.script = [ScriptedAnswer("Done." if is_text else SAID)]


@pytest.mark.parametrize("is_recorded", [False, True])
async def test_contents_that_are_not_recorded_are_kept_nowhere(
    harness: GatewayHarness,
    people: OrganizationUsers,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_recorded: bool,
) -> None:
    allow_loopback(harness, monkeypatch)
    person, reader = people.owner, AnswerCollector(people.owner.api)
    traced: list[FinishedSpan] = []
    monkeypatch.setattr(tracing, "tracer", Tracer(traced.append, sends_content=True))
    with capture_logs() as lines:
        async with serve_models() as models, serve_worker(harness):
            Whisperer(models)
            source = {"name": "Said", "type": "ai-provider", "settings": {"baseUrl": models.url}}
            source_id = (await reader.ask("POST", SOURCES, {**source, "secrets": {"key": "k"}}))[
                "dataSourceId"
            ]
            model_id = await create_model(person, source_id)
            flag = {"model": model_id, **({} if is_recorded else {"recordContent": False})}
            ends: dict[str, str] = {}
            for kind in NODES:
                workflow_id = await person.create(**build_workflow(kind, flag))
                execution_id = await execute_workflow(person, workflow_id, **HALVES)
                ends[kind] = (await wait_until_ended(person, execution_id))["status"]
                await read_run(reader, execution_id, workflow_id)
                run = f"/api/v1/executions/{execution_id}"
                await reader.ask("GET", f"{run}/spans/{kind}")
                await reader.ask("POST", f"{run}/replay", {"dryRun": True})
                for stream in ("events", "steps?follow=true"):
                    reader.texts.append((await person.api.get(f"{run}/{stream}")).text)
        await reader.ask("GET", "/api/v1/dead-letters")
    failed = {kind for kind, status in ends.items() if status == "failed"}
    assert failed == {"llm", "classifier", "extract"}, "their answers fit no schema"
    assert SAID in json.dumps(models.requests)
    places = {
        "answers": "\n".join(reader.texts),
        "logs": repr(lines),
        "spans": "\n".join(str(value) for span in traced for value in (span.name, *span.attributes.values())),
        **await collect_places(harness),
    }
    found = {place for place, text in places.items() if SAID in text}
    assert (found >= {"answers", "rows", "spans"}) is is_recorded, found
    assert is_recorded or found == set()
