"""Every example of the node reference runs unchanged, and returns the output shown below it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import md5, sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from docs import node_reference
from docs.node_reference import STEP
from engine.agents.agent_steps import AgentStep
from engine.graph import ParsedGraph
from engine.program import WorkflowProgram
from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunStatus
from engine.services import NodeServices, RunControl, StoredObject, ToolCallRequest
from engine.values import decode_json
from engine.workflow_runner import RunStart, run_workflow
from gateway.executions import test_runs
from gateway.executions.execute import ExecuteRequest
from gateway.executions.test_runs import GraphSelection
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import convert
from gateway.workflows import graph_shapes
from journal import definition_snapshot
from models.timestamps import DatabaseClock
from nodes import catalog
from nodes.lazy_models import LazyModels
from nodes.sandbox.code.code_backend import CodeBackend
from nodes.sandbox.code.code_runner import CodeRunner
from tests.node_calls import CALLER, NoEventWaits, NoModels, NoSignalWaits, OpenThrottle, RecordedState
from tests.sample_data import SampleDataSources

if TYPE_CHECKING:
    from engine.node_api import NodeType
    from engine.services import HttpClientService, RunCaller
    from engine.values import Json

pytestmark = pytest.mark.anyio

CATALOG = catalog.load_catalog()
NOW = datetime(2026, 1, 1, tzinfo=UTC)
CITIES = b"city,celsius\nOslo,12.5\nRome,27\n"
MEASURED = {"responseTimeMs"}
"""Fields of outputs that depend on the speed of the machine."""
EXAMPLES = [
    pytest.param(node_type, id=node_type.type)
    for node_type in CATALOG.node_types.values()
    if node_type.runnable
]


def without_measured(output: Json) -> Json:
    """Return an output without the values of measured fields."""
    if not isinstance(output, dict):
        return output
    return {name: None if name in MEASURED else value for name, value in output.items()}


class ExampleJournal:
    """A journal that is read when all is over."""

    def __init__(self) -> None:
        self.spans: dict[str, NodeSpan] = {}

    def record(self, span: NodeSpan) -> None:
        self.spans[span.node_id] = span

    def log(self, line: LogLine) -> None:
        """Leave it."""

    def record_attempt(self, attempt: AttemptSpan) -> None:
        """Leave it."""

    def record_step(self, step: AgentStep) -> None:
        """Leave it."""

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Leave it."""

    def advance(self, share: float) -> None:
        """Leave it."""

    async def commit(self) -> None:
        """Do nothing."""

    def holds_lease(self) -> bool:
        return True


@dataclass
class ExampleAnswer:
    """Answer of an example's server."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class ExampleHttpServer:
    """HTTP server that gives the answer of an example, from which the example's output follows."""

    def __init__(self, output: Mapping[str, Any]) -> None:
        self._output = output

    async def request(self, _method: str, url: str, **_more: object) -> ExampleAnswer:
        body = msgspec.json.encode(self._output["body"])
        return ExampleAnswer(self._output["status"], self._output["headers"], body, url)


class ExampleBucket:
    """A bucket with one object in it, or a folder, which has no entity tags."""

    def __init__(self, *, has_tags: bool = True) -> None:
        self.objects = {"cities.csv": CITIES}
        self._has_tags = has_tags

    async def get(self, key: str, **_limits: object) -> bytes:
        return self.objects[key]

    async def put(self, key: str, content: bytes, **_more: object) -> str:
        self.objects[key] = content
        return self._etag(content)

    async def list(self, prefix: str, **_limits: object) -> Sequence[StoredObject]:
        found = sorted(key for key in self.objects if key.startswith(prefix))
        return [
            StoredObject(key, len(self.objects[key]), self._etag(self.objects[key]), NOW) for key in found
        ]

    def _etag(self, content: bytes) -> str:
        return md5(content, usedforsecurity=False).hexdigest() if self._has_tags else ""


