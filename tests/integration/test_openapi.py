"""OpenAPI document against a running gateway: its examples are accepted, and every answer matches it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest
import uvloop
from pydantic import ValidationError

from gateway import main, routes
from gateway.deployments import trigger
from gateway.executions.long_poll import ExecutionPollHub
from gateway.http import failed_attempts, limits
from gateway.http.operation_docs import EVENT_STREAM
from gateway.http.route import Route
from gateway.http.wire import WireStruct, is_strict_body
from gateway.ingest import hooks
from gateway.openapi import openapi_document
from gateway.settings import GatewaySettings
from gateway.tasks.parked_polls import PollAnswer
from gateway.tasks.task_hub import TaskHub
from gateway.tasks.worker_presence import WorkerDescription
from journal.store import ExecutionKey, RunProgressReport
from journal.tasks.task_polls import TaskPoll
from models.access import ALL_KEY_SCOPES, ApiCaller, KeyScope
from pilotflame import command_error
from tests.api_document import read_document
from tests.integration.deployed_workflows import answer_for_pods
from tests.integration.example_data import create_examples, replace_example_ids
from tests.integration.gateway_harness import (
    FILE,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
    create_gateway,
    run_gateway,
)
from tests.ordinary_run import checksum
from tests.services import PostgresServer
from tests.tools.environments import SCHEMATHESIS

LINES = [pytest.param(line, id=f"{line.method} {line.path}") for line in routes.TABLE]
WARNING = [
    pytest.param(line, id=f"{line.method} {line.path}")
    for line in routes.TABLE
    if openapi_document.may_warn(line)
]
FOR_SOFTWARE = {
    "cache-control",
    "content-length",
    "content-security-policy",
    "content-type",
    "referrer-policy",
    "x-accel-buffering",
    "x-content-type-options",
    "x-request-id",
}
"""Undocumented headers for browsers, proxies and libraries."""
UNDOING = {"workflowsUpdate", "versionsRestore"}
"""Operations that replace the graph that others are about."""
TELLS_WHAT_IS_WRONG = {
    "include-path": "/api/v1/workflows/build",
    "checks": {"negative_data_rejection": {"expected-statuses": [200, 400, 401, 415, 422]}},
}
"""Dry runs, which succeed for invalid bodies too and list their faults."""
TAKES_OTHERS_HEADERS = {
    "include-path": "/api/v1/workflows/events",
    "checks": {"negative_data_rejection": {"expected-statuses": [200, 400, 401, 415, 422]}},
}
"""Senders of events have headers of their own, by which they are known: others are no mistake."""
TELLS_NO_TOKENS = {
    "include-operation-id": "hooksOptions",
    "checks": {"negative_data_rejection": {"enabled": False}},
}
"""Strangers get the same list of methods for each address of a webhook."""
BUSY = pytest.mark.timeout(600)
"""For thousands of requests, which take minutes on a busy machine."""
DOCUMENT_URI = "urn:pilotflame:openapi"
PROGRESS = ExecutionPollHub.wait_for_progress
CLAIM = TaskHub.wait
SAMPLES = 8
"""Parts of the document, of which the ordinary run sends generated requests to two; thorough runs send them to all."""
PATIENCE_SECONDS = 120
"""Time for each answer, which no endless request fits into; ten seconds are too few on a busy machine."""
ENOUGH = 0.7
"""The share of operations that schemathesis has to see succeed."""
LINKED = ("Access", "Data sources", "Deliveries", "Deployments", "Executions", "Tasks", "Workflows")
"""Tags of many operations with objects in common: links between all operations of the document take minutes."""


@pytest.fixture(scope="module")
async def harness(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    async with create_gateway("sqlite", postgres, tmp_path_factory.mktemp("openapi")) as harness:
        yield harness


@pytest.fixture(scope="module")
async def people(harness: GatewayHarness) -> OrganizationUsers:
    return await harness.people()


@dataclass(frozen=True)
class ExampleStage:
    """Objects of the examples, in a folder that each example gets a copy of."""

    folder: Path
    admin: UserClient
    ids: Mapping[str, str]


@pytest.fixture(scope="module")
async def example_stage(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> ExampleStage:
    folder = tmp_path_factory.mktemp("stage")
    async with create_gateway("sqlite", postgres, folder) as harness:
        people = await harness.people()
        return ExampleStage(folder, people.admin, await create_examples(harness, people))


@pytest.fixture(scope="module")
async def reading_stage(
    example_stage: ExampleStage, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    """A gateway on a copy of the stage for all requests that change nothing."""
    async with open_stage(example_stage, tmp_path_factory.mktemp("reading") / "copy") as harness:
        yield harness


@asynccontextmanager
async def open_stage(stage: ExampleStage, folder: Path) -> AsyncIterator[GatewayHarness]:
    """Run a gateway on a copy of the stage in a new folder."""
    shutil.copytree(stage.folder, folder)
    async with run_gateway(f"sqlite:///{folder / FILE}", folder) as harness:
        answer_for_pods(harness)
        yield harness


WORKFLOWS_OF = {
    "/api/v1/workflows/{id}/enqueue": "wf_queue",
    "/api/v1/workflows/{id}/enqueue-batch": "wf_queue",
    "/api/v1/workflows/{id}/email-trigger": "wf_mails",
    "/api/v1/events/{id}/replay": "wf_events",
}
"""Paths of operations on a workflow with a particular trigger."""


# ── the document is served ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/openapi.json", "application/json"),
        ("/docs/", "text/html; charset=utf-8"),
        ("/docs/api/", "text/html; charset=utf-8"),
        ("/favicon.svg", "image/svg+xml"),
        ("/favicon.ico", "image/svg+xml"),
    ],
)
async def test_the_document_needs_no_key_and_is_kept(
    harness: GatewayHarness, path: str, media_type: str
) -> None:
    anybody = await harness.client()
    first = await anybody.get(path)
    assert (first.status_code, first.headers["Content-Type"]) == (200, media_type)
    assert first.headers.get_list("Cache-Control") == ["no-cache"]
    again = await anybody.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    outdated = await anybody.get(path, headers={"If-None-Match": '"another"'})
    assert (outdated.status_code, outdated.content) == (200, first.content)
    assert_refused(await anybody.post(path), 405, "method-not-allowed")


async def test_the_document_is_that_of_the_table_and_holds_no_key(people: OrganizationUsers) -> None:
    served = (await people.admin.api.get("/openapi.json")).text
    assert json.loads(served) == read_document()
    for person in (people.admin, people.owner):
        assert person.key not in served


@pytest.mark.parametrize(
    "url",
    [
        "flows.example.com",
        "/flows",
        "ftp://flows.example.com",
        "https://",
        "https:///flows",
        "https://flows.example.com?a=1",
        "https://flows.example.com/?",
        "https://flows.example.com/#a",
        "https://flows.example.com:port",
        "https://user:password@flows.example.com",
        "https://flows example.com",
        "https://flows.example.com\n",
    ],
)
def test_a_public_url_that_begins_no_urls_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("PILOTFLAME_PUBLIC_URL", url)
    with pytest.raises(ValidationError) as raised:
        GatewaySettings()
    told = command_error.explain_error(raised.value)
    assert told is not None
    assert told.startswith("PILOTFLAME_PUBLIC_URL: write an absolute URL with http or https")


@pytest.mark.parametrize(
    "url", ["", "http://localhost:8000", "https://flows.example.com/below/", "HTTPS://[2001:db8::1]:8443"]
)
def test_a_public_url_is_absolute(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PILOTFLAME_PUBLIC_URL", url)
    assert GatewaySettings().public_url == url


async def test_the_document_names_the_public_url(harness: GatewayHarness) -> None:
    public = await harness.with_settings(public_url="https://flows.example.com/")
    anybody = await public.client()
    assert (await anybody.get("/openapi.json")).json()["servers"] == [{"url": "https://flows.example.com"}]
    assert (await (await harness.client()).get("/openapi.json")).json() == read_document()


# ── accepted examples ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("line", LINES)
async def test_documented_examples_are_accepted_and_answered_as_documented(
    example_stage: ExampleStage, reading_stage: GatewayHarness, tmp_path: Path, line: Route
) -> None:
    if line.method == "GET" and line.handler not in {trigger.start, hooks.receive}:
        await _check_answered(example_stage, reading_stage, line, None)
        await _check_answered(example_stage, reading_stage, line, None, accept=EVENT_STREAM)
        return
    for number, body in enumerate(_example_bodies(line) or [None]):
        async with open_stage(example_stage, tmp_path / str(number)) as harness:
            await _check_answered(example_stage, harness, line, body)


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("line", WARNING)
async def test_answers_warn_of_ignored_fields_as_documented(
    example_stage: ExampleStage, tmp_path: Path, line: Route
) -> None:
    kind = line.body
    assert kind is not None
    assert issubclass(kind, WireStruct)
    given_by_server = (name for name, route in kind.read_only.items() if not route)
    ignored = next(given_by_server) if is_strict_body(kind) else "colour"
    body = {**_example_bodies(line)[0], ignored: "red"}
    async with open_stage(example_stage, tmp_path / "0") as harness:
        shown = await _check_answered(example_stage, harness, line, body)
    assert ignored in str(shown["warnings"])


async def _check_answered(
    example_stage: ExampleStage,
    harness: GatewayHarness,
    line: Route,
    body: Any,  # noqa: ANN401 - any JSON value
    *,
    accept: str = "*/*",
) -> Any:  # noqa: ANN401 - any JSON value
    """Send a request about a copy of the stage, and check its answer; returns the JSON of it."""
    said = read_document()["paths"][line.path][line.method.lower()]
    ids = {**example_stage.ids, "wf_abc123": example_stage.ids[WORKFLOWS_OF.get(line.path, "wf_abc123")]}
    admin = await harness.client(example_stage.admin.key)
    if line.handler is trigger.start:
        # The workflow of the examples is a draft, since drafts may be broken.
        path = f"/api/v1/workflows/{ids['wf_abc123']}/status"
        assert (await admin.put(path, json={"status": "active"})).is_success
    response = await admin.request(
        line.method,
        line.path.format(**replace_example_ids(_examples(said, "path"), ids)),
        params=replace_example_ids(_examples(said, "query"), ids),
        json=replace_example_ids(body, ids),
        headers={"X-Task-Lease": "x9f0", "Accept": accept},
    )
    assert response.status_code // 100 == 2, response.text
    _check_answer(said["responses"][str(response.status_code)], response)
    return response.json() if response.headers.get("Content-Type") == "application/json" else None


def _example_bodies(line: Route) -> list[Any]:
    body = read_document()["paths"][line.path][line.method.lower()].get("requestBody", {})
    return (
        [example["value"] for example in body["content"]["application/json"]["examples"].values()]
        if body
        else []
    )


def _examples(operation: dict[str, Any], place: str) -> dict[str, Any]:
    return {
        parameter["name"]: parameter["example"]
        for parameter in operation["parameters"]
        if parameter["in"] == place and "example" in parameter
    }


def _check_answer(said: dict[str, Any], response: httpx2.Response) -> None:
    """Check that an answer has exactly the documented parts."""
    always = {name.lower() for name, header in said["headers"].items() if header.get("required")}
    sent = set(response.headers)
    assert always <= sent <= {name.lower() for name in said["headers"]} | FOR_SOFTWARE
    if "content" not in said:
        assert response.content == b""
        return
    media_type = response.headers["Content-Type"].partition(";")[0]
    content = said["content"][media_type]
    if media_type == "application/json":
        _compile_validator(json.dumps(content["schema"])).validate(response.json())


def _close_schema(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return schemas that allow no field which they don't name, and refer to `_closed_schemas`."""
    if isinstance(value, list):
        return [_close_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    closed = {key: _close_schema(item) for key, item in value.items()}
    if isinstance(value.get("$ref"), str):
        closed["$ref"] = DOCUMENT_URI + value["$ref"]
    return closed | ({"additionalProperties": False} if isinstance(value.get("properties"), dict) else {})


@cache
def _compile_validator(schema: str) -> jsonschema_rs.Draft202012Validator:
    """Return a validator of a schema of the document, given as JSON, after closing it; one for equal schemas."""
    closed = _close_schema(json.loads(schema))
    return jsonschema_rs.Draft202012Validator(closed, registry=_closed_schemas(), validate_formats=True)


@cache
def _closed_schemas() -> jsonschema_rs.Registry:
    """Return the closed schemas that others refer to; a validator that held them itself would read all of them."""
    return jsonschema_rs.Registry(
        [(DOCUMENT_URI, {"components": _close_schema(read_document()["components"])})]
    )


# ── arbitrary requests ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class ServedDocument:
    """A gateway that listens, and its document with examples that are there."""

    url: str
    key: str
    document: dict[str, Any]


@dataclass
class FuzzReport:
    """Failed checks of schemathesis, and the statuses that each operation answered."""

    failures: list[str]
    statuses: Mapping[str, list[int]]
    linked: list[str]
    """Operations that have succeeded with a value of an earlier answer."""

    @property
    def share_of_success(self) -> float:
        succeeded = [
            found for found in self.statuses.values() if any(200 <= status < 300 for status in found)
        ]
        return len(succeeded) / len(self.statuses)


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the limit of wrong keys per address, and end waits for runs and tasks at once."""
    monkeypatch.setattr(failed_attempts, "MAX_FAILURES", 1_000_000)
    monkeypatch.setattr(ExecutionPollHub, "wait_for_progress", poll_at_once)
    monkeypatch.setattr(TaskHub, "wait", claim_at_once)
    monkeypatch.setattr(limits, "TRIGGER_SYNC_SECONDS", 0)
    monkeypatch.setattr(limits, "TRIGGER_ASYNC_SECONDS", 0)


async def poll_at_once(
    waiting: ExecutionPollHub,
    key: ExecutionKey,
    caller: ApiCaller,
    wait_seconds: float,  # noqa: ARG001 - the method's signature
) -> RunProgressReport | None:
    return await PROGRESS(waiting, key, caller, 0)


async def claim_at_once(
    hub: TaskHub,
    poll: TaskPoll,
    worker: WorkerDescription,
    *_more: object,
) -> PollAnswer:
    return await CLAIM(hub, poll, worker, 0)


@BUSY
@pytest.mark.toolchain
@pytest.mark.usefixtures("unlimited")
def test_missing_oversized_and_mistyped_values_get_documented_answers(
    postgres: PostgresServer, tmp_path: Path, *, is_thorough: bool
) -> None:
    document = sample_document(None if is_thorough else 0)
    with serve_gateway("sqlite", postgres, tmp_path, document) as served:
        report = fuzz_operation(served, examples_of_an_operation=2, phases={"coverage"})
    assert report.failures == []
    assert len(report.statuses) == count_operations(document)


@BUSY
@pytest.mark.toolchain
@pytest.mark.usefixtures("unlimited")
def test_generated_requests_get_documented_answers(
    postgres: PostgresServer, tmp_path: Path, *, is_thorough: bool
) -> None:
    document = sample_document(None if is_thorough else 1)
    with serve_gateway("postgresql", postgres, tmp_path, document) as served:
        report = fuzz_operation(served, examples_of_an_operation=1, phases={"fuzzing"})
    assert report.failures == []
    assert len(report.statuses) == count_operations(document)
    assert report.share_of_success >= ENOUGH


@BUSY
@pytest.mark.toolchain
@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("tag", LINKED)
def test_requests_with_values_of_earlier_answers_get_documented_answers(
    postgres: PostgresServer, tmp_path: Path, tag: str, *, is_thorough: bool
) -> None:
    document = read_document()
    tagged = {
        path: methods
        for path, methods in document["paths"].items()
        if any(tag in operation["tags"] for operation in methods.values())
    }
    with serve_gateway("sqlite", postgres, tmp_path, {**document, "paths": tagged}) as served:
        limited = replace(served, key=create_key(served, ALL_KEY_SCOPES - {KeyScope.KEYS_WRITE}))
        examples = 100 if is_thorough else 20
        report = fuzz_operation(limited, examples_of_an_operation=examples, phases={"stateful"})
        # It has found no way to take its own access away, with which all answers would be the same.
        whoami = httpx2.get(f"{served.url}/api/v1/auth/whoami", headers={"X-API-Key": limited.key})
    assert report.failures == []
    assert report.linked
    assert whoami.status_code == 200


def create_key(served: ServedDocument, scopes: Collection[KeyScope]) -> str:
    answer = httpx2.post(
        f"{served.url}/api/v1/auth/keys",
        headers={"X-API-Key": served.key},
        json={"name": "limited", "scopes": [*scopes]},
    )
    key: str = answer.json()["key"]
    return key


def test_samples_of_the_document_have_each_operation_once() -> None:
    samples = [sample_document(number) for number in range(SAMPLES)]
    operations = count_operations(sample_document(None))
    assert sum(map(count_operations, samples)) == operations == len(routes.TABLE)
    assert all(10 < count_operations(sample) < 2 * operations / SAMPLES for sample in samples)


def sample_document(number: int | None) -> dict[str, Any]:
    """Return the document with those of its paths that a checksum puts into a sample; with all for None."""
    document = read_document()
    paths = document["paths"]
    chosen = [path for path in paths if number is None or checksum(path) % SAMPLES == number]
    return {**document, "paths": {path: paths[path] for path in chosen}}


def count_operations(document: Mapping[str, Any]) -> int:
    return sum(len(methods) for methods in document["paths"].values())


@contextmanager
def serve_gateway(
    kind: str, postgres: PostgresServer, folder: Path, document: dict[str, Any]
) -> Iterator[ServedDocument]:
    """Run a gateway in a thread, while schemathesis waits for its answers in this one."""
    servers: list[main.GatewayServer] = []
    served: list[ServedDocument] = []

    async def serve(listener: socket.socket) -> None:
        async with create_gateway(kind, postgres, folder) as harness:
            people = await harness.people()
            host, port = listener.getsockname()
            ids = await create_examples(harness, people)
            placed = await place_examples(harness, people, ids, document)
            served.append(ServedDocument(f"http://{host}:{port}", people.admin.key, placed))
            app = main.create_app(lambda: nullcontext(harness.gateway))
            servers.append(main.build_server(app, harness.gateway.settings))
            await servers[0].serve(sockets=[listener])

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        serving = threads.submit(lambda: uvloop.run(serve(listener)))
        while not (servers and servers[0].started):
            if serving.done():
                serving.result()
            time.sleep(0.01)  # the server has no event for it
        try:
            yield served[0]
        finally:
            servers[0].should_exit = True
            serving.result()


async def place_examples(
    harness: GatewayHarness, people: OrganizationUsers, ids: Mapping[str, str], documented: dict[str, Any]
) -> dict[str, Any]:
    """Return a document with examples of existing objects; each destructive example has an object of its
    own.
    """
    document = replace_example_ids(documented, ids)
    for path, methods in documented["paths"].items():
        for method, operation in methods.items():
            if method == "delete" or operation["operationId"] in UNDOING:
                document["paths"][path][method] = replace_example_ids(
                    operation, await create_examples(harness, people)
                )
            for response in document["paths"][path][method]["responses"].values():
                for content in response.get("content", {}).values():
                    if openapi_document.ITEM_SCHEMA in content:
                        # OpenAPI 3.1 has one schema for the stream; schemathesis checks each event by it.
                        content["schema"] = content.pop(openapi_document.ITEM_SCHEMA)
            for parameter in document["paths"][path][method]["parameters"]:
                if parameter["in"] == "path":
                    # A request for an unknown object would get 404, whatever else is wrong with it.
                    parameter["schema"] = {"enum": [parameter["example"]]}
    return document


def fuzz_operation(
    served: ServedDocument, *, examples_of_an_operation: int, phases: Collection[str]
) -> FuzzReport:
    """Let schemathesis generate requests, the same each time, in a process of its own."""
    config = {
        "base-url": served.url,
        "request-timeout": PATIENCE_SECONDS,
        "headers": {"X-API-Key": served.key},
        "seed": 1,
        "generation": {
            "max-examples": examples_of_an_operation,
            "deterministic": True,
            "database": "none",
        },
        "phases": {
            "examples": {"enabled": False},
            "coverage": {
                "enabled": "coverage" in phases,
                "extra-data-sources": {"responses": False},
                "unexpected-methods": ["patch"],
                "generation": {"mode": "negative", "deterministic": True},
            },
            "fuzzing": {"enabled": "fuzzing" in phases, "extra-data-sources": {"responses": False}},
            "stateful": {"enabled": "stateful" in phases},
        },
        # Bodies must obey rules that no schema can express; the examples show that valid bodies are accepted.
        "checks": {"positive_data_acceptance": {"enabled": False}},
        "operations": [TELLS_WHAT_IS_WRONG, TAKES_OTHERS_HEADERS, TELLS_NO_TOKENS],
    }
    done = subprocess.run(
        [SCHEMATHESIS.python, SCHEMATHESIS.sources / "send.py"],
        env=SCHEMATHESIS.environment(),
        input=json.dumps({"document": served.document, "config": config}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return FuzzReport(report["failures"], report["statuses"], report["linked"])
