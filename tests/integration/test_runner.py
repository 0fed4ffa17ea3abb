"""Pods of a deployed workflow, each a process of its own, and a real gateway that they reach over a socket alone."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.model_prices import ModelPrice
from engine.node_api import AnswerSource
from engine.replay_plan import ResultUse
from engine.values import Json
from execution import child_runs
from execution.pod_api import PREFIX, RUNNER_HEADER, WorkPollResponse
from gateway import main as gateways
from gateway import state
from gateway.executions.agent_step_rows import StepFilter
from gateway.executions.live_answers import AnswerReader, TokenShape
from gateway.http import failed_attempts
from gateway.pods import journal as pod_journal
from gateway.pods import node_services, routes
from gateway.pods import poll_hub as desks
from gateway.settings import GatewaySettings
from gateway.state import GatewayState
from gateway.tasks.worker_presence import WorkerDescription
from journal import log_levels, run_copies
from journal.blobs import large_values
from journal.blobs.blob_storage import BlobOwner
from journal.blobs.large_values import EncodedTrigger
from journal.run_copies import ReplayCopy
from journal.store import ClaimedRun, ClaimQuery, EmittedEvent, ExecutionKey
from journal.tasks.task_items import Completion, WorkerReport
from journal.tasks.task_moves import ReportStatus
from journal.tasks.task_polls import TaskPoll
from journal.waits import node_answers, signals
from journal.waits.signals import NewSignal
from messages.deployer_messages import DeployerMessage, ReconcileRequest
from messages.local_broker import LocalBroker
from models import data_source, deployment_token, ids, signing_secrets, tool_server
from models.ai_model import AiModel
from models.data_source import DataSource
from models.deployment import Deployment
from models.deployment_token import TokenBearer
from models.errors import DatabaseUnavailable
from models.pod_identity import PodProcess, lease_owner
from models.signing_secrets import SigningSecret
from models.timestamps import to_microseconds
from models.tool_server import AcceptedTool, ListedTools, ToolEffect
from nodes.ai.model_connection import ModelConnection
from nodes.mcp.tool_definitions import read_definition
from runner import gateway_client
from runner import main as pod_services
from runner.remote_store import RemoteRunStore
from runner.settings import RunnerSettings
from runner.work_poll import REFUSED_SECONDS, GatewayWorkPoll
from telemetry.tracing import TraceContext, encode_origin
from tests import command_runs
from tests.custom_types import custom_type
from tests.fakes.mcp_server import KEY as MCP_KEY
from tests.fakes.mcp_server import build_tool, serve_tools
from tests.fakes.model_server import ModelFault, ScriptedAnswer, serve_models
from tests.http_receiver import HttpReceiver, run_receiver
from tests.integration.gateway_harness import SECRET
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    lease_of,
)
from tests.integration.test_child_runs import create_runnable
from tests.integration.test_model_kills import build_agent, build_caller
from tests.otlp_receiver import run_otlp_receiver
from tests.preloads import ShiftedClock
from tests.services import reserve_port

PATIENCE_SECONDS = 60.0
LEASE_SECONDS = 1.5
POD = PodProcess("pod", datetime(2025, 1, 1, tzinfo=UTC))
BOTH = ["on_sqlite", "on_postgres"]
ON_SQLITE = pytest.mark.parametrize("migrated_database", ["on_sqlite"], indirect=True)
ON_POSTGRES = pytest.mark.parametrize("migrated_database", ["on_postgres"], indirect=True)
"""For tests that don't depend on the kind of database."""


@pytest.fixture(scope="module", params=BOTH)
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


class PodTestGatewayServer(gateways.GatewayServer):
    """A gateway's, in the process of the tests: signals are theirs."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class InterruptibleGateway:
    """A gateway that can be away for a while."""

    state: GatewayState
    port = 0

    def __init__(self, run_database: RunDatabase, folder: Path) -> None:
        self._run_database = run_database
        self._settings = GatewaySettings(
            data_dir=folder,
            database_url=run_database.url.render_as_string(hide_password=False),
            secret_key=SecretStr(SECRET),
            public_url="https://flows.example",
        )
        self._running = AsyncExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, again at the same address."""
        parts = state.assemble_state(
            self._settings,
            self._run_database.database,
            self._run_database.store,
            LocalBroker(channel="gateway"),
        )
        self.state = await self._running.enter_async_context(parts)
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        app = gateways.create_app(lambda: nullcontext(self.state))
        server = PodTestGatewayServer(gateways.build_server(app, self._settings).config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))

        async def end() -> None:
            server.should_exit = True
            await serving

        self._running.push_async_callback(end)
        await wait_until(lambda: server.started)

    async def stop(self) -> None:
        """Answer pending requests, and close."""
        await self._running.aclose()


@pytest.fixture
async def gateway(run_database: RunDatabase, tmp_path: Path) -> AsyncIterator[InterruptibleGateway]:
    gateway = InterruptibleGateway(run_database, tmp_path / "gateway")
    await gateway.start()
    yield gateway
    await gateway.stop()


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - servers and processes have no event for it
            await asyncio.sleep(0.02)


