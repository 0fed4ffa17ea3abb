"""Faults of the matrix: a row is the part that fails, a column how it fails."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
from redis.asyncio import Redis

from benchmarks.faults import fault_load, task_worker, upgrades
from benchmarks.faults.faulty_system import FaultCell, FaultySystem, PromiseBroken, Strike
from docs.tables import ROOT
from tests.system.client import API_KEY
from tests.system.harness import ManyProcesses
from tests.system.processes import find_sockets
from tests.system.wait_conditions import wait_until

if TYPE_CHECKING:
    from tests.system.client import RetryingClient
    from tests.system.ledger import EffectLedger, LedgerCall
    from tests.system.processes import SystemProcess

LEASE_SECONDS: Final = 10.0
SWEEP_SECONDS: Final = 2.0
"""Defaults of the product."""
LOSS_SECONDS: Final = 15.0
"""Published bound: lease and sweep, with their jitter."""
FREEZE_SECONDS: Final = LEASE_SECONDS + 3.0
OUTAGE_SECONDS: Final = 3.0
LATENCY_SECONDS: Final = 0.15
HOUR: Final = 3_600.0
START_SECONDS: Final = 180.0
"""Time for the start of a process on a machine that other work keeps busy."""
WORK_SECONDS: Final = 20.0
CALL_SECONDS: Final = 0.15
"""Age of a call whose node is certain to be in progress."""
LONG_CALL_SECONDS: Final = 1.0
"""Delay of the ledger's answers during which two workers are certain to perform the same node."""


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────


def _gateway(system: FaultySystem) -> SystemProcess:
    return system.deployment.gateway


def _worker(system: FaultySystem) -> SystemProcess:
    return system.deployment.workers[0]


def _scheduler(system: FaultySystem) -> SystemProcess:
    return system.many.scheduler


async def _wait_for_work(
    system: FaultySystem, process: SystemProcess, node_id: str | None = None
) -> LedgerCall | None:
    """Wait until a node of a worker's execution, any or that with an id, calls the ledger, or some seconds if
    none does; then set `struck_at`, and return the call.
    """
    ledger = system.ledger
    if ledger is None or process not in system.deployment.workers:
        return None

    call, until = None, time.monotonic() + WORK_SECONDS
    while call is None and time.monotonic() < until:
        await asyncio.sleep(CALL_SECONDS)
        since = time.time() - CALL_SECONDS
        recent = [
            call for call in ledger.calls[-10:] if call.arrived_at > since and node_id in {None, call.node_id}
        ]
        # In a thread, and seldom: the links of the deployment share this event loop.
        call = await asyncio.to_thread(_find_call, process, recent)
    system.struck_at = time.time()
    return call


def _find_call(process: SystemProcess, calls: Sequence[LedgerCall]) -> LedgerCall | None:
    """Return the first of the calls that a connection of the process has made."""
    return next((call for call in calls if process.has_socket(find_sockets(call.port))), None)


Target = Callable[[FaultySystem], "SystemProcess"]


def _kill(target: Target, seconds: float = 0.0) -> Strike:
    async def strike(system: FaultySystem) -> None:
        await _wait_for_work(system, target(system))
        target(system).kill()
        await asyncio.sleep(seconds)  # the machine is gone for so long
        target(system).ensure_started()

    return strike


def _freeze(target: Target, seconds: float) -> Strike:
    async def strike(system: FaultySystem) -> None:
        await _wait_for_work(system, target(system))
        with target(system).paused():
            await asyncio.sleep(seconds)

    return strike


def _restart(target: Target) -> Strike:
    async def strike(system: FaultySystem) -> None:
        await _wait_for_work(system, target(system))
        target(system).terminate()
        await target(system).exit_code()
        target(system).ensure_started()

    return strike


def _move_back(*names: str) -> Strike:
    async def strike(system: FaultySystem) -> None:
        for name in names:
            system.clocks[name].set(-HOUR)
        try:
            await asyncio.sleep(OUTAGE_SECONDS)
        finally:
            for name in names:
                system.clocks[name].set(0)

    return strike


# ── task workers ──────────────────────────────────────────────────────────────────────────────────────────


