"""Texts that models are writing, as clients see them over each broker, and through a kill of their worker."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from engine.values import Json
from tests.fakes.model_server import KEY, ModelFault, ModelServer, ScriptedAnswer, serve_models
from tests.system.client import API_KEY, RetryingClient
from tests.system.harness import RECOVERY_SECONDS, OneProcess, SystemUnderTest, on_all_deployments
from tests.system.wait_conditions import wait_until

pytestmark = [pytest.mark.timeout(120), on_all_deployments]


@dataclass(frozen=True)
class StepEvent:
    """Server-sent event."""

    name: str
    data: dict[str, Any]
    id: str


@dataclass
class StepStream:
    """Open stream of the steps of a run."""

    lines: AsyncIterator[str]

    async def next(self) -> StepEvent:
        """Return the next event; raises `StopAsyncIteration` at the end."""
        fields: dict[str, str] = {}
        while True:
            line = await anext(self.lines)
            if not line and "event" in fields:
                return StepEvent(fields["event"], json.loads(fields["data"]), fields.get("id", ""))
            name, _, value = line.partition(": ")
            fields[name] = value

    async def until(self, name: str) -> StepEvent:
        """Return the next event with a name, or the first that ends the stream."""
        while (event := await self.next()).name not in {name, "execution"}:
            pass
        return event


@asynccontextmanager
async def follow_steps(url: str, execution_id: str, last_seen: str = "0") -> AsyncIterator[StepStream]:
    headers = {"X-API-Key": API_KEY, "Accept": "text/event-stream", "Last-Event-ID": last_seen}
    async with (
        httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        client.stream("GET", f"/api/v1/executions/{execution_id}/steps", headers=headers) as response,
    ):
        assert response.status_code == 200
        yield StepStream(response.aiter_lines())


async def create_agent(client: RetryingClient, url: str) -> str:
    """Create a workflow with an agent and a model at a URL, and return its id."""
    provider: dict[str, Json] = {"name": url, "provider": "openai-compatible", "baseUrl": url, "apiKey": KEY}
    created = await client.answer("POST", "/ai/provider-keys", provider)
    source_id = created.json()["dataSourceId"]
    model: dict[str, Json] = {"name": "Scripted", "vendorModelId": "scripted-1", "dataSourceId": source_id}
    model_id = (await client.answer("POST", "/ai/models", model)).json()["modelId"]
    return await client.create(
        {
            "name": "An agent",
            "nodes": [
                {"id": "start", "nodeId": "manual"},
                {"id": "agent", "nodeId": "agent", "config": {"model": model_id, "prompt": "Report."}},
            ],
            "connections": [{"source": "start", "target": "agent"}],
        }
    )


async def kill_asking_worker(deployment: SystemUnderTest, served: ModelServer) -> None:
    """Kill the worker that has sent the last request to a model."""
    _, port = served.connections[-1].get_extra_info("peername")[:2]
    worker = await wait_until(lambda: deployment.worker_behind(port), RECOVERY_SECONDS)
    worker.kill()


async def test_a_text_reaches_clients_while_it_is_written_and_begins_again_when_its_worker_is_killed(
    deployment: SystemUnderTest, client: RetryingClient
) -> None:
    script = [ScriptedAnswer(f"{city}: {KEY} cold", fault=ModelFault.STALL) for city in ("Oslo", "Rome")]
    async with serve_models(*script) as served:
        workflow_id = await create_agent(client, served.url)
        execution_id = await client.execute(workflow_id)
        url = [deployment.url, *deployment.other_urls][-1]
        async with follow_steps(url, execution_id) as stream:
            begun = await stream.until("step")
            token = await stream.until("token")
            # The half of the key that has arrived is held back.
            assert (token.data["text"], token.data["offset"], token.id) == ("Oslo: ", 0, "")
            assert (token.data["nodeId"], token.data["number"], token.data["attempt"]) == ("agent", 0, 1)
            await kill_asking_worker(deployment, served)
            if not isinstance(deployment, OneProcess):
                retry = await stream.until("retry")
                assert retry.data == {
                    "nodeId": "agent",
                    "iteration": "",
                    "number": 0,
                    "attempt": 1,
                    "reason": "worker-lost",
                }
                await read_second_attempt(stream, served)
        if isinstance(deployment, OneProcess):
            # A new stream begins without partial texts.
            await deployment.revive()
            async with follow_steps(url, execution_id, begun.id) as stream:
                await read_second_attempt(stream, served)
        assert (await client.end(execution_id)).status == "completed"
        assert len(served.requests) == 2


async def read_second_attempt(stream: StepStream, served: ModelServer) -> None:
    """Read the text of the second attempt, its step, and the end of the run."""
    text = ""
    while (event := await stream.next()).name != "execution":
        if event.name == "token":
            assert (event.data["attempt"], event.data["offset"]) == (2, len(text))
            text += event.data["text"]
            served.released.set()
        last = event
    assert text in {"Rome: ", "Rome: [hidden] cold"}
    assert (last.name, last.data["status"]) == ("step", "completed")
    assert last.data["result"]["text"] == "Rome: [hidden] cold"
