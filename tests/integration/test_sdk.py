"""Python SDK against a running server: runs, streams, pages and errors, by both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from pilotflame_sdk import (
    APIError,
    AsyncClient,
    Client,
    NotFound,
    RunFailed,
    RunTimeout,
    ValidationFailed,
    WorkflowWarning,
)

from sdk import client_generator
from tests import command_runs, databases
from tests.command_runs import command_environment

KEY = "sk-of-the-settings-0123"
CHOICES = [{"port": "yes", "label": "Yes"}, {"port": "no", "label": "No"}]
GREETING: dict[str, Any] = {
    "name": "Greeting",
    "nodes": [
        {"id": "start", "type": "manual"},
        {"id": "greet", "type": "template", "config": {"text": "Hello {{ data.body.name }}"}},
    ],
    "connections": [{"source": "start", "target": "greet"}],
}
WAITING = {
    "name": "Waiting",
    "nodes": [
        {"id": "start", "type": "manual"},
        {"id": "ask", "type": "human-input", "config": {"title": "Go on?", "choices": CHOICES}},
    ],
    "connections": [{"source": "start", "target": "ask"}],
}
FAILING = {
    "name": "Failing",
    "nodes": [
        {"id": "start", "type": "manual"},
        {"id": "ask", "type": "http-request", "config": {"url": "http://127.0.0.1/"}},
    ],
    "connections": [{"source": "start", "target": "ask"}],
}


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    data = asyncio.run(databases.create_data_folder(folder / "data"))
    given = command_environment(data, BOOTSTRAP_API_KEY=KEY, METRICS_PORT="0")
    with command_runs.run_command("dev", "--port", "0", given=given, log=folder / "log") as dev:
        yield dev.says(r"Pilotflame runs on (\S+)")[1]
        assert dev.stop() == 0


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[Client]:
    with Client(server_url, KEY) as client:
        for definition in (GREETING, WAITING, FAILING):
            client.workflows.put(definition)
        yield client


def test_the_generated_methods_and_types_are_up_to_date() -> None:
    outdated = [
        path.name for path, text in client_generator.build_files().items() if path.read_text() != text
    ]
    assert not outdated, "run `python -m sdk.client_generator`"


def test_a_run_gives_its_outputs_and_its_events(client: Client) -> None:
    run = client.run("Greeting", {"name": "Ada"}, tags=["sdk"], metadata={"order": 7})
    assert run.outputs["greet"] == {"text": "Hello Ada"}
    assert (run.status, run.has_ended, run.error) == ("completed", True, None)
    events = list(client.executions.stream(run.id))
    assert {event.name for event in events} >= {"span", "execution"}
    assert events[-1].data["status"] == "completed"
    assert [one["id"] for one in client.executions.iterate(metadata={"order": "7"}, tag="sdk")] == [run.id]
    assert client.executions.get(run.id)["outputs"]["greet"] == {"text": "Hello Ada"}
    assert client.executions.why(run.id)["status"] == "completed"


def test_put_changes_the_workflow_of_that_name(client: Client) -> None:
    workflow_id = client.workflows.put({**GREETING, "name": "Changed", "status": "active"})
    again = client.workflows.put({**GREETING, "name": "Changed", "description": "New", "status": "paused"})
    stored = client.workflows.get(workflow_id)
    assert (again, stored["description"], stored["status"]) == (workflow_id, "New", "paused")
    assert client.workflows.validate(workflow_id)["valid"]


def test_apply_warns_and_a_strict_one_refuses(client: Client) -> None:
    greet = {"id": "greet", "type": "template", "config": {"text": "{{ nodes.gret.y }}"}}
    warned = {**GREETING, "name": "Warned", "nodes": [GREETING["nodes"][0], greet]}
    with pytest.raises(ValidationFailed, match=r"Workflow 'Warned'.*gret"):
        client.workflows.apply(warned, strict=True)
    with pytest.raises(NotFound):
        client.workflows.find("Warned")
    with pytest.warns(WorkflowWarning, match=r"^Warned: greet: .*gret.* \(unresolved-mapping\)") as caught:
        client.workflows.apply(warned)
    assert caught[0].filename == __file__


def test_a_failed_run_names_its_node(client: Client) -> None:
    run = client.start("Failing")
    with pytest.raises(RunFailed) as caught:
        run.result(timeout=60)
    assert (caught.value.status, caught.value.node_id) == ("failed", "ask")
    assert (caught.value.execution_id, run.status) == (run.id, "failed")
    with pytest.raises(RunFailed):
        client.run("Failing", wait=60)


def test_a_run_that_waits_is_timed_out_answered_and_cancelled(client: Client) -> None:
    with pytest.raises(RunTimeout) as caught:
        client.run("Waiting", wait=0.2)
    asked = [
        one for one in client.approvals.list()["inputs"] if one["executionId"] == caught.value.execution_id
    ]
    client.approvals.answer(caught.value.execution_id, node_id=asked[0]["nodeId"], choice="yes")
    assert client.attach(caught.value.execution_id).result(30)["ask"]["choice"] == "yes"
    cancelled = client.start("Waiting")
    cancelled.cancel()
    assert cancelled.wait(30).status == "cancelled"


def test_refusals_have_their_class_and_say_how_to_mend(client: Client) -> None:
    with pytest.raises(NotFound, match="There is no workflow 'Nowhere'"):
        client.run("Nowhere")
    with pytest.raises(NotFound):
        client.workflows.get("wf_nowhere")
    with pytest.raises(ValidationFailed) as caught:
        client.workflows.create(name="")
    assert caught.value.details[0]["path"] == "name"


class LostAnswers(httpx2.HTTPTransport):
    """Connections that lose the first answer to each kind of request, after the server has worked on it."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: set[str] = set()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        if request.method in self.lost:
            return response
        self.lost.add(request.method)
        response.read()
        raise httpx2.ReadError("the answer was lost")


def test_a_lost_answer_starts_no_second_run(server_url: str, client: Client) -> None:
    with httpx2.Client(transport=LostAnswers()) as http:
        losing = Client(server_url, KEY, http=http)
        run = losing.run("Greeting", {"name": "Twice"}, tags=["lost"])
    assert [one["id"] for one in client.executions.iterate(tag="lost")] == [run.id]


def test_large_outputs_are_complete(client: Client) -> None:
    name = "x" * 1_200_000
    assert client.run("Greeting", {"name": name}).outputs["greet"]["text"] == f"Hello {name}"


async def test_the_asynchronous_client_has_the_same_methods(server_url: str, client: Client) -> None:
    del client  # it has made the workflows
    async with AsyncClient(server_url, KEY) as own:
        runs = await asyncio.gather(
            *(own.run("Greeting", {"name": str(n)}, tags=["async"]) for n in range(5))
        )
        assert [run.outputs["greet"]["text"] for run in runs] == [f"Hello {n}" for n in range(5)]
        found: list[Any] = [one["id"] async for one in own.executions.iterate(tag="async")]
        assert {*found} == {run.id for run in runs}
        events = [event async for event in own.executions.stream(runs[0].id)]
        assert events[-1].data["status"] == "completed"
        failing = await own.start("Failing")
        with pytest.raises(RunFailed):
            await failing.result(60)
        with pytest.raises(APIError):
            await own.workflows.get("wf_nowhere")
        assert (await own.workflows.put(GREETING)) == await own.workflows.find("Greeting")
