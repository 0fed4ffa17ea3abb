"""A real language model of 135 million parameters behind the nodes: its answers count by form, never by words."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.integration.gateway_harness import GatewayHarness, UserClient, create_gateway
from tests.integration.test_gateway_ai_models import MODELS, allow_loopback, create_model, create_provider
from tests.integration.test_model_runs import serve_worker
from tests.integration.test_waiting_runs import execute_workflow, wait_until_ended
from tests.services import PostgresServer
from tests.tools.environments import REAL_MODEL

pytestmark = [pytest.mark.anyio, pytest.mark.realmodel, pytest.mark.toolchain]

CITIES = ["Oslo", "Rome"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of the API of a real model; the tests are skipped where its packages can't be installed."""
    if (platform.system(), platform.machine(), platform.libc_ver()[0]) != ("Linux", "x86_64", "glibc"):
        pytest.skip("The packages of the real model are for Linux with glibc on x86-64 alone")
    try:
        interpreter = REAL_MODEL.python
        interpreter.resolve(strict=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        pytest.skip(f"The packages of the real model can't be installed here: {reason}")
    command = [str(interpreter), str(REAL_MODEL.sources / "serve.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        try:
            assert address.startswith("http://127.0.0.1:"), "the server has not started"
            yield f"{address}/v1"
        finally:
            server.kill()


@pytest.fixture(scope="module")
async def harness(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    """A gateway on SQLite alone: the other tests of models run on both databases."""
    async with create_gateway("sqlite", postgres, tmp_path_factory.mktemp("gateway")) as harness:
        yield harness


@pytest.fixture(scope="module")
async def person(harness: GatewayHarness) -> UserClient:
    return (await harness.people()).owner


@pytest.fixture(scope="module")
async def model_id(harness: GatewayHarness, person: UserClient, url: str) -> str:
    """A registered model that was tested, since the form of its requests depends on that."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        allow_loopback(harness, monkeypatch)
        found = await create_model(person, await create_provider(person, url))
        tested = (await person.api.post(f"{MODELS}/{found}/test")).json()
    assert tested["ok"], tested
    if not tested["capabilities"]["jsonSchema"]:
        pytest.skip("The real model does not follow a schema with the arithmetic of this machine")
    return found


async def run_nodes(
    harness: GatewayHarness, person: UserClient, url: str, *nodes: dict[str, Any], tools: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run nodes behind a trigger, those in `tools` as tools of the first, and return its output."""
    first = nodes[0]["id"]
    edges = [{"source": "start", "target": first}]
    edges += [{"source": tool, "target": first, "targetPort": "tools"} for tool in tools]
    workflow_id = await person.create(nodes=[{"id": "start", "nodeId": "manual"}, *nodes], connections=edges)
    async with serve_worker(harness, url):
        ended = await wait_until_ended(person, await execute_workflow(person, workflow_id))
    assert ended["status"] == "completed", ended["error"]
    output: dict[str, Any] = ended["outputs"][first]
    return output


async def test_an_answer_is_streamed_to_its_end_with_its_usage(
    harness: GatewayHarness, person: UserClient, url: str, model_id: str
) -> None:
    config = {"model": model_id, "prompt": "Say hello.", "maxTokens": 8}
    output = await run_nodes(harness, person, url, {"id": "ask", "nodeId": "llm", "config": config})
    assert output["response"].strip()
    assert output["finishReason"] in {"stop", "length"}
    assert not output["usage"]["isEstimated"], "the last event of the stream has the usage"
    assert 1 <= output["usage"]["outputTokens"] <= 8


async def test_a_schema_bounds_the_answer(
    harness: GatewayHarness, person: UserClient, url: str, model_id: str
) -> None:
    labels = [{"name": "invoice"}, {"name": "complaint"}]
    config = {"model": model_id, "input": "You have sent me a wrong bill!", "labels": labels}
    output = await run_nodes(harness, person, url, {"id": "sort", "nodeId": "classifier", "config": config})
    assert output["label"] in {"invoice", "complaint"}


@pytest.mark.thorough
async def test_an_agent_works_with_a_tool_until_it_is_stopped(
    harness: GatewayHarness, person: UserClient, url: str, model_id: str
) -> None:
    config = {
        "model": model_id,
        "prompt": "What is the temperature in Oslo? Call the tool temperature.",
        "toolMode": "json",
        "maxIterations": 4,
        "maxTokens": 48,
    }
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": CITIES}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {
        "name": "temperature",
        "description": "Returns the temperature of a city in degrees.",
        "parameters": parameters,
        "target": {"node": {"type": "set", "config": {"values": {"city": "{{ args.city }}", "degrees": -3}}}},
    }
    output = await run_nodes(
        harness,
        person,
        url,
        {"id": "agent", "nodeId": "agent", "config": config},
        {"id": "temperature", "nodeId": "tool", "config": tool},
        tools=("temperature",),
    )
    assert output["stopReason"] in {"finished", "length", "loop", "max-iterations"}
    calls = [step for step in output["steps"] if step["kind"] == "tool"]
    answers = [step for step in output["steps"] if step["kind"] == "model"]
    if not calls:
        pytest.skip("The real model answers without its tool with the arithmetic of this machine")
    assert len(calls) < len(answers) <= 5
    asked = [call for message in output["messages"] for call in message.get("toolCalls", ())]
    told = [message for message in output["messages"] if message["role"] == "tool"]
    assert [call["id"] for call in asked] == [message["toolCallId"] for message in told]
    assert {call["arguments"]["city"] for call in asked} <= set(CITIES)
    assert not output["usage"]["isEstimated"]