async def wait_until_async(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():  # noqa: ASYNC110 - rows send no events
            await asyncio.sleep(0.05)  # most conditions sweep the database, which takes milliseconds


# ── deployed workflows ──────────────────────────────────────────────────────────────────────────────────────


def chain_definition(*nodes: Mapping[str, Any]) -> str:
    """Return a definition in which nodes follow on one another, the first on a trigger."""
    whole = [{"id": "start", "type": "manual", "config": {}}, *nodes]
    shown = [{"label": node["id"], "position": {"x": 0, "y": 0}, **node} for node in whole]
    edges = [
        {"id": f"edge-{index}", "source": whole[index]["id"], "target": whole[index + 1]["id"]}
        | {"sourcePort": "output", "targetPort": "input"}
        for index in range(len(whole) - 1)
    ]
    return json.dumps({"nodes": shown, "connections": edges, "settings": {}})


def call(receiver: HttpReceiver, name: str = "call") -> dict[str, Any]:
    return {"id": name, "type": "http-request", "config": {"method": "POST", "url": receiver.url(f"/{name}")}}


RESIZE_NODE = {"type": "acme/resize", "version": "1.2.0", "config": {"image": "a.png"}}
GREET = {"id": "greet", "type": "set", "config": {"values": {"greeting": "Hello, {{ data.body.name }}"}}}
SIMPLE = chain_definition(GREET)


@dataclass
class DeployedPods:
    """A deployed workflow and its pods."""

    run_database: RunDatabase
    gateway: InterruptibleGateway
    owned_workflow: OwnedWorkflow
    token: str
    folder: Path
    processes: ExitStack = field(default_factory=ExitStack)
    count: int = 0

    async def accept(self, definition: str, **changes: Any) -> ExecutionKey:  # noqa: ANN401 - any field
        """Accept a run for the pods."""
        key = await self.run_database.accept(self.owned_workflow, definition=definition, **changes)
        await self.run_database.query(
            "UPDATE execution SET target = :target WHERE id = :id",
            target=self.owned_workflow.workflow_id,
            id=key.execution_id,
        )
        return key

    def start(
        self,
        *,
        lease_seconds: float = LEASE_SECONDS,
        folder: Path | None = None,
        anew: bool = False,
        preload: Mapping[str, str] | None = None,
        **variables: str,
    ) -> PodProcessHarness:
        self.count += 1
        port = reserve_port()
        usual = {
            "RUNNER_GATEWAY_URL": self.gateway.url,
            "RUNNER_TOKEN": self.token,
            "RUNNER_WORKFLOW_ID": self.owned_workflow.workflow_id,
            "RUNNER_POD": f"pod-{self.count}",
            "RUNNER_PORT": str(port),
            "LEASE_SECONDS": str(lease_seconds),
            "OUTBOUND_ALLOWED_NETWORKS": "127.0.0.1/32",
        }
        given = command_runs.command_environment(self.folder, **{**usual, **variables})
        started = self.processes.enter_context(
            command_runs.run_command(
                "runner",
                given={**given, **(preload or {})},
                log=self.folder / f"pod-{self.count}.log",
                folder=folder,
                anew=anew,
            )
        )
        return PodProcessHarness(started, f"http://127.0.0.1:{port}")

    async def status(self, key: ExecutionKey) -> str:
        status: str = (await self.run_database.row(key.execution_id))["status"]
        return status

    async def reaches(self, key: ExecutionKey, status: str) -> None:
        await wait_until_async(lambda: self._has(key, status))

    async def _has(self, key: ExecutionKey, status: str) -> bool:
        await self.run_database.store.sweep(100)
        return await self.status(key) == status

    async def has_swept(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, while sweeping like workers."""

        async def holds() -> bool:
            await self.run_database.store.sweep(100)
            return condition()

        await wait_until_async(holds)

    async def outputs(self, key: ExecutionKey) -> dict[str, Any]:
        rows = await self.run_database.query(
            "SELECT node_id, output FROM span WHERE execution_id = :id", id=key.execution_id
        )
        return {row["node_id"]: json.loads(row["output"]) for row in rows if row["output"]}


@dataclass
class PodProcessHarness:
    """A process of its own."""

    started: command_runs.RunningCommand
    url: str

    async def ready(self) -> PodProcessHarness:
        await wait_until_async(lambda: self.answers("/readyz", 200))
        return self

    async def answers(self, path: str, status: int, word: str = "") -> bool:
        async with httpx2.AsyncClient(base_url=self.url, verify=False, timeout=60) as client:
            try:
                response = await client.get(path)
            except httpx2.TransportError:
                return False
        return response.status_code == status and word in response.text

    async def trigger(self, key: str) -> httpx2.Response:
        async with httpx2.AsyncClient(base_url=self.url, verify=False, timeout=60) as client:
            return await client.post("/trigger", headers={"Authorization": f"Bearer {key}"})


async def deploy(run_database: RunDatabase, owned_workflow: OwnedWorkflow, definition: str = SIMPLE) -> str:
    """Make a deployment, and return its token."""
    # A run carries its definition.
    key = await run_database.accept(owned_workflow, definition=definition)
    await run_database.query("DELETE FROM execution WHERE id = :id", id=key.execution_id)
    now, token_id = datetime.now(UTC), deployment_token.new_token_id()
    bearer = TokenBearer(
        owned_workflow.workflow_id, owned_workflow.organization.id, owned_workflow.organization.shard
    )
    deployment = Deployment(
        workflow_id=owned_workflow.workflow_id,
        organization_id=owned_workflow.organization.id,
        shard=owned_workflow.organization.shard,
        replicas=1,
        definition_hash=sha256(definition.encode()).hexdigest(),
        version=1,
        created_at=now,
        updated_at=now,
    )

    async def work(connection: AsyncConnection) -> str:
        await connection.execute(insert(Deployment).values(**deployment.model_dump()))
        return await deployment_token.ensure_token(
            connection, bearer, secret=SECRET.encode(), token_id=token_id, now=now
        )

    return await run_database.database.transaction(work)


@pytest.fixture
async def pods(
    run_database: RunDatabase, gateway: InterruptibleGateway, tmp_path: Path
) -> AsyncIterator[DeployedPods]:
    owned_workflow = await run_database.workflow()
    pods = DeployedPods(
        run_database, gateway, owned_workflow, await deploy(run_database, owned_workflow), tmp_path
    )
    with pods.processes:
        yield pods


@pytest.fixture
async def receiver() -> AsyncIterator[HttpReceiver]:
    async with run_receiver() as receiver:
        yield receiver


async def create_bearer_source(pods: DeployedPods) -> str:
    """Create a data source of the runs' owner, and return its id."""
    return await create_source(pods, "http-bearer", {}, {"token": "a secret"})


async def create_model(pods: DeployedPods, base_url: str = "https://api.example.com/v1") -> str:
    """Create a language model of the runs' owner with its provider, and return its id."""
    source_id = await create_source(pods, "ai-provider", {"baseUrl": base_url}, {"key": "a key"})
    model_id, now, organization = ids.new_id("model"), datetime.now(UTC), pods.owned_workflow.organization
    model = AiModel(
        id=model_id,
        organization_id=organization.id,
        shard=organization.shard,
        owner_id=pods.owned_workflow.user_id,
        name="Small",
        type="third-party",
        provider="openai-compatible",
        vendor_model_id="gpt-5-mini",
        data_source_id=source_id,
        price={"input": "0.25", "output": "2"},
        created_at=now,
        updated_at=now,
    )

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(insert(AiModel).values(**model.model_dump()))

    await pods.run_database.database.transaction(work)
    return model_id


async def create_source(
    pods: DeployedPods,
    kind: str,
    settings: dict[str, Any],
    secrets: dict[str, object],
    tools: dict[str, Any] | None = None,
) -> str:
    """Create a data source of the runs' owner, and return its id."""
    source_id, now, organization = ids.new_id("ds"), datetime.now(UTC), pods.owned_workflow.organization
    encrypted = data_source.encrypt_secrets(
        pods.gateway.state.vault,
        secrets,
        organization_id=organization.id,
        source_id=source_id,
    )
    source = DataSource(
        id=source_id,
        organization_id=organization.id,
        shard=organization.shard,
        owner_id=pods.owned_workflow.user_id,
        name=f"A source of the type {kind}",
        type=kind,
        settings=settings,
        secret_names=sorted(secrets),
        encrypted=encrypted.content,
        secret_id=encrypted.secret_id,
        secrets_set_at=now,
        tools=tools,
        created_at=now,
        updated_at=now,
    )

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(insert(DataSource).values(**source.model_dump()))

    await pods.run_database.database.transaction(work)
    return source_id


async def create_signing_secret(pods: DeployedPods) -> str:
    """Create the signing secret of the runs' organization, and return it."""
    secret, secret_id, organization = (
        signing_secrets.new_secret(),
        ids.new_id("sig"),
        pods.owned_workflow.organization,
    )
    encrypted = signing_secrets.encrypt_secret(
        pods.gateway.state.vault, secret, organization_id=organization.id, object_id=secret_id
    )
    row = SigningSecret(
        id=secret_id,
        organization_id=organization.id,
        shard=organization.shard,
        encrypted=encrypted.content,
        secret_id=encrypted.secret_id,
        hint=signing_secrets.visible_suffix(secret),
        created_at=datetime.now(UTC),
    )

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(insert(SigningSecret).values(**row.model_dump()))

    await pods.run_database.database.transaction(work)
    return secret


async def stop_during_call(pod: PodProcessHarness, receiver: HttpReceiver) -> int:
    """Tell a pod to stop, let it continue once it knows, and return its exit code."""
    await wait_until(lambda: len(receiver.received) == 1)
    pod.started.process.terminate()
    await wait_until_async(lambda: pod.answers("/readyz", 503, "draining"))
    receiver.may_answer.set()
    return await asyncio.to_thread(pod.started.ends)


# ── pods ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_pod_runs_only_executions_accepted_for_it(pods: DeployedPods) -> None:
    pod = await pods.start(anew=True).ready()
    shared = await pods.run_database.accept(pods.owned_workflow, definition=SIMPLE)
    mine = await pods.accept(SIMPLE, trigger='{"body":{"name":"Ada"}}')
    await pods.reaches(mine, "completed")

    assert (await pods.outputs(mine))["greet"]["greeting"] == "Hello, Ada"
    assert await pods.status(shared) == "pending"
    assert await pod.answers("/healthz", 200, "ok")

    async with pods.run_database.database.read() as connection:
        (wakeup_key,) = await deployment_token.wakeup_keys(connection, pods.owned_workflow.workflow_id)
    assert (await pod.trigger(wakeup_key)).status_code == 202
    assert (await pod.trigger(pods.token)).status_code == 401
    assert (await pod.trigger("x")).status_code == 401

    process = psutil.Process(pod.started.process.pid)
    memory = sum(one.memory_full_info().pss for one in (process, *process.children(recursive=True)))
    assert memory < 90_000_000


@ON_POSTGRES
async def test_a_pod_with_a_clock_a_day_ahead_that_is_set_back_runs_normally(
    pods: DeployedPods, receiver: HttpReceiver, shifted_clock: Path, tmp_path: Path
) -> None:
    clock = ShiftedClock(shifted_clock, tmp_path / "clock")
    clock.set(86_400)
    receiver.may_answer.clear()
    await pods.start(anew=True, preload=clock.environment).ready()
    pause_seconds = 1.2
    pause = {"id": "pause", "type": "wait", "config": {"seconds": pause_seconds}}
    key = await pods.accept(chain_definition(call(receiver), pause, GREET))
    await wait_until(lambda: len(receiver.received) == 1)
    clock.set(-86_400)
    answered_at = time.monotonic()
    receiver.may_answer.set()
    await pods.reaches(key, "completed")
    assert time.monotonic() - answered_at >= pause_seconds
    (span,) = await pods.run_database.query("SELECT started_at, ended_at FROM span WHERE node_id = 'pause'")
    # A pod learns its offset from the database's clock by answers: a later one may move the end a little.
    assert 1_100_000 <= span["ended_at"] - span["started_at"] < PATIENCE_SECONDS * 1_000_000
    assert abs(span["ended_at"] - to_microseconds(datetime.now(UTC))) < PATIENCE_SECONDS * 1_000_000


async def test_a_run_goes_on_in_another_pod_when_its_own_is_killed(
    pods: DeployedPods, receiver: HttpReceiver
) -> None:
    receiver.may_answer.clear()
    first = await pods.start().ready()
    key = await pods.accept(chain_definition(GREET, call(receiver), {**GREET, "id": "last"}))
    await wait_until(lambda: len(receiver.received) == 1)
    greeted = await pods.outputs(key)
    first.started.kill()
    pods.start()
    await pods.has_swept(lambda: len(receiver.received) == 2)
    receiver.may_answer.set()
    await pods.reaches(key, "completed")

    assert "greet" in greeted
    assert len({one.headers["idempotency-key"] for one in receiver.received}) == 1
    assert receiver.received[0].body == receiver.received[1].body


async def test_a_replay_reuses_results_in_a_pod(pods: DeployedPods, receiver: HttpReceiver) -> None:
    await pods.start(lease_seconds=PATIENCE_SECONDS).ready()
    definition = chain_definition(GREET, call(receiver), {**GREET, "id": "last"})
    first = await pods.accept(definition)
    await pods.reaches(first, "completed")
    await pods.run_database.query(
        "UPDATE execution SET assigned_deployment_id = workflow_id WHERE id = :id", id=first.execution_id
    )
    new_id = ids.new_id("exec")
    replay = ReplayCopy(
        definition_hash=sha256(definition.encode()).hexdigest(),
        total_nodes=4,
        timeout_seconds=60,
        config=None,
        trigger=None,
        concurrency_key=None,
        concurrency_limit=None,
        completion_action=None,
        spans={ResultUse.SETTLED: [("start", "")], ResultUse.UNCONFIRMED: [("call", "")]},
    )

    async def insert_replay(connection: AsyncConnection) -> None:
        owner = pods.owned_workflow.user_id
        await run_copies.insert_replay(connection, first, new_id, owner, replay)

    await pods.run_database.database.transaction(insert_replay)
    await pods.reaches(ExecutionKey(new_id, first.shard), "completed")
    rows = await pods.run_database.query(
        "SELECT node_id, status, reused_from FROM span WHERE execution_id = :id", id=new_id
    )
    assert {(row["node_id"], row["status"], row["reused_from"]) for row in rows} == {
        ("start", "completed", first.execution_id),
        ("greet", "completed", None),
        ("call", "completed", first.execution_id),
        ("last", "completed", None),
    }
    assert len(receiver.received) == 1


@ON_SQLITE
async def test_a_started_run_of_unknown_end_is_not_started_again_by_a_replay_in_a_pod(
    pods: DeployedPods,
) -> None:
    child_id = (await create_runnable(pods.run_database, pods.owned_workflow, is_public=True)).workflow_id
    starts = {
        "id": "sub",
        "type": "sub-workflow",
        "config": {"workflowId": child_id, "wait": False, "inputs": {}},
    }
    # The trigger of a webhook, whose text is that of an outsider for the started run too.
    definition = chain_definition(starts).replace('"manual"', '"webhook"')
    first = await pods.accept(definition)
    pod = await pods.start(lease_seconds=PATIENCE_SECONDS).ready()
    await pods.reaches(first, "completed")
    started = "SELECT id FROM execution WHERE workflow_id = :id"
    (child,) = await pods.run_database.query(started, id=child_id)
    assert (await pods.run_database.row(child["id"]))["is_tainted"]
    # As if the pod had been lost before it has recorded the end of the node.
    await pods.run_database.query(
        "UPDATE span SET status = 'running', ended_at = NULL, output = NULL, key_id = NULL"
        " WHERE execution_id = :id AND node_id = 'sub'",
        id=first.execution_id,
    )
    await pods.run_database.query(
        "UPDATE execution SET assigned_deployment_id = workflow_id, status = 'failed' WHERE id = :id",
        id=first.execution_id,
    )
    new_id = ids.new_id("exec")
    replay = ReplayCopy(
        definition_hash=sha256(definition.encode()).hexdigest(),
        total_nodes=2,
        timeout_seconds=60,
        config=None,
        trigger=None,
        concurrency_key=None,
        concurrency_limit=None,
        completion_action=None,
        spans={ResultUse.SETTLED: [("start", "")], ResultUse.IN_FLIGHT: [("sub", "")]},
    )

    async def insert_replay(connection: AsyncConnection) -> None:
        await run_copies.insert_replay(connection, first, new_id, pods.owned_workflow.user_id, replay)

    await pods.run_database.database.transaction(insert_replay)
    await pods.reaches(ExecutionKey(new_id, first.shard), "completed")
    assert await pods.run_database.query(started, id=child_id) == [child], pod.started.log()
    assert (await pods.outputs(ExecutionKey(new_id, first.shard)))["sub"] == {"executionId": child["id"]}


@ON_POSTGRES
async def test_a_pod_puts_a_suspect_isolated(pods: DeployedPods) -> None:
    suspect = await pods.accept(SIMPLE)
    await pods.run_database.query("UPDATE execution SET attempt = 2, is_fresh = false")
    other = await pods.accept(SIMPLE)
    pod = await pods.start().ready()
    await pods.reaches(suspect, "completed")
    await pods.reaches(other, "completed")
    await asyncio.to_thread(pod.started.says, "suspect on trial")


async def test_a_run_outlasts_a_restart_of_the_gateway(pods: DeployedPods, receiver: HttpReceiver) -> None:
    receiver.may_answer.clear()
    await pods.start(lease_seconds=PATIENCE_SECONDS, RUNNER_ORPHAN_SECONDS="60").ready()
    key = await pods.accept(chain_definition(call(receiver), GREET))
    await wait_until(lambda: len(receiver.received) == 1)
    await pods.gateway.stop()
    receiver.may_answer.set()
    await pods.gateway.start()
    await pods.reaches(key, "completed")
    later = await pods.accept(SIMPLE)
    await pods.reaches(later, "completed")

    assert len(receiver.received) == 1
    assert (await pods.run_database.row(key.execution_id))["token"] == 1


@ON_SQLITE
async def test_a_pod_that_drains_says_so_and_lets_its_run_end(
    pods: DeployedPods, receiver: HttpReceiver
) -> None:
    receiver.may_answer.clear()
    pod = await pods.start().ready()
    key = await pods.accept(chain_definition(call(receiver), GREET))
    await wait_until(lambda: len(receiver.received) == 1)
    pod.started.process.terminate()
    await wait_until_async(lambda: pod.answers("/readyz", 503, "draining"))
    async with pods.run_database.database.read() as connection:
        (wakeup_key,) = await deployment_token.wakeup_keys(connection, pods.owned_workflow.workflow_id)
    refused = await pod.trigger(wakeup_key)
    untaken = await pods.accept(SIMPLE)
    receiver.may_answer.set()

    assert (refused.status_code, refused.json()["status"]) == (503, "draining")
    assert await asyncio.to_thread(pod.started.ends) == 0
    assert await pods.status(key) == "completed"
    assert await pods.status(untaken) == "pending"


@ON_SQLITE
async def test_a_pod_hands_off_long_runs_and_repeats_no_call(
    pods: DeployedPods, receiver: HttpReceiver
) -> None:
    count = 25
    receiver.may_answer.clear()
    pod = await pods.start(RUNNER_DRAIN_SECONDS="0").ready()
    key = await pods.accept(chain_definition(*(call(receiver, f"call-{index}") for index in range(count))))
    exit_code = await stop_during_call(pod, receiver)
    handed_over = await pods.run_database.row(key.execution_id)
    pods.start()
    await pods.reaches(key, "completed")

    assert exit_code == 0
    assert (handed_over["status"], handed_over["attempt"], handed_over["lease_owner"]) == ("pending", 0, None)
    assert [one.path for one in receiver.received] == [f"/call-{index}" for index in range(count)]


async def test_nodes_in_a_pod_have_the_services_of_a_worker(
    pods: DeployedPods, receiver: HttpReceiver
) -> None:
    large = "x" * 5_000
    send = call(receiver)
    send["config"] |= {
        "dataSource": await create_bearer_source(pods),
        "body": {"text": "{{ nodes.large.text }}"},
    }
    throttle = {"id": "slow", "type": "throttle", "config": {"limit": 100, "perSeconds": 1}}
    definition = chain_definition(
        {"id": "large", "type": "set", "config": {"values": {"text": "{{ data.body.text }}"}}},
        throttle,
        {"id": "ask", "type": "human-input", "config": {"title": "May it go out?"}},
        {"id": "paid", "type": "wait-for-event", "config": {"event_type": "order.*", "lookBackSeconds": 60}},
        {"id": "shipped", "type": "wait-for-signal", "config": {"name": "shipped"}},
        {"id": "tell", "type": "publish", "config": {"key": "parcel", "value": "{{ data.payload }}"}},
        {
            "id": "thank",
            "type": "reply-to-signal",
            "config": {"receivedBy": "shipped", "value": "{{ data.by }}"},
        },
        send,
    )
    paid = EmittedEvent("event_1", "order.paid", "shop", '{"event_type":"order.paid"}')
    await pods.run_database.store.ingest([pods.owned_workflow.inbound(workflow_id=None, event=paid)])
    first = await pods.start(MAX_ROW_OUTPUT_BYTES="1024").ready()
    key = await pods.accept(definition, trigger=json.dumps({"body": {"text": large}}))
    await pods.reaches(key, "waiting")
    sent_signal = NewSignal("signal_1", "shipped", b'"P-12"', pods.owned_workflow.user_id)
    await pods.run_database.database.transaction(
        lambda connection: signals.store_signal(connection, key, sent_signal)
    )
    first.started.kill()
    given = await pods.run_database.database.transaction(
        lambda connection: node_answers.store_answer(
            connection,
            key,
            "ask",
            "",
            node_answers.encode_output_answer({"data": None}),
            kind=AnswerSource.INPUT,
        )
    )
    pods.start(MAX_ROW_OUTPUT_BYTES="1024")
    await pods.reaches(key, "completed")

    assert given.is_woken
    (sent,) = receiver.received
    assert sent.headers["authorization"] == "Bearer a secret"
    assert sent.message == {"text": large}
    assert await pods.run_database.count("event_wait") == 0
    (told,) = await pods.run_database.query("SELECT key, value FROM published_value")
    assert (told["key"], told["value"]) == ("parcel", '"P-12"')
    (replied,) = await pods.run_database.query("SELECT reply FROM signal")
    assert replied["reply"] == json.dumps(pods.owned_workflow.user_id)
    spans = await pods.run_database.query("SELECT node_id FROM span WHERE output_blob IS NOT NULL")
    assert "large" in {span["node_id"] for span in spans}
    assert await pods.run_database.count("throttle") == 1
    assert (await pods.run_database.row(key.execution_id))["progress"] == 99


async def test_a_node_in_a_pod_calls_a_model_within_the_budget_of_its_run(pods: DeployedPods) -> None:
    async with serve_models(ScriptedAnswer()) as served:
        model_id = await create_model(pods, served.url)
        ask = {"id": "ask", "type": "llm", "config": {"model": model_id, "prompt": "How is Oslo?"}}
        definition = json.loads(chain_definition(ask, {**ask, "id": "again"}))
        # Enough for one answer and the reservation of the next one, not for two reservations.
        definition["settings"] = {"aiBudget": {"maxTokens": 1_250}}
        key = await pods.accept(json.dumps(definition))
        pods.start()
        await pods.reaches(key, "completed")
        definition["settings"] = {"aiBudget": {"maxTokens": 1_150}}
        refused = await pods.accept(json.dumps(definition))
        await pods.reaches(refused, "failed")
    assert len(served.requests) == 3
    assert served.headers[0]["authorization"] == "Bearer a key"
    charges = await pods.run_database.query(
        "SELECT tokens, is_settled FROM model_charge WHERE execution_id = :id", id=key.execution_id
    )
    assert [(charge["tokens"], bool(charge["is_settled"])) for charge in charges] == [(120, True)] * 2
    assert "model-budget-exceeded" in str((await pods.run_database.row(refused.execution_id))["error"])
    hours = await pods.run_database.query("SELECT sum(calls) AS calls FROM model_hour WHERE error = ''")
    assert hours[0]["calls"] == 3


async def test_a_killed_pod_keeps_its_reservation_and_the_budget_of_the_month_is_never_passed(
    pods: DeployedPods,
) -> None:
    """Two reservations fit into the budget, or one and the answers so far, but not a third call."""
    budget = 2_300
    stalled = ScriptedAnswer(fault=ModelFault.STALL)
    async with serve_models(stalled, ScriptedAnswer()) as served:
        model_id = await create_model(pods, served.url)
        ask = {"id": "ask", "type": "llm", "config": {"model": model_id, "prompt": "How is Oslo?"}}
        await pods.run_database.query(
            "INSERT INTO ai_settings (organization_id, shard, month_budget, updated_at)"
            " VALUES (:id, :shard, :budget, 0)",
            id=pods.owned_workflow.organization.id,
            shard=pods.owned_workflow.organization.shard,
            budget=json.dumps({"maxTokens": budget}),
        )
        key = await pods.accept(chain_definition(ask, {**ask, "id": "again"}))
        first = pods.start()
        await pods.has_swept(lambda: bool(served.billed))
        first.started.kill()
        reserved = await list_charges(pods)
        pods.start()
        await pods.reaches(key, "failed")
    assert [is_settled for _, is_settled in reserved] == [False]
    assert len(served.billed) == 2, "the killed call, and its repetition"
    charges = await list_charges(pods)
    assert sorted(charges) == sorted([*reserved, (120, True)]), "a refused call reserves nothing"
    assert sum(tokens for tokens, _ in charges) + reserved[0][0] > budget
    assert sum(tokens for tokens, _ in charges) <= budget
    assert "month-budget-exceeded" in str((await pods.run_database.row(key.execution_id))["error"])


async def list_charges(pods: DeployedPods) -> list[tuple[int, bool]]:
    """Return the tokens of each call of a model, and whether it is settled."""
    rows = await pods.run_database.query("SELECT tokens, is_settled FROM model_charge")
    return [(int(row["tokens"]), bool(row["is_settled"])) for row in rows]


async def test_a_node_in_a_pod_calls_the_tools_that_people_have_accepted(pods: DeployedPods) -> None:
    """The pod gets the acceptances with the key; a tool that has changed since is refused there too."""
    async with serve_tools(tools=[build_tool("add_note"), build_tool("find")]) as served:
        accepted = {
            tool["name"]: AcceptedTool(
                msgspec.to_builtins(read_definition(tool)),
                ToolEffect.WRITE,
                pods.owned_workflow.user_id,
                datetime.now(UTC),
            )
            for tool in served.tools
        }
        tools = tool_server.to_stored(ListedTools(accepted=accepted))
        source_id = await create_source(pods, "mcp-server", {"url": served.url}, {"key": MCP_KEY}, tools)
        served.tools = [build_tool("add_note"), build_tool("find", "Finds other notes.")]
        config = {"toolServer": source_id, "arguments": {"text": "milk"}}
        keys = [
            await pods.accept(
                chain_definition({"id": "note", "type": "mcp-tool", "config": {**config, "tool": tool}})
            )
            for tool in ("add_note", "find")
        ]
        pods.start()
        for key, status in zip(keys, ("completed", "failed"), strict=True):
            await pods.reaches(key, status)
    assert "Noted: milk" in (await pods.outputs(keys[0]))["note"]["text"]
    assert len(served.effects) == 1
    assert keys[0].execution_id in served.effects[0]
    assert "tool-changed" in str((await pods.run_database.row(keys[1].execution_id))["error"])


async def test_an_agent_continues_in_another_pod_behind_its_recorded_steps(pods: DeployedPods) -> None:
    wanted = [
        ScriptedAnswer("", tool_calls=[{"name": name, "arguments": '{"city": "Oslo"}'}])
        for name in ("look", "send")
    ]
    stalled = ScriptedAnswer(fault=ModelFault.STALL)
    async with serve_models(*wanted, stalled, ScriptedAnswer()) as served:
        model_id = await create_model(pods, served.url)
        key = await pods.accept(build_agent(served.url).replace('"first"', f'"{model_id}"'))
        first = await pods.start().ready()
        await wait_until(lambda: len(served.requests) == 3)
        first.started.kill()
        pods.start()
        await pods.has_swept(lambda: len(served.requests) == 4)
        await pods.reaches(key, "completed")
    ended = (await pods.outputs(key))["agent"]
    assert (ended["response"], ended["stopReason"], ended["lostAttempts"]) == ("Cold.", "finished", 1)
    assert len(served.requests) == 4, "answers that are recorded are not asked for again"
    assert (len(served.effects), served.repeated) == (1, 0)
    steps = await pods.run_database.query(
        "SELECT name, status, attempt FROM execution_step WHERE execution_id = :id ORDER BY number",
        id=key.execution_id,
    )
    assert [(step["name"], step["status"], step["attempt"]) for step in steps] == [
        *[(model_id, "completed", 1), ("look", "completed", 1)],
        *[(model_id, "completed", 1), ("send", "completed", 1), (model_id, "completed", 2)],
    ]


async def test_a_pod_that_is_lost_takes_contents_that_are_not_recorded_with_it(pods: DeployedPods) -> None:
    look = ScriptedAnswer("", tool_calls=[{"name": "look", "arguments": '{"city": "Oslo"}'}])
    stalled = ScriptedAnswer(fault=ModelFault.STALL)
    async with serve_models(look, stalled, look, ScriptedAnswer()) as served:
        model_id = await create_model(pods, served.url)
        definition = json.loads(build_agent(served.url).replace('"first"', f'"{model_id}"'))
        definition["nodes"][1]["config"] |= {"recordContent": False, "effects": ["read"]}
        key = await pods.accept(json.dumps(definition))
        first = await pods.start().ready()
        await wait_until(lambda: len(served.requests) == 2)
        first.started.kill()
        pods.start()
        await pods.has_swept(lambda: len(served.requests) == 4)
        await pods.reaches(key, "completed")
    ended = (await pods.outputs(key))["agent"]
    assert (ended["response"], ended["lostAttempts"], ended["messages"]) == ("Cold.", 1, [])
    steps = await pods.run_database.query(
        "SELECT name, status, conversation, arguments, result FROM execution_step"
        " WHERE execution_id = :id ORDER BY number",
        id=key.execution_id,
    )
    assert [(step["name"], step["status"], step["conversation"]) for step in steps] == [
        *[(model_id, "completed", 0), ("look", "completed", 0), (model_id, "failed", 0)],
        *[(model_id, "completed", 1), ("look", "completed", 1), (model_id, "completed", 1)],
    ]
    assert {(step["arguments"], step["result"]) for step in steps} == {(None, None)}


@ON_SQLITE
async def test_a_text_that_a_pod_writes_reaches_clients_and_begins_again_in_another_pod(
    pods: DeployedPods,
) -> None:
    stalled = [ScriptedAnswer(text, fault=ModelFault.STALL) for text in ("Oslo is cold", "Rome is warm")]
    async with serve_models(*stalled) as served:
        model_id = await create_model(pods, served.url)
        ask = {"id": "ask", "type": "llm", "config": {"model": model_id, "prompt": "How is it?"}}
        key = await pods.accept(chain_definition(ask))
        hub = pods.gateway.state.live_events.answers
        with hub.reader(key.execution_id, StepFilter()) as reader:
            first = await pods.start().ready()
            assert await take_answer_events(pods, key, reader, 1) == [("token", "Oslo i")]
            first.started.kill()
            pods.start()
            await pods.has_swept(lambda: len(served.requests) == 2)
            events = await take_answer_events(pods, key, reader, 2)
            assert events == [("retry", "worker-lost"), ("token", "Rome i")]
        served.released.set()
        await pods.reaches(key, "completed")


async def take_answer_events(
    pods: DeployedPods, key: ExecutionKey, reader: AnswerReader, count: int
) -> list[tuple[str, str]]:
    """Return so many events of a client that follows a run, each with its text or reason."""
    found: list[tuple[str, str]] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(found) < count:
            owner = (await pods.run_database.row(key.execution_id))["lease_owner"] or ""
            await pods.gateway.state.live_events.answers.follow(key.execution_id, owner)
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.changed.wait(), 0.2)
            for name, shape in reader.take():
                found.append((name, shape.text if isinstance(shape, TokenShape) else shape.reason))
    return found


async def test_an_agent_in_a_pod_waits_for_the_workflow_of_an_agent_that_is_its_tool(
    pods: DeployedPods,
) -> None:
    child_id = (await create_runnable(pods.run_database, pods.owned_workflow, is_public=True)).workflow_id
    asks = [
        ScriptedAnswer("", tool_calls=[{"name": name, "arguments": '{"city": "Oslo"}'}])
        for name in ("other", "deeper")
    ]
    async with serve_models(*asks, ScriptedAnswer(), ScriptedAnswer()) as served:
        model_id = await create_model(pods, served.url)
        inner = {"model": "first", "prompt": "Help.", "effects": ["read", "write"], "approval": "never"}
        definition = json.loads(build_caller({"node": {"type": "agent", "config": inner}}))
        (tool,) = [node for node in definition["nodes"] if node["id"] == "other"]
        config = {**tool["config"], "name": "deeper", "target": {"workflowId": child_id}}
        definition["nodes"].append({"id": "deeper", "type": "tool", "config": config})
        wire = {"id": "3", "source": "deeper", "target": "other", "targetPort": "tools"}
        definition["connections"].append(wire)
        key = await pods.accept(json.dumps(definition).replace('"first"', f'"{model_id}"'))
        first = await pods.start().ready()
        await pods.reaches(key, "waiting")
        (waiting,) = await pods.run_database.query(
            "SELECT node_id, iteration FROM span WHERE execution_id = :id AND status = 'waiting'",
            id=key.execution_id,
        )
        assert waiting["node_id"] == "deeper"
        children = await pods.run_database.query(
            "SELECT workflow_id FROM execution WHERE parent_id = :id", id=key.execution_id
        )
        assert children == [{"workflow_id": child_id}]
        first.started.kill()
        pods.start()
        await pods.run_database.database.transaction(
            lambda connection: node_answers.store_answer(
                connection,
                key,
                "deeper",
                waiting["iteration"],
                node_answers.encode_output_answer({"degrees": -3}),
                kind=AnswerSource.RUN,
            )
        )
        await pods.reaches(key, "completed")
    assert len(served.requests) == 4
    rows = await pods.run_database.query(
        "SELECT node_id, status FROM execution_step WHERE execution_id = :id ORDER BY node_id, number",
        id=key.execution_id,
    )
    assert [row["node_id"] for row in rows] == ["agent"] * 3 + ["other"] * 3
    assert {row["status"] for row in rows} == {"completed"}


async def test_a_callback_ends_the_wait_of_a_node_after_its_pod_was_killed_in_its_request(
    pods: DeployedPods, receiver: HttpReceiver
) -> None:
    secret = await create_signing_secret(pods)
    receiver.may_answer.clear()
    first = await pods.start().ready()
    waiting = call(receiver)
    waiting["config"] |= {"waitForCallback": True, "body": {"n": 1}}
    greet = {"id": "greet", "type": "set", "config": {"values": {"greeting": "{{ data.body.said }}"}}}
    key = await pods.accept(chain_definition(waiting, greet))
    await wait_until(lambda: len(receiver.received) == 1)
    first.started.kill()
    (sent,) = receiver.received
    assert sent.is_signed_by(secret)
    url = sent.message["callbackUrl"].replace("https://flows.example", pods.gateway.url)
    async with httpx2.AsyncClient() as client:
        answers = [await client.post(url, json={"said": "Hello"}) for _ in range(2)]
    assert [one.status_code for one in answers] == [200, 200]
    receiver.may_answer.set()
    pods.start()
    await pods.reaches(key, "completed")

    assert (await pods.outputs(key))["greet"]["greeting"] == "Hello"
    assert len(receiver.received) == 1


@ON_POSTGRES
async def test_no_run_enters_a_deployment_that_drains(pods: DeployedPods) -> None:
    key = await pods.accept(SIMPLE)
    far = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp() * 1_000_000)
    for wanted in (f"drain_until = {far}", "drain_until = NULL, replicas = 0"):
        await pods.run_database.query(f"UPDATE deployment SET {wanted}")
        async with httpx2.AsyncClient(base_url=pods.gateway.url, verify=False, timeout=60) as client:
            claimed = await client.post(
                f"{PREFIX}/claim",
                json={"limit": 10, "lease_seconds": 30},
                headers={"Authorization": f"Bearer {pods.token}", RUNNER_HEADER: POD.name},
            )
        assert claimed.json() == {"runs": []}
    assert await pods.status(key) == "pending"
    await pods.run_database.query("UPDATE deployment SET replicas = 1")
    pods.start()
    await pods.reaches(key, "completed")


