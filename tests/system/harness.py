"""Pilotflame as it is deployed: real processes on real servers, and everything that can be done to them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from tests import commands, databases, services
from tests.system import proxy
from tests.system.client import API_KEY
from tests.system.moments import wait_until
from tests.system.processes import Fault, Process
from tests.system.witness import PostgreSQLRecords, Records, SQLiteRecords

if TYPE_CHECKING:
    from tests.preloads import ShiftedClock
    from tests.system.ledger import Call
    from tests.system.proxy import Proxy

LEASE_SECONDS = 2.0
SWEEP_SECONDS = 1.0
RECOVERY_SECONDS = LEASE_SECONDS + SWEEP_SECONDS + 30.0
"""Within this time of a crash whatever it interrupted goes on, however busy the machine is with other tests."""
START_SECONDS = 60.0

COMMAND = commands.COMMAND

on_one_process = pytest.mark.parametrize("shared_deployment", ["sqlite"], indirect=True)
on_many_processes = pytest.mark.parametrize("shared_deployment", ["postgresql"], indirect=True)
"""For what can't be done to the other kind of deployment, or not by it."""


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
            await wait_until(partial(_comes_up, process), START_SECONDS, what=f"{process.name} is at work")

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


def _comes_up(process: Process) -> bool:
    """Tell whether a process is at work; one that was told to end, and only now does so, is started once more."""
    if not process.is_alive:
        process.start()
    return process.is_at_work


def _is_at_work(process: Process) -> bool:
    assert process.is_alive, process.log()
    return process.is_at_work


@asynccontextmanager
async def one_process(
    folder: Path, preload: Mapping[str, str] | None = None, /, **settings: str
) -> AsyncIterator[OneProcess]:
    """Run it; `preload` is what else stands in its environment."""
    url, environment = _environment(folder, settings)
    environment |= preload or {}
    await databases.migrated_file(folder / "pilotflame.db")
    records = SQLiteRecords(folder / "pilotflame.db")
    await records.install()
    faults: list[Fault] = []
    dev = Process("dev", ["dev", "--port", environment["PILOTFLAME_PORT"]], environment, folder, faults)
    deployment = OneProcess(url, records, gateway=dev, workers=[dev], faults=faults)
    async with _alive(deployment):
        yield deployment


@asynccontextmanager
async def many_processes(
    folder: Path,
    postgres: services.PostgreSQL,
    redis: services.Redis,
    clocks: Mapping[str, ShiftedClock] | None = None,
    **settings: str,
) -> AsyncIterator[ManyProcesses]:
    """Run them; `clocks` are those of processes whose wall clock is wrong, by the names of the processes."""
    database_url = await databases.migrated(postgres, f"system_{uuid4().hex}")
    servers = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    url, environment = _environment(folder, {**servers, **settings})
    records = PostgreSQLRecords(database_url)
    await records.install()
    faults: list[Fault] = []

    def process(name: str, role: str, **rerouted: str) -> Process:
        shifted = clocks[name].environment if clocks and name in clocks else {}
        return Process(name, [role], {**environment, **rerouted, **shifted}, folder, faults)

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
    port = services.free_port()
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
