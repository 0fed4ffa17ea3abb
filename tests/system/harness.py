"""Pilotflame as it is deployed, in real processes that tests kill, pause and start again, and the client it serves."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload
from uuid import uuid4

import httpx2
import psutil
import pytest

from models.execution import TERMINAL
from tests import commands, services
from tests.system import proxy
from tests.system.witness import PostgreSQLRecords, Records, SQLiteRecords

if TYPE_CHECKING:
    from engine.values import Json
    from tests.system.ledger import Call
    from tests.system.proxy import Proxy

T = TypeVar("T")

LEASE_SECONDS = 2.0
SWEEP_SECONDS = 1.0
RECOVERY_SECONDS = LEASE_SECONDS + SWEEP_SECONDS + 5.0
"""Within this time of a crash whatever it interrupted goes on."""
SHUTDOWN_SECONDS = 20.0
"""Within this time of SIGTERM a process has ended."""
START_SECONDS = 30.0
PATIENCE_SECONDS = 20.0
POLL_SECONDS = 0.02
UNREAD_SECONDS = 0.5
"""For so long what a process sent may lie about before the test reads it, though the process is gone."""

API_KEY = "sk-system-tests-0123456789"
COMMAND = commands.COMMAND


on_one_process = pytest.mark.parametrize("shared_deployment", ["sqlite"], indirect=True)
on_many_processes = pytest.mark.parametrize("shared_deployment", ["postgresql"], indirect=True)
"""For what can't be done to the other kind of deployment, or not by it."""


@overload
async def wait_until(
    condition: Callable[[], Coroutine[Any, Any, T | None]], within: float = ..., *, what: str = ...
) -> T: ...


@overload
async def wait_until(condition: Callable[[], T | None], within: float = ..., *, what: str = ...) -> T: ...


async def wait_until(
    condition: Callable[[], object], within: float = PATIENCE_SECONDS, *, what: str = ""
) -> object:
    """Return what `condition` gives as soon as that is true; raises TimeoutError with what was waited for."""
    deadline = time.monotonic() + within
    while True:
        outcome = condition()
        if inspect.isawaitable(outcome):
            outcome = await outcome
        if outcome:
            return outcome
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {within:g} s: {what or inspect.getsource(condition).strip()}")
        await asyncio.sleep(POLL_SECONDS)


async def after(seconds: float, action: Callable[[], object]) -> None:
    """Do something at a moment that no condition tells: the random point of a fault."""
    await asyncio.sleep(seconds)
    action()


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Fault:
    """What a test did to whoever had nodes in hand, or to the database, and for how long; a kill is over at once."""

    what: str
    began_at: float
    """Unix time."""
    ended_at: float

    def lies_between(self, earlier: float, later: float) -> bool:
        """Tell whether it may have to do with what happened first `earlier` and again `later`."""
        return self.began_at <= later and earlier <= self.ended_at + UNREAD_SECONDS