async def test_a_pod_of_a_deployment_that_was_stopped_hands_over_without_waiting_again(
    pods: DeployedPods, receiver: HttpReceiver
) -> None:
    receiver.may_answer.clear()
    pod = await pods.start(RUNNER_DRAIN_SECONDS="60").ready()
    key = await pods.accept(chain_definition(*(call(receiver, f"call-{index}") for index in range(40))))
    await wait_until(lambda: len(receiver.received) == 1)
    await pods.run_database.query("UPDATE deployment SET replicas = 0")
    exit_code = await stop_during_call(pod, receiver)
    handed_over = await pods.run_database.row(key.execution_id)
    assert exit_code == 0
    assert (handed_over["status"], handed_over["attempt"], handed_over["lease_owner"]) == ("pending", 0, None)


async def test_a_pod_reads_a_large_body_from_its_blob(pods: DeployedPods) -> None:
    body: Json = {"name": "Ada", "fill": "x" * 300_000}
    encoded = EncodedTrigger.of({"body": body, "headers": {}})
    execution_id = ids.new_id("exec")
    owner = BlobOwner(pods.owned_workflow.organization.id, execution_id)
    row = await large_values.store_body(pods.gateway.state.blobs, owner, encoded)
    key = await pods.accept(SIMPLE, execution_id=execution_id, trigger=row)
    pods.start(MAX_ROW_OUTPUT_BYTES="1000000")
    await pods.reaches(key, "completed")
    assert (await pods.outputs(key))["greet"]["greeting"] == "Hello, Ada"


