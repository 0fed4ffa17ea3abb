"""Workers that die during runs: their runs continue before their leases expire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.run_records import NodeSpan, SpanStatus
from tests import command_runs, services
from tests.command_runs import RunningCommand, command_environment
from tests.http_receiver import HttpReceiver, run_receiver
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    open_run_database,
    write,
)
from workers import lost_worker_leases
from workers.settings import WorkerSettings

PATIENCE_SECONDS = 60.0
DEATH_SECONDS = 20.0
"""Far more than a process needs to die with its parent."""
LEASE_SECONDS = 600.0
NOON = datetime(2025, 1, 15, 12, tzinfo=UTC)
KILLED = 137


@dataclass(frozen=True)
class LostWorkerHarness:
    """Workers on one database, and a server that their runs wait for."""

    run_database: RunDatabase
    owned_workflow: OwnedWorkflow
    receiver: HttpReceiver
    stack: ExitStack
    given: dict[str, str]
    folder: Path

    def worker(self, number: int) -> RunningCommand:
        """Start a worker that executes one run at a time; all workers have the same name."""
        log = self.folder / f"{number}.log"
        started = self.stack.enter_context(command_runs.run_command("worker", given=self.given, log=log))
        started.says("worker ready")
        return started

    async def held_run(self) -> str:
        """Accept a run, and return its id once a worker is in the middle of it."""
        node = {"url": self.receiver.url(), "method": "POST"}
        definition = {
            "nodes": [
                {"id": "start", "type": "manual"},
                {"id": "post", "type": "http-request", "config": node},
            ],
            "connections": [{"id": "1", "source": "start", "target": "post"}],
            "settings": {},
        }
        before = len(self.receiver.received)
        key = await self.run_database.accept(self.owned_workflow, definition=json.dumps(definition))
        await self.happens(lambda: len(self.receiver.received) > before)
        return key.execution_id

    async def happens(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():  # noqa: ASYNC110 - of other processes, which set no event of ours
                await asyncio.sleep(0.02)

    async def row(self, execution_id: str) -> dict[str, Any]:
        return await self.run_database.row(execution_id)


@asynccontextmanager
async def run_workers(
    migrated_database: MigratedDatabase, redis: services.RedisServer, folder: Path
) -> AsyncIterator[LostWorkerHarness]:
    given = command_environment(
        folder,
        DATABASE_URL=migrated_database.url,
        REDIS_URL=redis.url,
        SECRET_KEY="a secret for tests, and long enough to be one",
        OUTBOUND_ALLOWED_NETWORKS="127.0.0.1/32",
        LEASE_SECONDS=str(LEASE_SECONDS),
        SWEEP_SECONDS="0.2",
        CONCURRENCY="1",
        WORKER_NAME="of-this-test",
    )
    async with open_run_database(migrated_database) as run_database, run_receiver() as receiver:
        with ExitStack() as stack:
            receiver.may_answer.clear()
            yield LostWorkerHarness(
                run_database, await run_database.workflow(), receiver, stack, given, folder
            )


def child_process(worker: RunningCommand) -> psutil.Process:
    (child,) = psutil.Process(worker.process.pid).children()
    return child


async def test_the_parent_of_a_killed_worker_releases_its_leases_and_no_others(
    on_postgres: MigratedDatabase, redis_server: services.RedisServer, tmp_path: Path
) -> None:
    async with run_workers(on_postgres, redis_server, tmp_path) as here:
        worker = here.worker(1)
        run = await here.held_run()
        await here.run_database.accept(here.owned_workflow)
        (others,) = await here.run_database.claim(owner="worker:of-this-test/another-process")
        before = await here.row(run)

        child_process(worker).kill()
        assert worker.ends() == KILLED
        after = await here.row(run)
        assert (after["status"], after["attempt"], after["lease_owner"]) == ("pending", 1, None)
        assert after["token"] > before["token"]
        assert (await here.row(others.execution_id))["status"] == "running"


async def test_a_worker_ends_with_its_parent_and_hands_over_when_that_is_asked_to_end(
    on_postgres: MigratedDatabase, redis_server: services.RedisServer, tmp_path: Path
) -> None:
    async with run_workers(on_postgres, redis_server, tmp_path) as here:
        killed, stopped = here.worker(1), here.worker(2)
        children = [child_process(worker) for worker in (killed, stopped)]
        killed.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children[:1], timeout=DEATH_SECONDS)
        for orphan in alive:
            orphan.kill()  # no other process would end it
        assert not alive, "it outlives its parent"
        run = await here.held_run()
        here.receiver.may_answer.set()
        assert await asyncio.to_thread(stopped.stop) == 0
        assert not children[1].is_running()
        row = await here.row(run)
        assert (row["attempt"], row["lease_owner"]) in {(0, None), (1, None)}
        assert row["status"] in {"pending", "completed"}


async def test_a_worker_reclaims_runs_of_a_dead_namesake_only(
    on_postgres: MigratedDatabase, redis_server: services.RedisServer, tmp_path: Path
) -> None:
    async with run_workers(on_postgres, redis_server, tmp_path) as here:
        first = here.worker(1)
        lost = await here.held_run()
        here.worker(2)
        kept = await here.held_run()
        before = await here.row(kept)

        first.kill()
        here.worker(3)
        await here.happens(lambda: len(here.receiver.received) == 3)
        assert (await here.row(lost))["attempt"] == 2
        after = await here.row(kept)
        assert [after[name] for name in ("token", "lease_owner")] == [
            before[name] for name in ("token", "lease_owner")
        ]


async def test_the_logs_of_its_runs_name_a_worker_that_ran_out_of_memory(
    on_postgres: MigratedDatabase, redis_server: services.RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_run_database(on_postgres) as run_database:
        key = await run_database.begun()
        await run_database.accept(await run_database.workflow())
        writing, _ = await run_database.claim()
        span = NodeSpan("charge", "charge", "http-request", SpanStatus.RUNNING, 4, NOON)
        await run_database.store.record([write(writing, spans=[span])])
        settings = WorkerSettings(database_url=on_postgres.url, redis_url=redis_server.url)
        await lost_worker_leases.release_leases(settings, "worker", -9, is_out_of_memory=True)
        lines = await run_database.query(
            "SELECT execution_id, sequence, level, message, node_id FROM log_line"
        )
        by_id = {line.pop("execution_id"): tuple(line.values()) for line in lines}
        said = "The process ran out of memory while this execution was at work"
        assert by_id.pop(key.execution_id) == (5, "warning", f"{said} on charge", "charge")
        assert list(by_id.values()) == [(1, "warning", said, None)]
        assert f"{key.execution_id} charge" in capsys.readouterr().out
        assert (await run_database.row(key.execution_id))["isolation_losses"] == 1