async def _freeze_task_worker(system: FaultySystem) -> None:
    """Freeze a task worker, with a task in progress and a poll open, until another worker has got both tasks.

    The second task is committed, and the first one in progress, when the frozen worker goes on: it must neither begin
    the one nor complete the other.
    """
    load, ledger = system.load, system.ledger
    assert load is not None
    assert ledger is not None
    begun, polled = [await fault_load.create_step(load.client, ledger, name) for name in ("begun", "polled")]
    with _task_worker(system) as frozen:
        with ledger.holding("begun") as requests:
            begun_id = await load.start(begun)
            await requests.next_call()
            await asyncio.sleep(CALL_SECONDS)  # the next poll is open
            frozen.send_signal(signal.SIGSTOP)
        system.struck_at = time.time()
        with system.deployment.noted_fault("task worker frozen"), ledger.holding("begun") as requests:
            polled_id = await load.start(polled)
            await wait_until(partial(_is_leased, load.client, polled_id), what="the open poll gets a task")
            with _task_worker(system):
                await load.client.end(polled_id)
                repetition = await requests.next_call()
                frozen.send_signal(signal.SIGCONT)
                await asyncio.sleep(OUTAGE_SECONDS)  # the result of the frozen worker arrives
                requests.release()
                ended = await load.client.end(begun_id)
        if ended.outputs["begun"]["body"]["receipt"] != repetition.receipt:
            raise PromiseBroken("P2", f"{begun_id} has the result of a task worker without the lease")
        await load.client.end(await load.start(polled))  # the frozen worker is alone, and goes on


@contextmanager
def _task_worker(system: FaultySystem) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"PILOTFLAME_URL": system.deployment.url, "PILOTFLAME_API_KEY": API_KEY}
    server = system.deployment.gateway.environment
    # Without the same mechanism as the server.
    environment |= {
        name: server[name] for name in ("PYTHONPATH", "PILOTFLAME_FAULTS_WITHOUT") if name in server
    }
    command = [sys.executable, "-m", task_worker.__name__]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def _is_leased(client: RetryingClient, execution_id: str) -> bool:
    answer = await client.answer("GET", f"/tasks?executionId={execution_id}&state=leased")
    return bool(answer.json()["count"])


# ── links ─────────────────────────────────────────────────────────────────────────────────────────────────


def _cut_off(*names: str, seconds: float = OUTAGE_SECONDS) -> Strike:
    async def strike(system: FaultySystem) -> None:
        proxies = [getattr(system.many.ways, name) for name in names]
        for proxy in proxies:
            proxy.cut_off()
        try:
            await asyncio.sleep(seconds)
        finally:
            for proxy in proxies:
                proxy.reconnect()

    return strike


def _slow_down(*names: str) -> Strike:
    async def strike(system: FaultySystem) -> None:
        proxies = [getattr(system.many.ways, name) for name in names]
        for proxy in proxies:
            proxy.delay_seconds = LATENCY_SECONDS
        try:
            await asyncio.sleep(2 * OUTAGE_SECONDS)
        finally:
            for proxy in proxies:
                proxy.delay_seconds = 0.0

    return strike


def _hold_traffic(*names: str) -> Strike:
    async def strike(system: FaultySystem) -> None:
        proxies = [getattr(system.many.ways, name) for name in names]
        for proxy in proxies:
            proxy.keep_answers(b"")
        try:
            await asyncio.sleep(FREEZE_SECONDS)
        finally:
            for proxy in proxies:
                proxy.let_go()

    return strike


async def _delay_result(system: FaultySystem) -> None:
    """Hold back a result of the first worker until another worker is in the middle of its node, then let it arrive."""
    ledger = system.ledger
    assert ledger is not None
    usual_seconds, ledger.delay_seconds = ledger.delay_seconds, LONG_CALL_SECONDS
    try:
        call = await _wait_for_work(system, _worker(system), "look")  # other nodes follow it
        if call is None:
            raise TimeoutError("the first worker performs no node `look`")
        # In the literal of an array, quotes are escaped.
        async with system.many.late_requests(rf"\"receipt\":{call.receipt}".encode()):
            await wait_until(partial(_is_repeated, ledger, call), what="another worker repeats the node")
    finally:
        system.many.ways.mend()
        ledger.delay_seconds = usual_seconds


def _is_repeated(ledger: EffectLedger, call: LedgerCall) -> bool:
    node = call.execution_id, call.node_id
    return sum((other.execution_id, other.node_id) == node for other in ledger.calls) > 1


async def _break_connections(system: FaultySystem) -> None:
    ways = system.many.ways
    for _ in range(5):
        for way in (ways.gateway_to_database, ways.gateway_to_redis, ways.worker_to_database):
            way.cut()
        await asyncio.sleep(OUTAGE_SECONDS / 5)


# ── servers ───────────────────────────────────────────────────────────────────────────────────────────────