@ON_POSTGRES
async def test_a_wakeup_at_a_gateway_without_polling_pods_is_forwarded(
    pods: DeployedPods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "LOOK_SECONDS", 3_600.0)
    pod = await pods.start().ready()
    poll_hub = pods.gateway.state.pod_services.poll_hub
    await wait_until(lambda: poll_hub.has_waiting_pod(pods.owned_workflow.workflow_id))
    elsewhere = InterruptibleGateway(pods.run_database, pods.folder / "elsewhere")
    await elsewhere.start()
    gone = "http://127.0.0.1:1"
    await pods.run_database.query(
        "UPDATE deployment SET observed = 'running', ready_addresses = :urls",
        urls=json.dumps([gone, pod.url]),
    )
    key = await pods.accept(SIMPLE)
    await elsewhere.state.pod_services.poll_hub.notify_pods([pods.owned_workflow.workflow_id])
    await pods.reaches(key, "completed")

    told: list[DeployerMessage] = []
    elsewhere.state.broker.start_deployer(told.append)
    await pods.run_database.query("UPDATE deployment SET ready_addresses = :urls", urls=json.dumps([gone]))

    async def deployer_is_told() -> bool:
        await elsewhere.state.pod_services.poll_hub.notify_pods([pods.owned_workflow.workflow_id])
        return ReconcileRequest(pods.owned_workflow.workflow_id) in told

    await wait_until_async(deployer_is_told)
    await elsewhere.stop()