class ExampleBlobs:
    """Blob storage of a single run."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    async def put(
        self,
        caller: RunCaller,  # noqa: ARG002 - here and below, the protocol's parameters
        content: bytes,
        *,
        media_type: str,
        name: str = "",
    ) -> dict[str, Json]:
        digest = sha256(content).hexdigest()
        self._contents[digest] = content
        return {"$blob": {"sha256": digest, "size": len(content), "type": media_type, "name": name}}

    async def get(self, caller: RunCaller, reference: Json, *, max_bytes: int) -> bytes:  # noqa: ARG002
        return self._contents[cast("Any", reference)["$blob"]["sha256"]]


class ExampleMailServer:
    """Mail server that accepts every mail."""

    async def send(self, *_mail: object, **_limits: object) -> None:
        """Leave it."""


class ExampleSubRuns:
    """Sub-workflow service with runs that the test answers."""

    async def start(
        self,
        caller: RunCaller,  # noqa: ARG002 - here and below, the protocol's parameters
        workflow_id: str,  # noqa: ARG002
        trigger_inputs: Json,  # noqa: ARG002
        *,
        node_id: str,  # noqa: ARG002
        iteration: str,  # noqa: ARG002
        awaited: bool,  # noqa: ARG002
    ) -> str:
        return "exec_2"

    async def may_write(self, caller: RunCaller, workflow_id: str) -> bool:
        raise AssertionError((caller, workflow_id))


class ExampleToolServer:
    """Tool server with notes about cities."""

    async def call(self, request: ToolCallRequest) -> Json:
        note = f"{request.arguments['text']} is cold."
        return {"text": f"1 note: {note}", "data": {"notes": [note]}}


class ExampleDataSources(SampleDataSources):
    """The sample databases, a bucket, a folder like it, and a mail server."""

    async def bucket(self, caller: RunCaller, source_id: str) -> ExampleBucket:
        await self.find(caller, source_id)
        return ExampleBucket()

    async def mail_server(self, caller: RunCaller, source_id: str) -> ExampleMailServer:
        await self.find(caller, source_id)
        return ExampleMailServer()

    async def tool_server(self, caller: RunCaller, source_id: str) -> ExampleToolServer:
        await self.find(caller, source_id)
        return ExampleToolServer()

    async def folder(self, _caller: RunCaller) -> ExampleBucket:
        return ExampleBucket(has_tags=False)


@asynccontextmanager
async def lend_services(node_type: NodeType, folder: Path) -> AsyncIterator[NodeServices]:
    """Provide the services that the example of a node type needs."""
    sources, code = ExampleDataSources(folder), CodeRunner(CodeBackend.MONTY, limit=1)
    output = node_type.examples[0].get("output")
    http = cast("HttpClientService", ExampleHttpServer(output if isinstance(output, dict) else {}))
    try:
        yield NodeServices(
            http,
            sources,
            sources,
            ExampleBlobs(),
            code,
            ExampleSubRuns(),
            OpenThrottle(),
            NoEventWaits(),
            NoSignalWaits(),
            RecordedState(),
            models=LazyModels(NoModels, (), ()),
        )
    finally:
        await code.close()
        await sources.connections.close()


def compile_execute(body: Mapping[str, Json]) -> tuple[WorkflowProgram, Json]:
    """Return the program and the trigger of an execute."""
    asked = convert(dict(body), ExecuteRequest)
    assert asked.definition is not None
    problems = ProblemCollector()
    nodes = graph_shapes.stored_nodes(asked.definition.nodes or [], CATALOG, problems)
    connections = graph_shapes.stored_connections(asked.definition.connections or [], problems)
    problems.raise_any()
    piece, inputs = GraphSelection(asked.up_to, asked.pinned or {}), asked.trigger_inputs or {}
    row = SimpleNamespace(**WORKFLOW)
    workflow = definition_snapshot.load_workflow(cast("Any", row), frozenset(), CATALOG)
    accepted = test_runs.plan_partial_run(workflow, nodes, connections, piece, inputs, CATALOG, NOW)
    graph_shapes.require_valid(accepted.workflow.validation)
    definition = msgspec.json.decode(accepted.workflow.definition)
    return WorkflowProgram.compile(
        ParsedGraph.from_stored(definition), CATALOG, CATALOG.implementation
    ), accepted.trigger


WORKFLOW = {
    **dict.fromkeys(("id", "organization_id", "owner_id", "name"), "x"),
    "shard": 0,
    "revision": 1,
    "is_public": False,
    "is_template": False,
    "status": "draft",
    "nodes": [],
    "connections": [],
    "settings": {},
}


@pytest.mark.parametrize("node_type", EXAMPLES)
async def test_an_example_has_the_documented_result(node_type: NodeType, tmp_path: Path) -> None:
    example = node_type.examples[0]
    program, trigger = compile_execute(node_reference.example_execute_body(node_type))
    notes = ExampleJournal()
    start = RunStart(
        CALLER, trigger, DatabaseClock(), deadline=datetime.now(UTC) + timedelta(seconds=60), started_at=NOW
    )
    async with lend_services(node_type, tmp_path) as services:
        ended = await run_workflow(program, start, notes, RunControl(), services)
        if notes.spans[STEP].awaits is not None:
            answer = msgspec.json.encode({"output": example["output"], "port": example["port"]})
            recorded = list(notes.spans.values())
            again = msgspec.structs.replace(start, recorded=recorded, wait_answers={(STEP, ""): answer})
            ended = await run_workflow(program, again, notes, RunControl(), services)
    step = notes.spans[STEP]
    if "error" in example:
        assert step.error is not None
        assert (ended.status, step.error.message) == (RunStatus.FAILED, example["error"])
        return
    assert ended.status in {RunStatus.COMPLETED, RunStatus.WAITING}
    assert without_measured(decode_json(step.output or b"")) == without_measured(example["output"])
    assert step.port in {node_reference.example_port(node_type), None}
