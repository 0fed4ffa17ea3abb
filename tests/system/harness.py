"""Pilotflame as deployed: real processes on real servers, with controls for every fault."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from uuid import uuid4

import pytest

from tests import command_runs, databases, services
from tests.system import proxy
from tests.system.client import API_KEY
from tests.system.journal_records import JournalRecords, PostgresJournalRecords, SqliteJournalRecords
from tests.system.processes import InjectedFault, SystemProcess, find_sockets
from tests.system.wait_conditions import wait_until

if TYPE_CHECKING:
    from tests.preloads import ShiftedClock
    from tests.system.ledger import LedgerCall
    from tests.system.proxy import FaultyProxy

LEASE_SECONDS = 2.0
SWEEP_SECONDS = 1.0
RECOVERY_SECONDS = LEASE_SECONDS + SWEEP_SECONDS + 30.0
"""Within this time after a crash, interrupted work continues, even if other tests keep the machine busy."""
START_SECONDS = 120.0
"""Within this time a process is at work, also on a machine that other work keeps busy."""

COMMAND = command_runs.COMMAND

Migration: TypeAlias = Callable[[Mapping[str, str]], Awaitable[None]]
"""Makes the tables of a new database, with the environment of the processes."""

on_one_process = pytest.mark.parametrize("shared_deployment", ["sqlite"], indirect=True)
on_many_processes = pytest.mark.parametrize("shared_deployment", ["postgresql"], indirect=True)
"""For faults that the other kind of deployment can't have."""

CLAIMING = "-claiming"
"""Ends the names of deployments whose workers claim all runs: gateways send them none."""
on_both_run_paths = pytest.mark.parametrize(
    "shared_deployment", ["sqlite", f"postgresql{CLAIMING}"], indirect=True
)
on_many_processes_and_both_run_paths = pytest.mark.parametrize(
    "shared_deployment", ["postgresql", f"postgresql{CLAIMING}"], indirect=True
)
"""For faults that runs must survive whether they go straight to a worker or are claimed."""

TWO_GATEWAYS = "postgresql-two-gateways"
WITHOUT_REDIS = "postgresql-alone"
on_all_deployments = pytest.mark.parametrize(
    "shared_deployment",
    ["sqlite", TWO_GATEWAYS, pytest.param(WITHOUT_REDIS, marks=pytest.mark.thorough)],
    indirect=True,
)
"""For what must hold with a second gateway, and with PostgreSQL in place of Redis, too."""


@dataclass
class SystemUnderTest:
    """Deployment with its processes, and the faults that were injected into it."""

    url: str
    records: JournalRecords
    gateway: SystemProcess
    workers: Sequence[SystemProcess]
    faults: list[InjectedFault]
    others: Sequence[SystemProcess] = ()
    other_urls: Sequence[str] = ()
    """Addresses of further gateways, to which clients send every other request."""

    @property
    def processes(self) -> Sequence[SystemProcess]:
        return list(dict.fromkeys([self.gateway, *self.workers, *self.others]))

    async def revive(self, within: float = START_SECONDS) -> None:
        """Restart ended processes like a supervisor, and end all pauses; return when all are ready.

        Raises TimeoutError after `within` seconds.
        """
        for process in self.processes:
            if process.is_alive:
                process.resume()
            else:
                process.start()
        for process in self.processes:
            await wait_until(partial(_is_starting, process), within, what=f"{process.name} is at work")

    def pause(self) -> None:
        """Pause every process; `revive` continues them."""
        for process in self.processes:
            process.pause()

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Restart every process that ends during the block."""
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
                process.ensure_started()

    @contextmanager
    def noted_fault(self, name: str) -> Iterator[None]:
        """Record a fault of the database that lasts for the block."""
        fault = InjectedFault(name, time.time(), float("inf"))
        self.faults.append(fault)
        try:
            yield
        finally:
            fault.ended_at = time.time()

    def worker_behind(self, port: int) -> SystemProcess | None:
        """Return the live worker that has a connection with this local port; None without one."""
        sockets = find_sockets(port)
        return next((worker for worker in self.workers if worker.has_socket(sockets)), None)

    def sender(self, call: LedgerCall) -> SystemProcess:
        """Return the worker that made a call to the ledger; fails if it doesn't live."""
        worker = self.worker_behind(call.port)
        assert worker is not None
        return worker

    def kill_processes(self) -> None:
        """Kill every live process; `revive` starts them again."""
        for process in self.processes:
            if process.is_alive:
                process.kill()