@ON_SQLITE
async def test_an_orphaned_pod_ends_itself(pods: DeployedPods) -> None:
    folder = pods.folder / "work"
    folder.mkdir()
    housed = pods.start(folder=folder)
    refused = pods.start(RUNNER_ORPHAN_SECONDS="0.5", RUNNER_TOKEN="rt-00" + "a" * 52)
    alone = pods.start(RUNNER_ORPHAN_SECONDS="0.5", RUNNER_GATEWAY_URL="http://127.0.0.1:1")
    await housed.ready()
    folder.rmdir()
    for pod, reason in ((refused, "refused it"), (alone, "was away"), (housed, "folder that it works in")):
        assert await asyncio.to_thread(pod.started.ends) == 0
        assert reason in pod.started.log()


async def test_a_pod_hears_that_a_run_is_cancelled(pods: DeployedPods, receiver: HttpReceiver) -> None:
    receiver.may_answer.clear()
    await pods.start(lease_seconds=60).ready()
    key = await pods.accept(chain_definition(call(receiver)))
    await wait_until(lambda: len(receiver.received) == 1)
    await pods.run_database.store.request_end(key, "cancel")
    await pods.reaches(key, "cancelled")


async def test_workers_perform_the_tasks_of_a_pod(pods: DeployedPods) -> None:
    organization = pods.owned_workflow.organization
    document = custom_type(effect={"default": "write"}, category="Custom")
    graph = json.loads(chain_definition({**RESIZE_NODE, "id": "work"}, {**RESIZE_NODE, "id": "again"}))
    definition = json.dumps({**graph, "nodeTypes": {"acme/resize": {"1.2.0": document}}})
    await pods.start(anew=True).ready()
    key = await pods.accept(definition)
    worker = WorkerDescription(organization.id, organization.shard, "w_1", "worker", "test/1", "", "", [], [])
    hub = pods.gateway.state.task_hub
    for name in ("work", "again"):
        poll = TaskPoll(organization.id, "w_1", name, 1, {"acme/resize": "1.2.0"}, frozenset({"default"}))
        (task,) = (await hub.wait(poll, worker, PATIENCE_SECONDS)).tasks
        assert task.node_id == name
        assert (await pods.run_database.row(key.execution_id))["status"] == "waiting"
        completion = Completion(task.id, task.lease, "output", b'{"url":"http://x"}')
        report = WorkerReport(organization.id, "w_1", name, [], [completion])
        (result,) = await hub.report(report)
        assert result.status == ReportStatus.OK
    await pods.reaches(key, "completed")
    assert (await pods.outputs(key))["again"] == {"url": "http://x"}


