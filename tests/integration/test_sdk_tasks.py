"""Workers of the Python SDK with a real server: kills, cancellation, retries, large values, drain."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pilotflame_sdk import (
    Client,
    RunFailed,
    Task,
    TaskCancelled,
    TaskError,
    Worker,
    Workflow,
    WorkflowWarning,
)

from tests import command_runs
from tests.custom_types import RESIZE
from tests.forks import ForkedProgram
from tests.integration.command_shell import KEY, CommandShell, open_shell
from tests.integration.task_workers import TaskWorkerClient
from tests.integration.worker_runs import put_workflow, run_worker, serving, wait_until

WORKER = """
import os, time
from pilotflame_sdk import Task, Worker

worker = Worker("killed", slots=2)


@worker.node("acme/slow", "1.0.0", retry=1, lease=10)
def slow(task: Task) -> dict:
    begun = task.checkpoint or 0
    with open(os.environ["LEDGER"], "a") as ledger:
        print(task.idempotency_key, task.attempt, begun, os.getpid(), file=ledger, flush=True)
    task.checkpoint = begun + 1
    while not os.path.exists(os.environ["GO"]):
        task.sleep(0.05)
    return {"begun": begun}


if __name__ == "__main__":
    worker.run()
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShell]:
    with open_shell(tmp_path_factory.mktemp("shell")) as shell:
        yield shell


@pytest.fixture(scope="module")
def client(shell: CommandShell) -> Iterator[Client]:
    with Client(shell.given["PILOTFLAME_URL"], KEY) as client:
        yield client


async def test_functions_are_nodes_of_runs(client: Client, shell: CommandShell) -> None:
    worker = Worker("nodes", slots=4, grace=5, url=shell.given["PILOTFLAME_URL"], api_key=KEY)

    @worker.node("acme/double", "1.0.0", ports=["output", "negative"])
    async def double(config: dict[str, Any], task: Task) -> Any:  # noqa: ANN401 - any output
        task.log(f"doubles {config['n']}")
        if config["n"] < 0:
            return task.port("negative", {"n": config["n"]})
        return {"n": config["n"] * 2, "key": task.idempotency_key}

    @worker.node("acme/flaky", "1.0.0", retry={"maxAttempts": 3, "delay": 0.05})
    def flaky(task: Task) -> dict[str, int]:
        if task.attempt < 3:
            raise ValueError("not yet")
        return {"attempt": task.attempt}

    @worker.node("acme/broken", "1.0.0", retry=3)
    def broken() -> None:
        raise TaskError("image-missing", "No such image.", retry=False)

    @worker.node("acme/large", "1.0.0")
    def large(task: Task) -> Any:  # noqa: ANN401 - any output
        return {"text": task.input["body"]["text"] * 2}

    async with serving(worker):
        workflow = put_workflow(client, "acme/double", {"n": "{{ data.body.n }}"})
        run = await asyncio.to_thread(client.run, workflow, {"n": 21}, wait=30)
        assert run.outputs["work"]["n"] == 42
        assert run.outputs["work"]["key"].startswith(run.id)
        assert "doubles 21" in await asyncio.to_thread(shell.output, "logs", run.id)
        flaky_run = await asyncio.to_thread(client.run, put_workflow(client, "acme/flaky", {}), wait=30)
        assert flaky_run.outputs["work"] == {"attempt": 3}
        with pytest.raises(RunFailed) as caught:
            await asyncio.to_thread(client.run, put_workflow(client, "acme/broken", {}), wait=30)
        assert (caught.value.node_id, "No such image." in str(caught.value)) == ("work", True)
        text = "x" * 400_000
        large_run = await asyncio.to_thread(
            client.run, put_workflow(client, "acme/large", {}), {"text": text}, wait=60
        )
        assert large_run.outputs["work"] == {"text": text * 2}
        listed = json.loads(await asyncio.to_thread(shell.output, "workers", "list", "-o", "json"))
        assert [one["present"] for one in listed if one["name"].startswith("nodes-")] == [True]
    done = json.loads(
        await asyncio.to_thread(shell.output, "tasks", "list", "--execution", run.id, "-o", "json")
    )
    assert [(one["type"], one["state"]) for one in done] == [("acme/double", "completed")]


def test_a_pulled_catalog_builds_a_workflow(client: Client, shell: CommandShell) -> None:
    shell.output("nodes", "apply", shell.file("resize.json", json.dumps(RESIZE)))
    file = shell.folder / "acme_nodes.py"
    assert shell.run("pull", "--out", str(file), "--check").returncode == 7
    shell.output("pull", "--out", str(file))
    text = file.read_text()
    assert shell.output("pull") == text.rstrip()
    assert "\ndef tool(" in text, "also a type that only connects"
    assert shell.run("pull", "--out", str(file), "--check").returncode == 0
    n: dict[str, Any] = {}
    exec(text, n)  # noqa: S102 - the pulled module

    with Workflow("Thumbnails", status="active") as w:
        start = w.trigger(n["webhook"](verification={"provider": "none"}))
        small = w.add(n["acme_resize"](image=start.data.body.file, width=320), after=start)
        w.add(n["log"](message=f"tiny, {small.data.url}"), after=small.port("too-small"))
    with pytest.warns(WorkflowWarning, match="acme/resize"):  # no worker serves it
        (applied,) = client.workflows.apply(w)["changes"]
    assert (applied["action"], applied["name"]) == ("create", "Thumbnails")
    checked = client.workflows.validate(client.workflows.find(w.name))
    assert checked["errors"] == []
    with pytest.warns(WorkflowWarning, match="acme/resize"):
        assert [one["action"] for one in client.workflows.apply(w)["changes"]] == ["unchanged"]

    newer = {**RESIZE, "version": "1.3.0", "description": "Scales better."}
    shell.output("nodes", "apply", shell.file("resize.json", json.dumps(newer)))
    assert shell.run("pull", "--out", str(file), "--check").returncode == 7