async def _kill_redis(system: FaultySystem) -> None:
    async with system.many.redis_down():
        await asyncio.sleep(OUTAGE_SECONDS)


async def _freeze_redis(system: FaultySystem) -> None:
    with system.many.redis_paused():
        await asyncio.sleep(FREEZE_SECONDS)


async def _fill_redis(system: FaultySystem) -> None:
    async with Redis.from_url(system.many.redis.url) as server:
        await server.config_set("maxmemory", "1mb")
        await asyncio.sleep(2 * OUTAGE_SECONDS)
        await server.config_set("maxmemory", "0")


async def _restart_redis(system: FaultySystem) -> None:
    await asyncio.to_thread(system.many.redis.restart)


async def _restore_old_redis(system: FaultySystem) -> None:
    """Restart Redis on the files that it had some seconds before, so that it loses the changes since."""
    folder = system.redis_folder
    assert folder is not None
    kept = folder.with_name(f"{folder.name}-kept")
    shutil.copytree(folder, kept)
    await asyncio.sleep(OUTAGE_SECONDS)
    async with system.many.redis_down():
        for path in folder.glob("appendonlydir/*"):
            path.unlink()
        shutil.copytree(kept / "appendonlydir", folder / "appendonlydir", dirs_exist_ok=True)
        for path in (folder / "appendonlydir", *folder.glob("appendonlydir/*")):
            shutil.chown(path, *_owner_of(folder))
        shutil.rmtree(kept)