# ── the gateway's side ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class PodHeldRun:
    """Run that a pod holds, with every kind of record that requests refer to."""

    gateway: InterruptibleGateway
    run: ClaimedRun
    source_id: str
    model_id: str
    blob: str
    definition_hash: str

    def body(self, path: str) -> dict[str, Any]:
        """Return the body of a pod's request about this run."""
        execution_id = self.run.execution_id
        lease = {"execution_id": execution_id, "shard": self.run.shard, "token": self.run.token}
        bodies: dict[str, dict[str, Any]] = {
            "/wait": {"seconds": 0, "wants_work": True},
            "/claim": {"limit": 10, "lease_seconds": 30},
            "/suspects": {"max_isolation_losses": 0},
            "/record": {"writes": [{**lease, "completed_nodes": 2, "attempts": [ATTEMPT]}]},
            "/renew": {"leases": [lease], "lease_seconds": 30},
            "/release": {"held": []},
            "/give-back": {"held": []},
            "/definitions": {"hashes": [self.definition_hash]},
            "/spans": {"execution_id": execution_id},
            "/steps": {"execution_id": execution_id},
            "/log-ends": {"execution_ids": [execution_id]},
            "/answers": {"execution_ids": [execution_id]},
            "/open-answers": {"open": [execution_id]},
            "/executions/{id}/data-sources": {"source_id": self.source_id},
            "/executions/{id}/models": {"model_id": self.model_id},
            "/executions/{id}/models/blocked": {"model_id": self.model_id, "seconds": 60},
            "/executions/{id}/models/reserve": {
                "reservation": {"key": "k", "node": "greet:", "model_id": self.model_id}
                | {"tokens": 10, "cost": 5, "budget": {"maxCost": "1"}}
            },
            "/executions/{id}/models/settle": {
                "settlement": {"key": "k", "node": "greet:", "model_id": self.model_id}
                | {"usage": {"inputTokens": 5, "outputTokens": 5}, "cost": 3}
            },
            "/executions/{id}/models/release": {"key": "k"},
            "/executions/{id}/models/failed": {"failed": {"model_id": "m", "error": "model-unavailable"}},
            "/executions/{id}/runs": {"workflow_id": self.run.workflow_id, "inputs": {}}
            | {"node_id": "greet", "iteration": "", "awaited": False},
            "/executions/{id}/workflow-effect": {"workflow_id": self.run.workflow_id},
            "/executions/{id}/approval-links": {"places": [["greet", ""]]},
            "/executions/{id}/callback-url": {"node_id": "greet", "iteration": ""},
            "/executions/{id}/signatures": {"message_id": "msg_1", "body": "e30="},
            "/executions/{id}/event-waits": {"node_id": "greet", "iteration": "", "event_type": "paid"}
            | {"condition": None, "given": "[]", "look_back_seconds": 0, "timeout_seconds": None},
            "/executions/{id}/state": {"key": "phase", "value": "e30="},
            "/executions/{id}/signal-replies": {"node_id": "greet", "iteration": "", "value": "MQ=="},
            "/executions/{id}/signal-waits": {"node_id": "greet", "iteration": "", "name": "go"}
            | {"timeout_seconds": None},
            "/executions/{id}/reservations": {
                "key": "a",
                "limit": 1,
                "per_seconds": 1,
                "max_wait_seconds": 9,
            },
        }
        return bodies.get(path, {})

    async def ask(
        self,
        line: routes.PodRoute,
        token: str,
        pod: str = POD.name,
        body: Mapping[str, Any] | None = None,
    ) -> httpx2.Response:
        words = {"id": self.run.execution_id, "sub": self.blob}
        content = b"content" if line.method == "PUT" else json.dumps(body or self.body(line.path)).encode()
        async with httpx2.AsyncClient(base_url=self.gateway.url, verify=False, timeout=60) as client:
            return await client.request(
                line.method,
                PREFIX + line.path.format(**words),
                content=None if line.method == "GET" else content,
                headers={"Authorization": f"Bearer {token}", RUNNER_HEADER: pod},
            )