async def test_a_cancelled_run_stops_its_function_at_once(client: Client, shell: CommandShell) -> None:
    worker = Worker("cancelled", slots=1, url=shell.given["PILOTFLAME_URL"], api_key=KEY)
    started, stopped = threading.Event(), threading.Event()

    @worker.node("acme/endless", "1.0.0", lease=300)
    def endless(task: Task) -> None:
        started.set()
        try:
            task.sleep(600)
        except TaskCancelled:
            stopped.set()
            raise

    async with serving(worker):
        run = client.start(put_workflow(client, "acme/endless", {}))
        assert await asyncio.to_thread(started.wait, 30)
        run.cancel()
        # The next heartbeat is 100 seconds away.
        assert await asyncio.to_thread(stopped.wait, 60)
        assert (await asyncio.to_thread(run.wait, 30)).status == "cancelled"


def test_the_tasks_of_a_killed_worker_end_in_another_one(
    client: Client, shell: CommandShell, tmp_path: Path
) -> None:
    file = shell.file("killed_worker.py", WORKER)
    ledger, go = tmp_path / "ledger", tmp_path / "go"
    variables = {"LEDGER": str(ledger), "GO": str(go)}
    shell.output("nodes", "apply", file)
    run = client.start(put_workflow(client, "acme/slow", {}))

    def begun() -> list[list[str]]:
        return [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []

    with run_worker(shell, file, variables) as first:
        wait_until(lambda: len(begun()) == 1)
        tasks = json.loads(shell.output("tasks", "list", "--execution", run.id, "-o", "json"))
        assert [one["state"] for one in tasks] == ["leased"]
        first.kill()
    with run_worker(shell, file, variables) as second:
        wait_until(lambda: len(begun()) == 2)
        go.touch()
        outputs = run.result(timeout=60)
        second.send_signal(signal.SIGTERM)
        assert second.wait(30) == 0
    keys, *_ = zip(*begun(), strict=True)
    assert len(set(keys)) == 1
    assert outputs["work"] == {"begun": int(begun()[1][2])}


async def test_a_worker_that_has_left_gets_no_task(client: Client, shell: CommandShell) -> None:
    document = {**RESIZE, "type": "acme/left"}
    shell.output("nodes", "apply", shell.file("left.json", json.dumps(document)))
    url, headers = shell.given["PILOTFLAME_URL"], {"X-API-Key": KEY}
    types = {"acme/left": RESIZE["version"]}
    async with httpx2.AsyncClient(base_url=url, headers=headers, trust_env=False) as api:
        gone, heir = TaskWorkerClient(api, types), TaskWorkerClient(api, types)
        # More free slots: it would be served first.
        poll = asyncio.create_task(gone.claim(limit=50, wait=30))
        await asyncio.to_thread(
            wait_until, lambda: any(one["id"] == gone.id for one in client.workers.iterate())
        )
        poll.cancel()
        await asyncio.wait([poll])
        run = await asyncio.to_thread(client.start, put_workflow(client, "acme/left", {"image": "a.png"}))
        (task,) = await heir.claim()
        assert client.tasks.get(task["id"])["unacknowledged"] == 0
        assert await heir.complete(task) == "ok"
        await asyncio.to_thread(run.wait, 30)


def test_a_worker_says_in_one_line_why_it_does_not_serve(
    client: Client, shell: CommandShell, tmp_path: Path, free_tcp_port: int
) -> None:
    file = shell.file("killed_worker.py", WORKER)
    reader = client.keys.create(name="reader", scopes=["workflows:read"])["key"]
    for key, said in (("sk-wrong", "unauthorized"), (reader, "scope-required")):
        given = {**shell.given, "PILOTFLAME_API_KEY": key}
        ended = command_runs.run_program(Path(file), given=given)
        assert (ended.returncode, "Traceback" in ended.stderr) == (4, False), ended.stderr
        assert said in ended.stderr.splitlines()[-1]
    log = tmp_path / "log"
    log.touch()
    away = {**shell.given, "PILOTFLAME_URL": f"http://127.0.0.1:{free_tcp_port}"}
    worker = ForkedProgram(Path(file), away, (log, log))
    try:
        wait_until(lambda: "claims wait for the server" in log.read_text())
    finally:
        worker.kill()


def test_a_terminated_worker_gives_its_tasks_back(
    client: Client, shell: CommandShell, tmp_path: Path
) -> None:
    code = WORKER.replace("acme/slow", "acme/released").replace("lease=10", "lease=300")
    file = shell.file("killed_worker.py", code.replace("slots=2", "slots=2, grace=0.2"))
    ledger, go = tmp_path / "ledger", tmp_path / "go"
    variables = {"LEDGER": str(ledger), "GO": str(go)}
    shell.output("nodes", "apply", file)
    run = client.start(put_workflow(client, "acme/released", {}))
    with run_worker(shell, file, variables) as first:
        wait_until(ledger.exists)
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
    go.touch()
    with run_worker(shell, file, variables):
        run.result(timeout=60)  # the lease would end after five minutes