def _owner_of(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


async def _kill_postgres(system: FaultySystem) -> None:
    async with system.many.database_down():
        await asyncio.sleep(OUTAGE_SECONDS)


@contextmanager
def _stopped(process_id: int | None) -> Iterator[None]:
    """Stop a server and its children by SIGSTOP during the block."""
    assert process_id is not None
    server = psutil.Process(process_id)
    family = [server, *server.children(recursive=True)]
    for process in family:
        _signal(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in (*family, *server.children(recursive=True)):
            _signal(process, signal.SIGCONT)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # a session that ended meanwhile
        os.kill(process.pid, number)


async def _freeze_postgres(system: FaultySystem) -> None:
    with system.deployment.noted_fault("PostgreSQL paused"), _stopped(system.many.postgres.process_id):
        await asyncio.sleep(FREEZE_SECONDS)


async def _fill_postgres(system: FaultySystem) -> None:
    """Let every write of PostgreSQL fail, so that it ends, and start it again once the disk has room."""
    server = system.many.postgres
    with system.deployment.noted_fault("PostgreSQL full"):
        with system.disk.full():
            await asyncio.sleep(OUTAGE_SECONDS)
        await asyncio.to_thread(_start_again, system)
    assert server.process_id is not None


def _start_again(system: FaultySystem) -> None:
    """Start PostgreSQL, after killing it if it still lives."""
    server = system.many.postgres
    if server.is_alive:
        server.kill()
    server.start()


async def _restart_postgres(system: FaultySystem) -> None:
    with system.deployment.noted_fault("PostgreSQL restarted"):
        await asyncio.to_thread(system.many.postgres.restart)


# ── dev ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _lock_file(system: FaultySystem) -> None:
    with system.one.database_locked():
        await asyncio.sleep(OUTAGE_SECONDS)


async def _fill_disk(system: FaultySystem) -> None:
    with system.deployment.noted_fault("disk full"), system.disk.full():
        await asyncio.sleep(OUTAGE_SECONDS)


async def _slow_disk(system: FaultySystem) -> None:
    with system.disk.slow():
        await asyncio.sleep(2 * OUTAGE_SECONDS)


async def _kill_often(system: FaultySystem) -> None:
    for _ in range(3):
        _gateway(system).kill()
        _gateway(system).ensure_started()
        await wait_until(lambda: _gateway(system).is_at_work)
        await asyncio.sleep(1)


# ── versions ──────────────────────────────────────────────────────────────────────────────────────────────


async def _upgrade(system: FaultySystem) -> None:
    """Migrate the tables, then restart one process after another with this version."""
    if isinstance(system.deployment, ManyProcesses):
        await upgrades.migrate(upgrades.with_own_code(system.deployment.gateway.environment))
    await _restart_all(system, None)


async def _roll_back(system: FaultySystem) -> None:
    """Restart one process after another with the previous version, on the tables of this one."""
    await _restart_all(system, system.previous)


async def _restart_all(system: FaultySystem, code: Path | None) -> None:
    for process in system.deployment.processes:
        await upgrades.restart_with(process, code)
        await wait_until(partial(_is_at_work, process), START_SECONDS, what=f"{process.name} is at work")


def _is_at_work(process: SystemProcess) -> bool:
    return process.is_at_work


DATABASE_LINKS: Final = ("gateway_to_database", "worker_to_database")
ALL_LINKS: Final = (*DATABASE_LINKS, "gateway_to_redis")
PROCESS_NAMES: Final = ("gateway", "worker-1", "worker-2", "scheduler")


def list_cells() -> Sequence[FaultCell]:
    """Return every fault of the matrix, row by row."""
    lost = LOSS_SECONDS
    return [
        FaultCell("gateway", "killed", _kill(_gateway, 1.0), is_quick=True),
        FaultCell("gateway", "frozen", _freeze(_gateway, 2 * OUTAGE_SECONDS)),
        FaultCell("gateway", "cut off", _cut_off("gateway_to_database", "gateway_to_redis")),
        FaultCell("gateway", "slow", _slow_down("gateway_to_database", "gateway_to_redis")),
        FaultCell("gateway", "restarted", _restart(_gateway)),
        FaultCell("gateway", "moved back", _move_back("gateway")),
        FaultCell("worker", "killed", _kill(_worker, LEASE_SECONDS + 6), recovery_bound=lost, is_quick=True),
        FaultCell("worker", "frozen", _freeze(_worker, FREEZE_SECONDS), recovery_bound=lost, is_quick=True),
        FaultCell("worker", "late", _delay_result, recovery_bound=lost, is_quick=True),
        FaultCell(
            "worker", "cut off", _cut_off("worker_to_database", seconds=FREEZE_SECONDS), recovery_bound=lost
        ),
        FaultCell("worker", "slow", _slow_down("worker_to_database")),
        FaultCell("worker", "restarted", _restart(_worker)),
        FaultCell("worker", "moved back", _move_back("worker-1", "worker-2")),
        FaultCell("task worker", "frozen", _freeze_task_worker, is_quick=True),
        FaultCell("scheduler", "killed", _kill(_scheduler, OUTAGE_SECONDS)),
        FaultCell("scheduler", "frozen", _freeze(_scheduler, FREEZE_SECONDS)),
        FaultCell("scheduler", "restarted", _restart(_scheduler)),
        FaultCell("scheduler", "moved back", _move_back("scheduler")),
        FaultCell("Redis", "killed", _kill_redis, is_quick=True),
        FaultCell("Redis", "frozen", _freeze_redis),
        FaultCell("Redis", "cut off", _cut_off("gateway_to_redis")),
        FaultCell("Redis", "slow", _slow_down("gateway_to_redis")),
        FaultCell("Redis", "full", _fill_redis),
        FaultCell("Redis", "restarted", _restart_redis),
        FaultCell("Redis", "moved back", _restore_old_redis),
        FaultCell("PostgreSQL", "killed", _kill_postgres, is_quick=True),
        FaultCell("PostgreSQL", "frozen", _freeze_postgres),
        FaultCell("PostgreSQL", "cut off", _cut_off(*DATABASE_LINKS)),
        FaultCell("PostgreSQL", "slow", _slow_down(*DATABASE_LINKS)),
        FaultCell("PostgreSQL", "full", _fill_postgres),
        FaultCell("PostgreSQL", "restarted", _restart_postgres),
        FaultCell("network", "frozen", _hold_traffic(*ALL_LINKS)),
        FaultCell("network", "cut off", _cut_off(*ALL_LINKS)),
        FaultCell("network", "slow", _slow_down(*ALL_LINKS)),
        FaultCell("network", "restarted", _break_connections, is_quick=True),
        FaultCell("clock", "moved back", _move_back(*PROCESS_NAMES), is_quick=True),
        FaultCell("disk", "slow", _slow_disk),
        FaultCell("disk", "full", _fill_disk),
        FaultCell("dev", "killed", _kill_often, is_quick=True),
        FaultCell("dev", "frozen", _freeze(_gateway, FREEZE_SECONDS)),
        FaultCell("dev", "cut off", _lock_file),
        FaultCell("dev", "restarted", _restart(_gateway)),
        FaultCell("dev", "moved back", _move_back("dev"), witness_shift=-HOUR),
        FaultCell("upgrade", "restarted", _upgrade),
        FaultCell("roll-back", "restarted", _roll_back),
        FaultCell("dev upgrade", "restarted", _upgrade),
        FaultCell("dev roll-back", "restarted", _roll_back),
    ]