class Process:
    """One process of a deployment, under the name that it has in the Procfile."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        faults: list[Fault],
    ) -> None:
        self.name = name
        self.environment = dict(environment)
        self._arguments = arguments
        self._folder = folder
        self._log = folder / f"{name}.log"
        self._log.touch()
        self._log_start = 0
        self._heard_to = 0
        self._faults = faults
        self._has_runs = arguments[0] in {"worker", "dev"}
        self._has_http = arguments[0] in {"gateway", "dev"}
        self._pause: Fault | None = None
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has been started and has not ended; a paused one has not."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def is_at_work(self) -> bool:
        """Whether it does what it is there for: it has got through its start, and it isn't paused."""
        if not self.is_alive or self._pause is not None:
            return False
        if self._has_http:
            return self.has_port(int(self.environment["PILOTFLAME_PORT"]))
        return "ready" in self.log()

    def start(self) -> None:
        """Start it, or start it again."""
        assert not self.is_alive
        self._log_start = self._log.stat().st_size
        with self._log.open("ab") as log:
            self._popen = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", COMMAND, *self._arguments],
                cwd=self._folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C ends the tests, and they end the processes
            )

    def kill(self) -> None:
        """End it as a crash would: SIGKILL."""
        now = time.time()
        self._note(Fault(f"{self.name} killed", now, now))
        self._end_pause()
        self._signal(signal.SIGKILL)
        assert self._popen is not None
        self._popen.wait()

    def pause(self) -> None:
        """Let it stand still, though it doesn't know: SIGSTOP. Returns when it does."""
        self._pause = Fault(f"{self.name} paused", time.time(), float("inf"))
        self._note(self._pause)
        self._signal(signal.SIGSTOP)
        process = psutil.Process(self.process_id)
        while process.status() not in {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}:
            pass  # it takes microseconds, and nothing may happen in between

    def resume(self) -> None:
        """Let it go on after a pause: SIGCONT."""
        self._signal(signal.SIGCONT)
        self._end_pause()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep it paused for the time of a block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def terminate(self) -> None:
        """Ask it to end, as whoever deploys a new version does: SIGTERM."""
        self._signal(signal.SIGTERM)

    async def exit_code(self, within: float = SHUTDOWN_SECONDS) -> int:
        """Wait until it has ended; raises TimeoutError."""
        popen = self._popen
        assert popen is not None
        await wait_until(lambda: popen.poll() is not None, within, what=f"{self.name} ends")
        return popen.returncode

    def twin(self) -> Process:
        """Return another one of the same kind, in the same environment, that is still to be started."""
        return Process(f"{self.name}-twin", self._arguments, self.environment, self._folder, self._faults)

    def log(self) -> str:
        """Return what it has logged since its start."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def has_logged(self, event: str, execution_id: str) -> bool:
        """Tell whether it has said something of an execution since its start."""
        return any(event in line and execution_id in line for line in self.log().splitlines())

    def complaints(self) -> list[str]:
        """Return the errors that it has logged since it was asked for them last."""
        with self._log.open("rb") as log:
            log.seek(self._heard_to)
            lines = log.readlines()
            self._heard_to = log.tell()
        return [line.decode() for line in lines if b'"level":"error"' in line or b"Traceback" in line]

    def has_port(self, port: int) -> bool:
        """Tell whether a connection with this local port is its."""
        if not self.is_alive:
            return False
        connections = psutil.Process(self.process_id).net_connections(kind="tcp")
        return any(connection.laddr and connection.laddr.port == port for connection in connections)

    def _signal(self, number: signal.Signals) -> None:
        assert self._popen is not None
        self._popen.send_signal(number)

    def _note(self, fault: Fault) -> None:
        if self._has_runs:
            self._faults.append(fault)

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.ended_at = time.time()
            self._pause = None


# ── the client ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Ended:
    """How an execution ended, as its client was told."""

    status: str
    error_code: str | None
    outputs: Mapping[str, Any]


class Client:
    """One as the documentation asks for: what got no answer, or 503, is sent again under the same Idempotency-Key."""

    def __init__(self, url: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.patience_seconds = patience_seconds
        self.ended: dict[str, Ended] = {}
        """What was seen to have ended, as it was seen first."""
        self._http = httpx2.AsyncClient(
            base_url=f"{url}/api/v1",
            headers={"X-API-Key": API_KEY},
            timeout=httpx2.Timeout(20.0, connect=2.0),
            limits=httpx2.Limits(max_connections=200),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def send(
        self, method: str, path: str, body: Json = None, *, key: str | None = None
    ) -> httpx2.Response:
        """Send a request once; raises `httpx2.TransportError` where no answer comes."""
        headers = {"Idempotency-Key": key} if key else {}
        return await self._http.request(method, path, json=body, headers=headers)

    async def answer(
        self, method: str, path: str, body: Json = None, *, key: str | None = None
    ) -> httpx2.Response:
        """Send a request until it is answered by anything but 503, or patience is at an end."""
        deadline = time.monotonic() + self.patience_seconds
        while True:
            try:
                response = await self.send(method, path, body, key=key)
            except httpx2.TransportError:
                if time.monotonic() > deadline:
                    raise
            else:
                if response.status_code != httpx2.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                    return response
            await asyncio.sleep(POLL_SECONDS)

    async def create(self, workflow: Mapping[str, Json]) -> str:
        """Create a workflow and return its id."""
        response = await self.answer("POST", "/workflows", dict(workflow), key=str(uuid4()))
        assert response.status_code == httpx2.codes.CREATED, response.text
        return str(response.json()["workflowId"])

    async def execute_once(
        self, workflow_id: str, inputs: Mapping[str, Json] | None = None, *, key: str | None = None
    ) -> httpx2.Response:
        """Ask for a run, and return whatever the answer is; raises `httpx2.TransportError` where there is none."""
        return await self.send(
            "POST", f"/workflows/{workflow_id}/execute", {"triggerInputs": dict(inputs or {})}, key=key
        )

    async def execute(
        self, workflow_id: str, inputs: Mapping[str, Json] | None = None, *, key: str | None = None
    ) -> str:
        """Have a workflow run, and return the execution's id."""
        path = f"/workflows/{workflow_id}/execute"
        response = await self.answer(
            "POST", path, {"triggerInputs": dict(inputs or {})}, key=key or str(uuid4())
        )
        assert response.status_code == httpx2.codes.CREATED, response.text
        return str(response.json()["executionId"])

    async def progress(self, execution_id: str, *, wait_seconds: float = 0) -> dict[str, Any]:
        """Return where an execution is, or where it was when the wait ended."""
        response = await self.answer("GET", f"/executions/{execution_id}/progress?wait={wait_seconds:g}")
        assert response.status_code == httpx2.codes.OK, response.text
        return cast("dict[str, Any]", response.json())

    async def end(self, execution_id: str, within: float = PATIENCE_SECONDS) -> Ended:
        """Follow an execution to its end; raises TimeoutError."""
        async with asyncio.timeout(within):
            progress: dict[str, Any] = {"status": "pending"}
            while progress["status"] not in TERMINAL:
                progress = await self.progress(execution_id, wait_seconds=5)
        error = progress.get("error") or {}
        ended = Ended(progress["status"], error.get("code"), progress["outputs"])
        return self.ended.setdefault(execution_id, ended)

    async def has_status(self, execution_id: str, status: str) -> bool:
        """Tell whether an execution is in a state right now."""
        return bool((await self.progress(execution_id))["status"] == status)

    async def ask(self, execution_id: str, request: str) -> httpx2.Response:
        """Ask for `stop`, `cancel` or `resume`."""
        return await self.answer("POST", f"/executions/{execution_id}/{request}")