NOTHING: Mapping[str, Mapping[str, Any]] = {
    "/wait": {"has_work": False, "requests": {}},
    "/claim": {"runs": []},
    "/suspects": {"has_suspects": False},
    "/record": {"held": []},
    "/renew": {"requests": {}},
    "/release": {"count": 0},
    "/give-back": {"count": 0},
    "/promote": {"count": 0},
    "/definitions": {"texts": {}},
    "/spans": {"spans": []},
    "/steps": {"steps": []},
    "/log-ends": {"last_lines": {}},
    "/answers": {"answers": []},
    "/open-answers": {"followed": []},
}
"""Answers to pods without a lease; all other routes answer that the lease is lost."""


ATTEMPT: dict[str, Any] = {
    "node_id": "greet",
    "label": "Greet",
    "type": "set",
    "iteration": "",
    "attempt": 1,
    "status": "failed",
    "sequence": 9,
    "started_at": "2026-01-01T00:00:00Z",
}


async def hold(pods: DeployedPods) -> PodHeldRun:
    """Have the pod named `pod` claim a run, and put something of everything there."""
    run_database, owned_workflow = pods.run_database, pods.owned_workflow
    key = await pods.accept(SIMPLE)
    owner = lease_owner(owned_workflow.workflow_id, POD)
    (run,) = await run_database.store.claim(ClaimQuery(owner, 30, 1, target=owned_workflow.workflow_id))
    assert run.execution_id == key.execution_id
    blob = sha256(b"content").hexdigest()
    await pods.gateway.state.blobs.put(
        BlobOwner(run.organization_id, run.key_id), b"content", media_type="text/plain"
    )
    source_id = await create_bearer_source(pods)
    await create_signing_secret(pods)
    for table, columns, values in (
        ("wait_answer", "node_id, iteration, payload, created_at", "'greet', '', '{}', 1"),
        ("log_line", "sequence, id, level, message, created_at", "7, 'log_1', 'info', 'x', 1"),
        (
            "span",
            "node_id, iteration, id, sequence, label, type, status, attempt",
            "'greet', '', 'span_1', 8, 'greet', 'set', 'running', 1",
        ),
        (
            "execution_step",
            (
                "node_id, iteration, number, id, sequence, kind, name, status, attempt, losses, call_id, key,"
                " request_hash, started_at"
            ),
            "'greet', '', 0, 'step_1', 9, 'model', 'echo', 'started', 1, 0, '', '', '', 1",
        ),
    ):
        await run_database.query(
            f"INSERT INTO {table} (execution_id, shard, {columns}) VALUES (:id, :shard, {values})",
            id=run.execution_id,
            shard=run.shard,
        )
    model_id = await create_model(pods)
    return PodHeldRun(pods.gateway, run, source_id, model_id, blob, run.definition_hash)


async def read_all_tables(run_database: RunDatabase, held: PodHeldRun) -> list[Any]:
    tables = ("execution", "span", "attempt_span", "wait_answer", "log_line", "throttle")
    return [
        [row for row in await run_database.query(f"SELECT * FROM {table}") if held.run.shard == row["shard"]]
        for table in tables
    ]


async def test_only_the_pod_that_holds_a_run_reads_or_changes_it(pods: DeployedPods) -> None:
    held = await hold(pods)
    neighbour = await deploy(
        pods.run_database, await pods.run_database.workflow(pods.owned_workflow.organization)
    )
    stranger = await deploy(pods.run_database, await pods.run_database.workflow())
    before = await read_all_tables(pods.run_database, held)
    another = PodProcess("another-pod", POD.started_at).name
    for token, pod in ((neighbour, POD.name), (stranger, POD.name), (pods.token, another)):
        for line in routes.TABLE:
            response = await held.ask(line, token, pod)
            if line.path == "/contact":
                assert response.status_code == 200
            elif line.path in NOTHING:
                assert response.json().items() >= NOTHING[line.path].items(), line
            else:
                assert (response.status_code, response.json()["error"]["code"]) == (409, "lease-lost"), line
    assert await read_all_tables(pods.run_database, held) == before

    own = {
        line.path: await held.ask(line, pods.token)
        for line in routes.TABLE
        if line.handler is not pod_journal.release
    }
    assert own.pop("/executions/{id}/runs").json()["error"]["code"] == "workflow-not-found"
    assert {path: response.status_code for path, response in own.items() if response.status_code >= 300} == {}
    assert await pods.run_database.count("attempt_span") == 1
    for path in ("/record", "/renew", "/definitions", "/spans", "/steps", "/log-ends", "/answers"):
        assert own[path].json() != NOTHING[path]
    assert own["/executions/{id}/data-sources"].json()["secrets"] == {"token": "a secret"}
    model = msgspec.json.decode(own["/executions/{id}/models"].content, type=ModelConnection)
    assert (model.key, model.price) == ("a key", ModelPrice("0.25", "2"))
    url = own["/executions/{id}/callback-url"].json()["url"]
    assert f"/executions/{held.run.execution_id}/callback?node=greet&token=" in url
    assert own["/executions/{id}/signatures"].json()["headers"]["webhook-id"] == "msg_1"


@ON_SQLITE
async def test_a_pod_of_the_previous_release_gets_no_candidates_of_a_replay(pods: DeployedPods) -> None:
    held = await hold(pods)
    await pods.run_database.query("UPDATE span SET status = 'candidate' WHERE node_id = 'greet'")
    headers = {"Authorization": f"Bearer {pods.token}", RUNNER_HEADER: POD.name}
    call = {"execution_id": held.run.execution_id, "after": 0}
    async with httpx2.AsyncClient(base_url=pods.gateway.url, headers=headers) as client:
        refused = await client.post(f"{PREFIX}/spans", json=call)
        assert (refused.status_code, "present version" in refused.text) == (503, True)
        answered = await client.post(f"{PREFIX}/spans", json={**call, "reads_candidates": True})
        assert [one["status"] for one in answered.json()["spans"]] == ["candidate"]