@dataclass
class OneProcess(SystemUnderTest):
    """`pilotflame dev`: every role in one process, on SQLite."""

    records: SqliteJournalRecords

    @contextmanager
    def database_locked(self) -> Iterator[None]:
        """Lock the database against writes during the block, as a backup tool might."""
        fault = InjectedFault("SQLite locked", time.time(), float("inf"))
        self.faults.append(fault)
        with self.records.locked():
            yield
        fault.ended_at = time.time()


@dataclass(frozen=True, slots=True)
class FaultyLinks:
    """Links between processes and their servers, which can lose answers and delay requests."""

    gateway_to_database: FaultyProxy
    gateway_to_redis: FaultyProxy
    worker_to_database: FaultyProxy
    """Link of the first worker. The second worker and the scheduler connect to PostgreSQL directly."""

    def mend(self) -> None:
        """Let all links pass traffic again, also that which is held back."""
        for link in (self.gateway_to_database, self.gateway_to_redis, self.worker_to_database):
            link.reconnect()
            link.let_go()


@dataclass(kw_only=True)
class ManyProcesses(SystemUnderTest):
    """Processes of the Procfile, with two workers, on PostgreSQL and Redis."""

    records: PostgresJournalRecords
    ways: FaultyLinks
    postgres: services.PostgresServer
    redis: services.RedisServer

    @property
    def scheduler(self) -> SystemProcess:
        return self.others[0]

    def other_worker(self, than: SystemProcess) -> SystemProcess:
        return next(worker for worker in self.workers if worker is not than)

    @asynccontextmanager
    async def database_down(self) -> AsyncIterator[None]:
        """Kill PostgreSQL, and restart it after the block."""
        fault = InjectedFault("PostgreSQL killed", time.time(), float("inf"))
        self.faults.append(fault)
        async with _take_down(self.postgres):
            yield
        fault.ended_at = time.time()

    @asynccontextmanager
    async def late_requests(self, marker: bytes) -> AsyncIterator[None]:
        """Hold back the first worker's requests to PostgreSQL during the block, from the request with `marker` on."""
        fault = InjectedFault("worker-1 cut off", time.time(), float("inf"))
        self.faults.append(fault)
        self.ways.worker_to_database.keep_requests(marker)
        yield
        await self.ways.worker_to_database.kept_one()
        self.ways.worker_to_database.let_go()
        fault.ended_at = time.time()

    @asynccontextmanager
    async def redis_down(self) -> AsyncIterator[None]:
        """Kill Redis, and restart it after the block."""
        async with _take_down(self.redis):
            yield

    @contextmanager
    def redis_paused(self) -> Iterator[None]:
        """Stop Redis during the block, so that it accepts requests without answering."""
        if self.redis.process_id is None:
            pytest.skip("the environment named this server: tests don't pause it")
        os.kill(self.redis.process_id, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.redis.process_id, signal.SIGCONT)