# ── deployments ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Deployment:
    """Everything that runs, and everything that was done to it."""

    url: str
    records: Records
    gateway: Process
    workers: Sequence[Process]
    faults: list[Fault]
    others: Sequence[Process] = ()

    @property
    def processes(self) -> Sequence[Process]:
        return list(dict.fromkeys([self.gateway, *self.workers, *self.others]))

    async def revive(self) -> None:
        """Start whatever has ended, as a supervisor would, and end all pauses; returns when all of it is at work."""
        for process in self.processes:
            if process.is_alive:
                process.resume()
            else:
                process.start()
        for process in self.processes:
            await wait_until(partial(_is_at_work, process), START_SECONDS, what=f"{process.name} is at work")

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Start again whatever ends during a block."""
        supervisor = asyncio.create_task(self._supervise())
        try:
            yield
        finally:
            supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await supervisor

    async def _supervise(self) -> None:
        while True:
            await wait_until(
                lambda: not all(process.is_alive for process in self.processes), within=float("inf")
            )
            for process in self.processes:
                if not process.is_alive:
                    process.start()

    def worker_behind(self, port: int) -> Process | None:
        """Return the worker whose connection this is, if it lives."""
        return next((worker for worker in self.workers if worker.has_port(port)), None)

    def sender(self, call: Call) -> Process:
        """Return the worker that made a call."""
        worker = self.worker_behind(call.port)
        assert worker is not None
        return worker

    async def end(self) -> None:
        for process in self.processes:
            if process.is_alive:
                process.kill()


@dataclass
class OneProcess(Deployment):
    """`pilotflame dev`: every role in one process, on SQLite."""

    records: SQLiteRecords

    @contextmanager
    def database_locked(self) -> Iterator[None]:
        """Keep the process from writing, as a backup tool might."""
        fault = Fault("SQLite locked", time.time(), float("inf"))
        self.faults.append(fault)
        with self.records.locked():
            yield
        fault.ended_at = time.time()


@dataclass(frozen=True, slots=True)
class Ways:
    """Between processes and the servers that they ask: where answers can be lost, and requests can come late."""

    gateway_to_database: Proxy
    gateway_to_redis: Proxy
    worker_to_database: Proxy
    """The first worker's: the second one, and the scheduler, ask PostgreSQL directly."""