@ON_SQLITE
async def test_a_question_about_another_workflow_ends_while_the_database_is_away(
    pods: DeployedPods, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await hold(pods)

    async def fail(*_: object) -> None:
        raise DatabaseUnavailable

    monkeypatch.setattr(child_runs, "_read_parent", fail)
    monkeypatch.setattr(node_services, "ASK_SECONDS", 0.1)
    (line,) = [one for one in routes.TABLE if one.path == "/executions/{id}/workflow-effect"]
    async with asyncio.timeout(10):
        refused = await held.ask(line, pods.token)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not-ready")


@ON_SQLITE
async def test_the_log_level_of_a_workflow_reaches_its_pods(
    pods: DeployedPods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_levels, "READ_SECONDS", 0.02)
    workflow_id, database = pods.owned_workflow.workflow_id, pods.run_database.database
    until = datetime.now(UTC) + timedelta(hours=1)
    await database.transaction(
        lambda connection: log_levels.store_log_level(connection, workflow_id, "debug", until)
    )
    known = pods.gateway.state.pod_services.log_levels
    await wait_until(lambda: known.get(workflow_id) == "debug")
    await pods.start().ready()
    key = await pods.accept(SIMPLE)
    await pods.reaches(key, "completed")
    lines = await pods.run_database.query(
        "SELECT message FROM log_line WHERE execution_id = :id", id=key.execution_id
    )
    assert any(one["message"].startswith("greet (set) completed after ") for one in lines), lines


@ON_POSTGRES
async def test_runs_of_a_pod_process_are_reclaimed_when_its_next_one_begins(
    pods: DeployedPods,
) -> None:
    held = await hold(pods)
    key = ExecutionKey(held.run.execution_id, held.run.shard)
    (line,) = (line for line in routes.TABLE if line.path == "/contact")
    before, after = (POD.started_at + timedelta(seconds=seconds) for seconds in (-1, 1))
    for process in (PodProcess(POD.pod, before), POD, PodProcess(f"{POD.pod}-2", after)):
        assert (await held.ask(line, pods.token, process.name)).status_code == 200
        assert await pods.status(key) == "running"
    assert (await held.ask(line, pods.token, PodProcess(POD.pod, after).name)).status_code == 200
    assert await pods.status(key) == "pending"


@ON_POSTGRES
async def test_a_pod_learns_the_database_time_from_gateway_answers(pods: DeployedPods) -> None:
    settings = RunnerSettings(
        runner_gateway_url=pods.gateway.url,
        runner_token=SecretStr(pods.token),
        runner_workflow_id=pods.owned_workflow.workflow_id,
    )
    gateway = gateway_client.GatewayClient(settings, POD)
    store = RemoteRunStore(gateway)
    await pods.accept(SIMPLE)

    def mislead(days: int) -> None:
        wrong = datetime.now(UTC) + timedelta(days=days)
        gateway.clock.learn(wrong, time.monotonic(), time.monotonic())
        assert not is_right()

    def is_right() -> bool:
        return abs(store.clock.now() - datetime.now(UTC)) < timedelta(seconds=PATIENCE_SECONDS)

    mislead(1)
    await pod_services.make_first_contact(gateway, settings, asyncio.Event())
    assert is_right()
    mislead(-1)
    (one,) = await store.claim(ClaimQuery("pod", LEASE_SECONDS, 1))
    assert is_right()
    mislead(1)
    assert await store.renew([lease_of(one)], LEASE_SECONDS)
    assert is_right()
    await gateway.close()


@ON_SQLITE
async def test_no_route_takes_anything_but_a_valid_token(
    pods: DeployedPods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_attempts, "MAX_FAILURES", 1_000)
    held = await hold(pods)
    before = await read_all_tables(pods.run_database, held)
    person = "sk-00" + "a" * 52
    for line in routes.TABLE:
        for token in ("rt-00" + "a" * 52, person):
            assert (await held.ask(line, token)).status_code == 401, line
        assert (await held.ask(line, pods.token, pod="not a name")).status_code == 401, line
    pods.gateway.state.pod_services.authenticator.forget()
    await pods.run_database.database.transaction(
        lambda connection: deployment_token.revoke_tokens(
            connection, pods.owned_workflow.workflow_id, now=datetime.now(UTC)
        )
    )
    for line in routes.TABLE:
        assert (await held.ask(line, pods.token)).status_code in {401, 429}, line
    assert await read_all_tables(pods.run_database, held) == before


@ON_POSTGRES
async def test_a_pod_is_let_in_though_another_guesses_tokens_from_its_address(
    pods: DeployedPods, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_attempts, "MAX_FAILURES", 3)

    async def claim(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}", RUNNER_HEADER: POD.name}
        async with httpx2.AsyncClient(
            base_url=pods.gateway.url, verify=False, timeout=60, headers=headers
        ) as client:
            return (await client.post(f"{PREFIX}/claim", json={"limit": 1, "lease_seconds": 30})).status_code

    assert [await claim(f"{pods.token}{number}") for number in range(4)] == [401, 401, 401, 429]
    assert await claim(pods.token) == 200


async def test_a_secret_needs_a_live_lease_and_the_rights_of_the_user(pods: DeployedPods) -> None:
    held = await hold(pods)
    (line,) = (line for line in routes.TABLE if line.path.endswith("/data-sources"))
    assert (await held.ask(line, pods.token)).status_code == 200

    somebody = await pods.run_database.workflow(pods.owned_workflow.organization)
    await pods.run_database.query("UPDATE data_source SET owner_id = :id", id=somebody.user_id)
    pods.gateway.state.pod_services.sources.clear()
    not_theirs = await held.ask(line, pods.token)
    assert (not_theirs.status_code, not_theirs.json()["error"]["code"]) == (422, "data-source-not-found")
    assert not_theirs.headers["X-Node-Error"] == "final"

    await pods.run_database.expire(held.run)
    late = await held.ask(line, pods.token)
    assert (late.status_code, late.json()["error"]["code"]) == (409, "lease-lost")


@ON_SQLITE
async def test_a_value_that_a_row_could_not_return_unchanged_is_refused(pods: DeployedPods) -> None:
    held = await hold(pods)
    before = await read_all_tables(pods.run_database, held)
    (line,) = (line for line in routes.TABLE if line.path == "/record")
    whole = {"node_id": "greet", "label": "", "type": "set", "status": "completed", "sequence": 9}
    lease = {"execution_id": held.run.execution_id, "shard": held.run.shard, "token": held.run.token}
    spoilt: list[dict[str, Any]] = [
        {"output": b"{"},
        {"output": b'{"a":1,"a":2}'},
        {"input": b"NaN"},
        {"awaits": b"[]"},
        {"output_blob": b'{"$blob":{"sha256":"../../etc/passwd","size":1}}'},
        {"ended_at": "2026-01-01T00:00:00"},
    ]
    for span in spoilt:
        body = {"writes": [{**lease, "spans": [{**whole, "started_at": None, **span}]}]}
        response = await held.ask(line, pods.token, body=json.loads(msgspec.json.encode(body)))
        assert response.status_code == 422, span
    assert await read_all_tables(pods.run_database, held) == before


@ON_POSTGRES
async def test_a_charge_or_a_step_that_no_column_holds_is_refused(pods: DeployedPods) -> None:
    held = await hold(pods)
    lines = {line.path: line for line in routes.TABLE}
    for path, name, value in (
        ("reserve", "tokens", 2**63),
        ("settle", "cost", 2**63),
        ("settle", "usage", {"inputTokens": -5, "outputTokens": 5}),
        ("settle", "usage", {"inputTokens": 2**63, "outputTokens": 5}),
    ):
        line = lines[f"/executions/{{id}}/models/{path}"]
        ((kind, fields),) = held.body(line.path).items()
        response = await held.ask(line, pods.token, body={kind: {**fields, name: value}})
        assert response.status_code == 422, (path, name, response.text)
    step = {"node_id": "greet", "iteration": "", "number": 0, "sequence": 9, "kind": "model", "name": "m"}
    step |= {"status": "completed", "started_at": "2026-01-01T00:00:00Z"}
    lease = {"execution_id": held.run.execution_id, "shard": held.run.shard, "token": held.run.token}
    for spoilt in ({"number": 2**40}, {"losses": 2**40}, {"name": "a" * 1_000}):
        body = {"writes": [{**lease, "steps": [{**step, **spoilt}]}]}
        response = await held.ask(lines["/record"], pods.token, body=body)
        assert response.status_code == 422, (spoilt, response.text)


async def test_a_pod_with_refused_polls_asks_again_after_a_pause() -> None:
    """As by a gateway of another version, or by another server at its address."""
    asked_at: list[float] = []
    loop = asyncio.get_running_loop()

    async def refuse_once(_request: web.Request) -> web.Response:
        asked_at.append(loop.time())
        if len(asked_at) == 1:
            return web.json_response(
                {"error": {"code": "not-found", "message": "There is no such route"}}, status=404
            )
        return web.Response(
            body=msgspec.json.encode(WorkPollResponse(gateway="a", run_count=0, has_work=True, requests={}))
        )

    app = web.Application()
    app.router.add_post(f"{PREFIX}/wait", refuse_once)
    async with TestServer(app) as server:
        calls = gateway_client.GatewayClient(
            RunnerSettings(
                runner_gateway_url=str(server.make_url("")),
                runner_token=SecretStr("rt-none"),
                runner_workflow_id="wf_none",
            )
        )
        news = GatewayWorkPoll(calls, channel="pod")
        has_work = asyncio.Event()
        news.start_worker(lambda _shard: has_work.set())
        async with asyncio.timeout(PATIENCE_SECONDS):
            await has_work.wait()
        await news.close()
        await calls.close()
    assert asked_at[1] - asked_at[0] >= REFUSED_SECONDS


# ── traces and logs ───────────────────────────────────────────────────────────────────────────────────────────


@ON_POSTGRES
async def test_a_run_in_a_pod_continues_the_trace_of_its_request_and_names_the_request(
    pods: DeployedPods,
) -> None:
    context = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", is_sampled=True)
    async with run_otlp_receiver() as collector:
        pods.start(OTLP_URL=collector.url)
        awaited, queued = [
            await pods.accept(
                SIMPLE,
                trace_origin=f"{encode_origin(context, is_awaited=is_awaited)} request=req_{is_awaited}",
            )
            for is_awaited in (True, False)
        ]
        for key in (awaited, queued):
            await pods.reaches(key, "completed")

        def has_arrived(key: ExecutionKey) -> bool:
            return {span.name for span in collector.of_run(key.execution_id)} >= {
                *("run accepted", "run segment", "manual", "set")
            }

        await wait_until(lambda: has_arrived(awaited) and has_arrived(queued))
    of_awaited, of_queued = (collector.of_run(key.execution_id) for key in (awaited, queued))
    assert {span.process for span in of_awaited} == {"pilotflame-pod"}
    (child,) = [span for span in of_awaited if span.name == "run accepted"]
    assert {span.trace_id for span in of_awaited} == {context.trace_id}
    assert (child.parent_id, child.links) == (context.span_id, ())
    (linked,) = [span for span in of_queued if span.name == "run accepted"]
    assert {span.trace_id for span in of_queued} == {linked.trace_id} != {context.trace_id}
    assert (linked.parent_id, linked.links) == ("", ((context.trace_id, context.span_id),))

    lines = [json.loads(line) for line in (pods.folder / "pod-1.log").read_text().splitlines()]
    ends = {line["execution_id"]: line for line in lines if line["event"] == "execution left"}
    for key, span, request_id in ((awaited, child, "req_True"), (queued, linked, "req_False")):
        line = ends[key.execution_id]
        assert (line["request_id"], line["trace_id"]) == (request_id, span.trace_id)
