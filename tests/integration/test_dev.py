"""`pilotflame dev`, in real processes."""

import asyncio
import json
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests import command_runs, databases
from tests.command_runs import RunningCommand, command_environment
from tests.integration.run_database import MigratedDatabase, open_run_database

ADDRESS = r"Pilotflame runs on (\S+)"
KEY = r"sk-\w+"
OUR_KEY = "sk-of-the-settings-0123"
START: Mapping[str, object] = {"id": "start", "type": "manual"}
LEASE_SECONDS = 60
"""A run that continues much sooner was reclaimed before its lease expired."""


def get_whoami(address: str, key: str) -> httpx2.Response:
    return httpx2.get(f"{address}/api/v1/auth/whoami", headers={"X-API-Key": key}, trust_env=False)


def write_workflow_file(folder: Path, *nodes: Mapping[str, object]) -> str:
    """Write a workflow with its nodes in a row, and return the file's name."""
    chain = [START, *nodes]
    edges = [{"source": one["id"], "target": other["id"]} for one, other in pairwise(chain)]
    file = folder / "workflow.json"
    file.write_text(json.dumps({"name": "Work", "nodes": chain, "connections": edges}))
    return str(file)


def test_the_first_start_prints_a_key_and_lines_that_work_and_the_next_one_only_the_address(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    given = command_environment(folder)
    with command_runs.run_command(
        "dev", "--port", "0", given=given, log=tmp_path / "first.log", starts_anew=True
    ) as first:
        key, lines = first.says(rf"({KEY}).*wait for its result:\n(.*progress[^\n]*)\n").groups()
        shown = subprocess.run(["bash", "-euc", lines], capture_output=True, text=True, check=True).stdout
        assert "Hello, world!" in shown
        assert first.log().index("/sign-in#code=") < first.log().index(key), "newcomers need the link first"
        assert first.stop() == 0
    traced = {**given, "PYTHONPROFILEIMPORTTIME": "1"}
    with command_runs.run_command(
        "dev", "--port", "0", given=traced, log=tmp_path / "second.log", anew=True
    ) as second:
        address, code = second.says(r"(http://[^\s/]+)/sign-in#code=(\S+)").groups()
        assert_small_at_rest(second)
        assert get_whoami(address, key).json()["role"] == "admin"
        with httpx2.Client(base_url=address, headers={"Sec-Fetch-Site": "same-origin"}) as browser:
            assert browser.post("/session", json={"code": code}).status_code == 201
            assert browser.get("/dashboard/runs").status_code == 200
            assert browser.post("/session", json={"code": code}).status_code == 401
        assert not re.search(KEY, second.log())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def assert_small_at_rest(dev: RunningCommand) -> None:
    """Fail if a process that traces its imports is large, or has loaded a library that only others need."""
    dev.says(ADDRESS)
    loaded = set(re.findall(r"^import time:.*\| +(\S+)$", dev.log(), re.MULTILINE))
    assert "sqlmodel" in loaded
    others = {"rich.console", "alembic", "redis", "asyncpg", "aiohttp", "kubernetes", "yaml"}
    assert not loaded & others
    assert psutil.Process(dev.process.pid).memory_full_info().pss < 120_000_000


def test_a_run_survives_a_killed_server_continues_at_once_and_its_poll_gets_the_result(
    tmp_path: Path,
) -> None:
    data = asyncio.run(databases.create_data_folder(tmp_path / "data"))
    own = {"BOOTSTRAP_API_KEY": OUR_KEY, "LEASE_SECONDS": str(LEASE_SECONDS)}
    given = command_environment(data, OUTBOUND_ALLOWED_NETWORKS="127.0.0.1/32", **own)
    with closing(socket.create_server(("127.0.0.1", 0))) as target:
        target.settimeout(command_runs.PATIENCE_SECONDS)
        url = f"http://127.0.0.1:{target.getsockname()[1]}/"
        config = {"method": "POST", "url": url, "body": {"amount": 7}}
        file = write_workflow_file(tmp_path, {"id": "post", "type": "http-request", "config": config})
        with command_runs.run_command("dev", "--port", "0", given=given, log=tmp_path / "first.log") as first:
            address = first.says(ADDRESS)[1]
            client = {**given, "PILOTFLAME_URL": address, "PILOTFLAME_API_KEY": OUR_KEY}
            command_runs.run_output("apply", file, given=client)
            with command_runs.run_command("run", "Work", given=client, log=tmp_path / "run.log") as run:
                with closing(target.accept()[0]) as lost:
                    before = receive_request(lost)
                    assert_no_second_start(first, given)
                    first.kill()
                    killed_at = time.monotonic()
                port = address.rpartition(":")[2]
                with command_runs.run_command("dev", "--port", port, given=given, log=tmp_path / "next.log"):
                    with closing(target.accept()[0]) as repeated:
                        assert time.monotonic() - killed_at < LEASE_SECONDS / 2
                        assert receive_request(repeated) == before
                        repeated.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nreceived")
                    assert run.ends() == 0, run.log()
                    assert "received" in run.log()


def test_a_pod_outlives_a_killed_server_and_makes_no_call_twice(tmp_path: Path) -> None:
    data = asyncio.run(databases.create_data_folder(tmp_path / "data"))
    given = command_environment(data, BOOTSTRAP_API_KEY=OUR_KEY, OUTBOUND_ALLOWED_NETWORKS="127.0.0.1/32")
    with closing(socket.create_server(("127.0.0.1", 0))) as target:
        target.settimeout(command_runs.PATIENCE_SECONDS)
        url = f"http://127.0.0.1:{target.getsockname()[1]}/"
        config = {"method": "POST", "url": url, "body": {"amount": 7}}
        file = write_workflow_file(tmp_path, {"id": "post", "type": "http-request", "config": config})
        with command_runs.run_command(
            "dev", "--port", "0", given=given, log=tmp_path / "first.log", leaves_children=True
        ) as first:
            address = first.says(ADDRESS)[1]
            client = {**given, "PILOTFLAME_URL": address, "PILOTFLAME_API_KEY": OUR_KEY}
            workflow_id = re.search(r"wf_\w+", command_runs.run_output("apply", file, given=client))
            assert workflow_id
            path = f"{address}/api/v1/workflows/{workflow_id[0]}"
            assert call_api("POST", f"{path}/deploy")["deploymentStatus"] == "running"
            execution_id = call_api("POST", f"{path}/trigger")["execution_id"]
            call = target.accept()[0]
            receive_request(call)
            first.kill()
        port = address.rpartition(":")[2]
        with command_runs.run_command(
            "dev", "--port", port, given=given, log=tmp_path / "next.log"
        ) as following:
            following.says(ADDRESS)
            with closing(call):
                call.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nreceived")
            progress = call_api("GET", f"{address}/api/v1/executions/{execution_id}/progress?wait=20")
            assert (progress["status"], progress["outputs"]["post"]["body"]) == ("completed", "received")
            target.settimeout(0)
            with pytest.raises(BlockingIOError):
                target.accept()
            assert following.stop() == 0
    assert not [one for one in psutil.process_iter(["environ"]) if is_of(one, workflow_id[0])]


async def test_a_new_version_is_deployed_under_traffic_and_no_trigger_fails(tmp_path: Path) -> None:
    data = await databases.create_data_folder(tmp_path / "data")
    given = command_environment(data, BOOTSTRAP_API_KEY=OUR_KEY)
    with command_runs.run_command("dev", "--port", "0", given=given, log=tmp_path / "log") as dev:
        address = dev.says(ADDRESS)[1]
        headers = {"X-API-Key": OUR_KEY}
        async with httpx2.AsyncClient(base_url=address, headers=headers, trust_env=False, timeout=40) as api:
            first, second = (
                {"type": "set", "id": "tell", "config": {"values": {"is": one}}} for one in (1, 2)
            )
            graph = {"nodes": [START, first], "connections": [{"source": "start", "target": "tell"}]}
            made = await api.post("/api/v1/workflows", json={"name": "Work", **graph})
            path = f"/api/v1/workflows/{made.json()['workflowId']}"
            assert (await api.post(f"{path}/deploy")).status_code == 200
            told: list[object] = []
            is_replaced = asyncio.Event()

            async def trigger() -> None:
                answer = await api.post(f"{path}/trigger", json={"sync": True})
                assert answer.json()["status"] == "completed", answer.text
                told.append(answer.json()["output"]["tell"]["is"])

            async def go_on() -> None:
                while not is_replaced.is_set():
                    await trigger()

            await trigger()
            callers = [asyncio.create_task(go_on()) for _ in range(3)]
            assert (await api.put(path, json={**graph, "nodes": [START, second]})).is_success
            assert (await api.post(f"{path}/deploy")).status_code == 200
            is_replaced.set()
            await asyncio.gather(*callers)
            assert set(told) == {1, 2}
            assert (await api.post(f"{path}/undeploy")).status_code == 200


def call_api(method: str, url: str) -> dict[str, Any]:
    """Return the answer of the API."""
    response = httpx2.request(method, url, headers={"X-API-Key": OUR_KEY}, trust_env=False, timeout=40)
    assert response.is_success, response.text
    answer: dict[str, Any] = response.json()
    return answer


def is_of(process: psutil.Process, workflow_id: str) -> bool:
    """Return whether a process is a pod of a workflow."""
    return (process.info["environ"] or {}).get("PILOTFLAME_RUNNER_WORKFLOW_ID") == workflow_id


def receive_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return the idempotency key and the body of a request."""
    connection.settimeout(command_runs.PATIENCE_SECONDS)
    request = b""
    while not request.endswith(b"}"):
        request += connection.recv(65_536)
    key = re.search(rb"(?i)\nidempotency-key: (\S+)", request)
    assert key
    return key[1], request.partition(b"\r\n\r\n")[2]


def assert_no_second_start(first: RunningCommand, given: dict[str, str]) -> None:
    second = command_runs.run("dev", "--port", "0", given=given)
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr.count("\n") == 1
    assert f"in use by process {first.process.pid}" in second.stderr


async def test_leases_in_a_database_that_others_may_use_are_left_to_them_and_the_secret_stays(
    on_sqlite: MigratedDatabase, tmp_path: Path
) -> None:
    async with open_run_database(on_sqlite) as run_database:
        held = await run_database.accept_and_claim()
        given = command_environment(tmp_path / "data", DATABASE_URL=on_sqlite.url)
        secrets = set()
        for log in ("first.log", "second.log"):
            with command_runs.run_command("dev", "--port", "0", given=given, log=tmp_path / log) as dev:
                dev.says(ADDRESS)
                assert (await run_database.row(held.execution_id))["lease_owner"] == "worker"
                secrets.add((tmp_path / "data" / "secret.key").read_text())
        assert len(secrets) == 1


def test_a_key_of_the_settings_opens_it_unprinted_and_it_ends_on_ctrl_c_though_a_run_is_followed(
    tmp_path: Path,
) -> None:
    given = command_environment(
        asyncio.run(databases.create_data_folder(tmp_path / "data")), BOOTSTRAP_API_KEY=OUR_KEY
    )
    log = {"id": "log", "type": "log", "config": {"message": "now it waits"}}
    wait = {"id": "wait", "type": "wait", "config": {"seconds": 3600}}
    with command_runs.run_command("dev", "--port", "0", given=given, log=tmp_path / "dev.log") as dev:
        address = dev.says(ADDRESS)[1]
        assert get_whoami(address, OUR_KEY).json()["role"] == "admin"
        client = {**given, "PILOTFLAME_URL": address, "PILOTFLAME_API_KEY": OUR_KEY}
        command_runs.run_output("apply", write_workflow_file(tmp_path, log, wait), given=client)
        with command_runs.run_command("run", "Work", given=client, log=tmp_path / "run.log") as run:
            execution_id = run.says(r"exec_\w+")[0]
            follow = ("logs", execution_id, "--follow")
            with command_runs.run_command(*follow, given=client, log=tmp_path / "follow.log") as follower:
                follower.says("now it waits")
                dev.process.send_signal(signal.SIGINT)
                assert dev.ends() == 0
                assert not re.search(KEY, dev.log())
