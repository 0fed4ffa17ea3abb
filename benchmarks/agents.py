"""Turns of agents: commits and computing time of each beside the model's time, and memory while many stream at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from benchmarks import postgres_counters, processes, usage
from benchmarks.http1 import BenchmarkApi, KeptConnection
from benchmarks.processes import ServerUnderTest
from tests import services

FEW_TURNS, MANY_TURNS = 10, 90
"""Turns of two agents, whose difference has no costs of runs in it."""
REPEATS: Final = 3
STREAMS: Final = 100
STREAM_SECONDS: Final = 5.0
PIECES: Final = 50
PATIENCE_SECONDS: Final = 120.0


async def measure(folder: Path) -> dict[str, float]:
    """Return the costs of agents in one worker, on PostgreSQL and Redis, by name of figure."""
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        database_url = await postgres.create_database("agents")
        async with (
            _serve_model() as model,
            processes.run_production(
                folder,
                database_url,
                redis.url,
                {"CONCURRENCY": str(STREAMS)},
                names=("gateway", "worker", "scheduler"),
            ) as server,
        ):
            agent = await _prepare(server.api, model.url)
            return {
                **await _measure_turns(server, database_url, agent),
                **await _measure_streams(server, model, agent),
            }


class _ScriptedModel:
    """Model that calls a tool as often as the prompt says, and then answers."""

    def __init__(self) -> None:
        self.url = ""
        self.open_streams = 0
        self.most_streams = 0
        self.seconds = 0.0
        """Duration of each answer."""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer a chat completion by a stream: a tool call, or the last text once
        the prompt's number of turns is reached.
        """
        body = await request.json()
        messages: Sequence[dict[str, Any]] = body["messages"]
        wanted = next(int(each["content"]) for each in messages if each["role"] == "user")
        done = sum(each["role"] == "tool" for each in messages)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.open_streams += 1
        self.most_streams = max(self.most_streams, self.open_streams)
        for _ in range(PIECES if self.seconds else 0):
            await response.write(_event({"delta": {"content": "word "}}))
            await asyncio.sleep(self.seconds / PIECES)
        self.open_streams -= 1
        called = {"name": "look", "arguments": json.dumps({"city": f"City {done}"})}
        call = {"index": 0, "id": f"call_{done}", "type": "function", "function": called}
        last = {"content": "Done."} if done + 1 >= wanted else {"tool_calls": [call]}
        reason = "stop" if done + 1 >= wanted else "tool_calls"
        used = {"prompt_tokens": 100, "completion_tokens": 20}
        await response.write(_event({"delta": last, "finish_reason": reason}, used) + b"data: [DONE]\n\n")
        return response


def _event(choice: dict[str, Any], used: dict[str, int] | None = None) -> bytes:
    chunk = {"model": "scripted-1", "choices": [{"index": 0, **choice}], "usage": used}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@asynccontextmanager
async def _serve_model() -> AsyncIterator[_ScriptedModel]:
    model, app = _ScriptedModel(), web.Application()
    app.router.add_post("/v1/chat/completions", model.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    port = processes.find_free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    model.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield model
    finally:
        await runner.cleanup()


async def _prepare(api: BenchmarkApi, url: str) -> str:
    """Register the model, and create a workflow with an agent that has a tool; return the workflow's id."""
    connection = await KeptConnection.open(api.port)
    key = {"name": "Scripted", "provider": "openai-compatible", "baseUrl": url, "apiKey": "a-key"}
    source = (await _post(connection, api, "/ai/provider-keys", key))["dataSourceId"]
    model = {"name": "Scripted", "vendorModelId": "scripted-1", "dataSourceId": source}
    model_id = (await _post(connection, api, "/ai/models", model))["modelId"]
    agent = {
        "model": model_id,
        "prompt": "{{ trigger.body.turns }}",
        "maxIterations": 100,
        "maxToolCalls": 1_000,
    }
    look = {
        "name": "look",
        "description": "Returns the temperature of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "target": {"node": {"type": "set", "config": {"values": {"city": "{{ args.city }}", "degrees": -3}}}},
    }
    body = {
        "name": "An agent",
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "agent", "nodeId": "agent", "config": agent},
            {"id": "look", "nodeId": "tool", "config": look},
        ],
        "connections": [
            {"source": "start", "target": "agent"},
            {"source": "look", "target": "agent", "targetPort": "tools"},
        ],
    }
    workflow_id: str = (await _post(connection, api, "/workflows", body))["workflowId"]
    connection.close()
    return workflow_id


async def _post(connection: KeptConnection, api: BenchmarkApi, path: str, body: Any) -> Any:  # noqa: ANN401 - any JSON value
    answer = await connection.send(api.post(f"/api/v1{path}", json.dumps(body).encode()))
    if answer.status >= 300:
        raise ValueError(f"{path}: {answer.status} {answer.body[:500]!r}")
    return json.loads(answer.body)


async def _run_agent(api: BenchmarkApi, workflow_id: str, turns: int) -> None:
    """Run the agent to its end; raises `ValueError` if the run fails, and `TimeoutError` after the patience."""
    connection = await KeptConnection.open(api.port)
    inputs = {"triggerInputs": {"body": {"turns": str(turns)}}}
    started = await _post(connection, api, f"/workflows/{workflow_id}/execute", inputs)
    path = f"/api/v1/executions/{started['executionId']}/progress?wait=20"
    async with asyncio.timeout(PATIENCE_SECONDS):
        status = ""
        while status not in {"completed", "failed", "cancelled"}:
            shown = json.loads((await connection.send(api.get(path))).body)
            status = shown["status"]
    connection.close()
    if status != "completed":
        raise ValueError(f"The agent has {status}: {shown}")


async def _measure_turns(server: ServerUnderTest, database_url: str, workflow_id: str) -> dict[str, float]:
    """Return the write transactions and the worker's CPU milliseconds per turn, without those of a run itself."""
    await _run_agent(server.api, workflow_id, FEW_TURNS)
    spent: dict[int, tuple[float, float]] = {}
    for turns in (FEW_TURNS, MANY_TURNS):
        before, began = await postgres_counters.read_counters(database_url), _worker_seconds(server)
        for _ in range(REPEATS):
            await _run_agent(server.api, workflow_id, turns)
        after = await postgres_counters.read_counters(database_url)
        seconds = _worker_seconds(server) - began
        spent[turns] = (after.transaction_ids - before.transaction_ids, seconds)
    more = (MANY_TURNS - FEW_TURNS) * REPEATS
    transactions, seconds = (spent[MANY_TURNS][index] - spent[FEW_TURNS][index] for index in range(2))
    return {"transactions_per_turn": transactions / more, "worker_ms_per_turn": seconds * 1_000 / more}


async def _measure_streams(
    server: ServerUnderTest, model: _ScriptedModel, workflow_id: str
) -> dict[str, float]:
    """Return the worker's largest memory in MB while all agents stream, and the largest number of streams at once."""
    model.seconds = STREAM_SECONDS
    running = [asyncio.create_task(_run_agent(server.api, workflow_id, 1)) for _ in range(STREAMS)]
    most = 0.0
    while not all(task.done() for task in running):
        most = max(most, usage.memory_megabytes({"worker": server.process_ids["worker"]})["worker"])
        await asyncio.sleep(0.25)
    await asyncio.gather(*running)
    return {"streams_at_once": float(model.most_streams), f"worker_mb_with_{STREAMS}_streams": most}


def _worker_seconds(server: ServerUnderTest) -> float:
    return usage.cpu_seconds({"worker": server.process_ids["worker"]})["worker"]
