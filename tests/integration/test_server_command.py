"""`pilotflame server`: the processes of one machine under one supervisor."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import httpx2
import psutil
import pytest
from pilotflame_sdk import Client

from pilotflame import supervisor
from tests import command_runs, databases, services
from tests.command_runs import RunningCommand, command_environment
from tests.http_receiver import run_receiver

KEY = "sk-of-the-server-0123456789"
CHILDREN = ("gateway", "worker", "scheduler", "deployer")
PATIENCE_SECONDS = 60.0
REFUSED = 2


def child_ids(server: RunningCommand) -> dict[str, int]:
    """Return the process ids of the running children, by name."""
    children = {child.name(): child.pid for child in psutil.Process(server.process.pid).children()}
    return {name.removeprefix("pf-"): pid for name, pid in children.items() if name.startswith("pf-")}


async def read_request_id(address: str) -> str:
    """Return the id of a new request."""
    async with httpx2.AsyncClient(timeout=PATIENCE_SECONDS) as client:
        return str((await client.get(f"{address}/health")).headers["X-Request-Id"])


async def test_each_killed_child_is_restarted_and_runs_are_kept_until_an_orderly_stop(
    postgres: services.PostgresServer, tmp_path: Path, free_tcp_port: int
) -> None:
    """Without Redis: PostgreSQL carries the wakeups."""
    given = command_environment(
        tmp_path,
        DATABASE_URL=await databases.create_database(postgres, "server_command"),
        SECRET_KEY="a secret for tests, and long enough to be one",
        BOOTSTRAP_API_KEY=KEY,
        PORT=str(free_tcp_port),
        OUTBOUND_ALLOWED_NETWORKS="127.0.0.1/32",
        CLUSTER="local",
        ALLOW_LOCAL_PODS="true",
        SETTLE_SECONDS="0",
    )
    async with run_receiver() as receiver:
        address = f"http://127.0.0.1:{free_tcp_port}"
        client = Client(address, KEY)
        with command_runs.run_command(
            "server", "--deployer", given=given, log=tmp_path / "server.log"
        ) as server:
            receiver.may_answer.clear()
            node = {"url": receiver.url(), "method": "POST"}
            definition = {
                "name": "Held",
                "nodes": [
                    {"id": "start", "nodeId": "manual"},
                    {"id": "post", "nodeId": "http-request", "config": node},
                ],
                "connections": [{"source": "start", "target": "post"}],
            }
            await asyncio.to_thread(server.says, "process started")
            # The socket listens by now, so the first request waits until the gateway answers.
            workflow_id = await asyncio.to_thread(client.workflows.put, definition)
            run = await asyncio.to_thread(client.start, workflow_id)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not receiver.received:  # noqa: ASYNC110 - of other processes
                    await asyncio.sleep(0.02)
            await asyncio.to_thread(server.says, "scheduler ready")
            first = child_ids(server)
            assert set(first) == set(CHILDREN)
            # A fork copies no other thread, so locks that one holds would stay locked in the child.
            assert psutil.Process(server.process.pid).num_threads() == 1

            second = await asyncio.to_thread(partial(command_runs.run, "server", given=given))
            assert second.returncode == REFUSED
            assert f"Port {free_tcp_port} of 127.0.0.1 is not available" in second.stderr

            earlier_id = await read_request_id(address)
            for pid in first.values():
                os.kill(pid, signal.SIGKILL)
            # Connections wait for the restarted gateway.
            other = await asyncio.to_thread(client.start, workflow_id)
            receiver.may_answer.set()
            for started in (run, other):
                result = await asyncio.to_thread(started.wait, PATIENCE_SECONDS)
                assert result.status == "completed"
            await asyncio.to_thread(server.says, "scheduler ready.*scheduler ready")
            again = child_ids(server)
            assert set(again) == set(CHILDREN)
            assert not set(first.values()) & set(again.values())
            # A counter follows the part that names the gateway, and begins again.
            assert (await read_request_id(address))[:-8] != earlier_id[:-8]

            # The restarted deployer deploys at the address of this server, which it was told by the supervisor.
            path = f"/api/v1/workflows/{workflow_id}"
            await asyncio.to_thread(client.request, "PUT", f"{path}/status", json={"status": "active"})
            await asyncio.to_thread(client.request, "POST", f"{path}/deploy", json={})
            async with asyncio.timeout(PATIENCE_SECONDS):
                shown = await asyncio.to_thread(client.request, "GET", f"{path}/status")
                while shown["deploymentStatus"] != "running":
                    await asyncio.sleep(0.2)
                    shown = await asyncio.to_thread(client.request, "GET", f"{path}/status")

            client.close()
            assert await asyncio.to_thread(server.stop) == 0
            stops = [
                server.log().rindex(text) for text in ("server stops", "worker stops", "scheduler stops")
            ]
            assert stops == sorted(stops)
            assert not any(psutil.pid_exists(pid) for pid in again.values())
    shutil.rmtree(tmp_path / "pods")  # else the pod would wait for the server's next start


def test_a_setting_that_is_missing_ends_the_server_with_one_line(tmp_path: Path) -> None:
    done = command_runs.run("server", given=command_environment(tmp_path))
    assert done.returncode == REFUSED
    assert "PILOTFLAME_SECRET_KEY" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("pause", "lived", "following"),
    [(0.0, 1.0, 0.25), (0.25, 1.0, 0.5), (16.0, 1.0, 30.0), (30.0, 1.0, 30.0), (30.0, 60.0, 0.25)],
)
def test_pauses_grow_until_a_child_is_stable(pause: float, lived: float, following: float) -> None:
    assert supervisor.next_pause(pause, lived) == following


def test_a_child_that_refuses_its_first_start_ends_the_server(tmp_path: Path, free_tcp_port: int) -> None:
    given = command_environment(
        tmp_path,
        REDIS_URL="redis://127.0.0.1:1/0",
        SECRET_KEY="a secret for tests, and long enough to be one",
        PORT=str(free_tcp_port),
        SCHEDULE_SECONDS="never",
    )
    done = command_runs.run("server", given=given)
    assert done.returncode == REFUSED
    assert "PILOTFLAME_SCHEDULE_SECONDS" in done.stderr
    assert '"process":"scheduler"' in done.stdout