@dataclass(kw_only=True)
class ManyProcesses(Deployment):
    """What the Procfile names, with two workers, on PostgreSQL and Redis."""

    records: PostgreSQLRecords
    ways: Ways
    postgres: services.PostgreSQL
    redis: services.Redis

    @property
    def scheduler(self) -> Process:
        return self.others[0]

    def other_worker(self, than: Process) -> Process:
        return next(worker for worker in self.workers if worker is not than)

    @asynccontextmanager
    async def database_down(self) -> AsyncIterator[None]:
        """Have PostgreSQL crash, and start it again after the block."""
        fault = Fault("PostgreSQL killed", time.time(), float("inf"))
        self.faults.append(fault)
        async with _down(self.postgres):
            yield
        fault.ended_at = time.time()

    @asynccontextmanager
    async def late_requests(self, marker: bytes) -> AsyncIterator[None]:
        """Keep back, during a block, what the first worker asks of PostgreSQL from the request with `marker` on."""
        fault = Fault("worker-1 cut off", time.time(), float("inf"))
        self.faults.append(fault)
        self.ways.worker_to_database.keep_requests(marker)
        yield
        await self.ways.worker_to_database.kept_one()
        self.ways.worker_to_database.let_go()
        fault.ended_at = time.time()

    @asynccontextmanager
    async def redis_down(self) -> AsyncIterator[None]:
        """Have Redis crash, and start it again after the block."""
        async with _down(self.redis):
            yield

    @contextmanager
    def redis_paused(self) -> Iterator[None]:
        """Have Redis take what is sent, and answer nothing."""
        if self.redis.process_id is None:
            pytest.skip("the environment named this server: tests don't pause it")
        os.kill(self.redis.process_id, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.redis.process_id, signal.SIGCONT)


@asynccontextmanager
async def _down(server: services.Server) -> AsyncIterator[None]:
    await asyncio.to_thread(server.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


def _is_at_work(process: Process) -> bool:
    assert process.is_alive, process.log()
    return process.is_at_work


@asynccontextmanager
async def one_process(folder: Path, **settings: str) -> AsyncIterator[OneProcess]:
    url, environment = _environment(folder, settings)
    commands.output("migrate", given=environment)
    records = SQLiteRecords(folder / "pilotflame.db")
    await records.install()
    faults: list[Fault] = []
    dev = Process("dev", ["dev", "--port", environment["PILOTFLAME_PORT"]], environment, folder, faults)
    deployment = OneProcess(url, records, gateway=dev, workers=[dev], faults=faults)
    async with _alive(deployment):
        yield deployment


@asynccontextmanager
async def many_processes(
    folder: Path, postgres: services.PostgreSQL, redis: services.Redis, **settings: str
) -> AsyncIterator[ManyProcesses]:
    database_url = await postgres.create_database(f"system_{uuid4().hex}")
    servers = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    url, environment = _environment(folder, {**servers, **settings})
    commands.output("migrate", given=environment)
    records = PostgreSQLRecords(database_url)
    await records.install()
    faults: list[Fault] = []

    def process(name: str, role: str, **rerouted: str) -> Process:
        return Process(name, [role], {**environment, **rerouted}, folder, faults)

    async with (
        proxy.before(database_url) as gateway_to_database,
        proxy.before(redis.url) as gateway_to_redis,
        proxy.before(database_url) as worker_to_database,
    ):
        gateway_servers = {
            "PILOTFLAME_DATABASE_URL": gateway_to_database.in_front_of(database_url),
            "PILOTFLAME_REDIS_URL": gateway_to_redis.in_front_of(redis.url),
        }
        worker_servers = {"PILOTFLAME_DATABASE_URL": worker_to_database.in_front_of(database_url)}
        deployment = ManyProcesses(
            url=url,
            records=records,
            gateway=process("gateway", "gateway", **gateway_servers),
            workers=[process("worker-1", "worker", **worker_servers), process("worker-2", "worker")],
            others=[process("scheduler", "scheduler")],
            postgres=postgres,
            redis=redis,
            ways=Ways(gateway_to_database, gateway_to_redis, worker_to_database),
            faults=faults,
        )
        async with _alive(deployment):
            yield deployment


@asynccontextmanager
async def _alive(deployment: Deployment) -> AsyncIterator[None]:
    try:
        await deployment.revive()
        yield
    finally:
        await deployment.end()


def _environment(folder: Path, settings: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the gateway's URL, and the environment of every process; settings are named without `PILOTFLAME_`."""
    port = _free_port()
    given = {
        "SECRET_KEY": "a secret for tests, and long enough to be one",
        "BOOTSTRAP_API_KEY": API_KEY,
        "PORT": str(port),
        "LEASE_SECONDS": str(LEASE_SECONDS),
        "SWEEP_SECONDS": str(SWEEP_SECONDS),
        "OUTBOUND_ALLOWED_NETWORKS": "127.0.0.1/32",
        **settings,
    }
    return f"http://127.0.0.1:{port}", commands.environment(folder, **given)


def _free_port() -> int:
    """Return a port that nobody gets while the gateway is down: it must find it free when it starts again."""
    while True:
        port = random.choice(services.PORTS)
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