@asynccontextmanager
async def _take_down(server: services.TestedServer) -> AsyncIterator[None]:
    await asyncio.to_thread(server.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


def _is_starting(process: SystemProcess) -> bool:
    """Start a process unless it lives, and return whether it is at work."""
    process.ensure_started()
    return process.is_at_work


def _is_at_work(process: SystemProcess) -> bool:
    assert process.is_alive, process.log()
    return process.is_at_work


@asynccontextmanager
async def run_one_process(
    folder: Path,
    preload: Mapping[str, str] | None = None,
    migrate: Migration | None = None,
    /,
    **settings: str,
) -> AsyncIterator[OneProcess]:
    """Run `pilotflame dev` on SQLite during the block.

    `preload` is added to its environment, and `migrate` creates its tables.
    """
    url, environment = _build_environment(folder, settings)
    environment |= preload or {}
    if migrate is None:
        await databases.create_sqlite_database(folder / "pilotflame.db")
    else:
        await migrate(environment)
    records = SqliteJournalRecords(folder / "pilotflame.db")
    await records.install()
    faults: list[InjectedFault] = []
    dev = SystemProcess("dev", ["dev", "--port", environment["PILOTFLAME_PORT"]], environment, folder, faults)
    deployment = OneProcess(url, records, gateway=dev, workers=[dev], faults=faults)
    async with _keep_alive(deployment):
        yield deployment


@asynccontextmanager
async def run_many_processes(
    folder: Path,
    postgres: services.PostgresServer,
    redis: services.RedisServer,
    clocks: Mapping[str, ShiftedClock] | None = None,
    migrate: Migration | None = None,
    /,
    **settings: str,
) -> AsyncIterator[ManyProcesses]:
    """Run gateway, two workers and a scheduler on PostgreSQL and Redis, behind faulty links, during the block.

    `clocks` shift the wall clocks of processes, by name, and `migrate` creates the tables.
    """
    name = f"system_{uuid4().hex}"
    if migrate is None:
        database_url = await databases.create_database(postgres, name)
    else:
        database_url = await postgres.create_database(name)
    servers = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    url, environment = _build_environment(folder, {**servers, **settings})
    if migrate is not None:
        await migrate(environment)
    records = PostgresJournalRecords(database_url)
    await records.install()
    faults: list[InjectedFault] = []

    def process(name: str, role: str, **rerouted: str) -> SystemProcess:
        shifted = clocks[name].environment if clocks and name in clocks else {}
        return SystemProcess(name, [role], {**environment, **rerouted, **shifted}, folder, faults)

    async with (
        proxy.run_proxy(database_url) as gateway_to_database,
        proxy.run_proxy(redis.url) as gateway_to_redis,
        proxy.run_proxy(database_url) as worker_to_database,
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
            ways=FaultyLinks(gateway_to_database, gateway_to_redis, worker_to_database),
            faults=faults,
        )
        async with _keep_alive(deployment):
            yield deployment


@asynccontextmanager
async def run_on_postgresql(
    folder: Path, postgres: services.PostgresServer, redis: services.RedisServer | None, *, gateways: int
) -> AsyncIterator[SystemUnderTest]:
    """Run processes of the Procfile with two workers and so many gateways; without Redis, on PostgreSQL alone."""
    database_url = await databases.create_database(postgres, f"system_{uuid4().hex}")
    servers = {"DATABASE_URL": database_url} | ({} if redis is None else {"REDIS_URL": redis.url})
    url, environment = _build_environment(folder, servers)
    records = PostgresJournalRecords(database_url)
    await records.install()
    faults: list[InjectedFault] = []

    def process(name: str, role: str, **changed: str) -> SystemProcess:
        return SystemProcess(name, [role], {**environment, **changed}, folder, faults)

    ports = [str(services.reserve_port()) for _ in range(gateways - 1)]
    further = [
        process(f"gateway-{number}", "gateway", PILOTFLAME_PORT=port) for number, port in enumerate(ports, 2)
    ]
    deployment = SystemUnderTest(
        url=url,
        records=records,
        gateway=process("gateway", "gateway"),
        workers=[process("worker-1", "worker"), process("worker-2", "worker")],
        others=[process("scheduler", "scheduler"), *further],
        other_urls=[f"http://127.0.0.1:{port}" for port in ports],
        faults=faults,
    )
    async with _keep_alive(deployment):
        yield deployment


@asynccontextmanager
async def _keep_alive(deployment: SystemUnderTest) -> AsyncIterator[None]:
    """Start the processes of a deployment for the block, and kill them after it."""
    try:
        await deployment.revive()
        yield
    finally:
        deployment.records.close()
        deployment.kill_processes()


def _build_environment(folder: Path, settings: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the gateway's URL, and the environment of every process; settings are named without `PILOTFLAME_`."""
    port = services.reserve_port()
    given = {
        "SECRET_KEY": "a secret for tests, and long enough to be one",
        "BOOTSTRAP_API_KEY": API_KEY,
        "PORT": str(port),
        "PUBLIC_URL": f"http://127.0.0.1:{port}",
        "LEASE_SECONDS": str(LEASE_SECONDS),
        "SWEEP_SECONDS": str(SWEEP_SECONDS),
        "OUTBOUND_ALLOWED_NETWORKS": "127.0.0.1/32",
        **settings,
    }
    return f"http://127.0.0.1:{port}", command_runs.command_environment(folder, **given)
