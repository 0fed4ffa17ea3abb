"""Kinds of functions and configs of SDK workers with a real server, and workers that restart after changes of code."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pilotflame_sdk import Client, RunFailed

from tests import command_runs
from tests.integration.command_shell import KEY, CommandShell, open_shell
from tests.integration.worker_runs import put_workflow, run_worker, wait_until

KINDS = """
import os, threading, time
from dataclasses import dataclass, field

import msgspec
import pydantic
from pilotflame_sdk import Task, Worker

worker = Worker("kinds", slots=6, grace=30)


@dataclass
class Tile:
    width: int
    tags: list[str] = field(default_factory=list)


@dataclass
class Classes:
    tile: Tile
    scale: float = 1.5


class StructTile(msgspec.Struct):
    width: int


class Structs(msgspec.Struct):
    tile: StructTile
    scale: float = 1.5


class ModelTile(pydantic.BaseModel):
    width: int
    tags: list[str] = []


class Models(pydantic.BaseModel):
    tile: ModelTile
    scale: float = 1.5


@worker.node("acme/classes", "1.0.0", effect="pure")
def classes(config: Classes) -> Classes:
    return Classes(Tile(config.tile.width * 2, [*config.tile.tags, "classes"]), config.scale)


@worker.node("acme/structs", "1.0.0", effect="pure")
async def structs(config: Structs) -> Structs:
    return Structs(StructTile(config.tile.width * 2), config.scale)


@worker.node("acme/models", "1.0.0", effect="pure", process=True)
def models(config: Models) -> Models:
    return Models(tile=ModelTile(width=config.tile.width * 2, tags=["models"]), scale=config.scale)


@worker.node("acme/hang", "1.0.0", process=True, lease=300)
def hang(task: Task) -> None:
    with open(os.environ["LEDGER"], "a") as ledger:
        print(os.getpid(), file=ledger, flush=True)
    while True:
        time.sleep(60)  # Never asks whether it was cancelled.


@worker.node("acme/block", "1.0.0", lease=10)
async def block(task: Task) -> dict:
    time.sleep(11)  # Longer than the lease; the event loop stands still.
    return {"attempt": task.attempt}


@worker.node("acme/slow", "1.0.0", lease=10)
def slow(task: Task) -> dict:
    open(os.environ["STARTED"], "w").close()
    while not os.path.exists(os.environ["GO"]):
        time.sleep(0.05)
    return {"attempt": task.attempt}


if __name__ == "__main__":
    worker.run()
"""
CHANGING = """
from answers.values import ANSWER
from pilotflame_sdk import Worker

worker = Worker("changing", slots=1)


@worker.node("acme/answer", "{version}", effect="pure", process=True)
def answer() -> dict:
    return {{"answer": ANSWER}}
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShell]:
    with open_shell(tmp_path_factory.mktemp("shell")) as shell:
        yield shell


@pytest.fixture(scope="module")
def client(shell: CommandShell) -> Iterator[Client]:
    with Client(shell.given["PILOTFLAME_URL"], KEY) as client:
        yield client


@pytest.fixture(scope="module")
def variables(shell: CommandShell) -> dict[str, str]:
    """Variables of the worker: paths of files by which it and the tests notify each other."""
    return {name: str(shell.folder / name.lower()) for name in ("LEDGER", "STARTED", "GO")}


@pytest.fixture(scope="module")
def kinds(shell: CommandShell, variables: dict[str, str]) -> Iterator[str]:
    """File of a running worker with a function of each kind."""
    file = shell.file("kinds.py", KINDS)
    shell.output("nodes", "apply", file)
    with run_worker(shell, file, variables, anew=True) as process:
        yield file
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.usefixtures("kinds")
def test_configs_and_outputs_are_classes_of_three_libraries(client: Client) -> None:
    config = {"tile": {"width": "{{ data.body.width }}"}}
    found = {}
    for name in ("classes", "structs", "models"):
        workflow = put_workflow(client, f"acme/{name}", config)
        found[name] = client.run(workflow, {"width": 160}, wait=60).outputs["work"]
    assert found == {
        "classes": {"tile": {"width": 320, "tags": ["classes"]}, "scale": 1.5},
        "structs": {"tile": {"width": 320}, "scale": 1.5},
        "models": {"tile": {"width": 320, "tags": ["models"]}, "scale": 1.5},
    }
    # Their schemas are those by which the server checks what a template gives.
    for name in found:
        workflow = put_workflow(client, f"acme/{name}", config)
        with pytest.raises(RunFailed, match="width"):
            client.run(workflow, {"width": "wide"}, wait=60)


@pytest.mark.usefixtures("kinds")
def test_a_cancelled_process_is_killed(client: Client, variables: dict[str, str]) -> None:
    run = client.start(put_workflow(client, "acme/hang", {}))
    ledger = Path(variables["LEDGER"])
    wait_until(lambda: ledger.exists() and ledger.read_text().endswith("\n"))
    process = psutil.Process(int(ledger.read_text()))
    run.cancel()
    process.wait(60)  # the next heartbeat is 100 seconds away
    assert run.wait(30).status == "cancelled"


@pytest.mark.usefixtures("kinds")
def test_a_blocked_loop_keeps_its_lease(client: Client) -> None:
    run = client.run(put_workflow(client, "acme/block", {}), wait=60)
    assert run.outputs["work"] == {"attempt": 1}


def test_a_drained_worker_ends_its_functions_first(
    client: Client, shell: CommandShell, kinds: str, variables: dict[str, str]
) -> None:
    def present() -> list[str]:
        listed = json.loads(shell.output("workers", "list", "-o", "json"))
        return [one["name"] for one in listed if one["present"] and not one["draining"]]

    # Types of its own: only the worker that is drained serves them.
    file = shell.file(
        "drained.py", Path(kinds).read_text().replace('"kinds"', '"drained"').replace("acme/", "drain/")
    )
    shell.output("nodes", "apply", file)
    with run_worker(shell, file, variables) as process:
        wait_until(lambda: any(name.startswith("drained") for name in present()))
        run = client.start(put_workflow(client, "drain/slow", {}))
        wait_until(lambda: Path(variables["STARTED"]).exists())
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not any(name.startswith("drained") for name in present()))
        late = client.start(put_workflow(client, "drain/classes", {"tile": {"width": 1}}))
        assert process.poll() is None
        Path(variables["GO"]).touch()
        assert process.wait(30) == 0
    assert run.result(timeout=30)["work"] == {"attempt": 1}
    assert late.refresh().has_ended is False
    late.cancel()


def test_a_changed_file_is_registered_and_served_again(client: Client, shell: CommandShell) -> None:
    def answer() -> object:
        return client.run(put_workflow(client, "acme/answer", {}), wait=60).outputs["work"]

    shell.file("changing/answers/values.py", "ANSWER = 1")
    shell.file("changing/environment/pyvenv.cfg", "")
    file = shell.file("changing/changing.py", CHANGING.format(version="1.0.0"))
    second = int(Path(file).stat().st_mtime)
    log = shell.folder / "dev.log"
    with command_runs.run_command("workers", "dev", file, given=shell.given, log=log) as dev:
        dev.says("acme/answer 1.0.0 is registered")
        assert answer() == {"answer": 1}
        # Of the same size and within the same second, by which Python tells whether a compiled file is old.
        changed = shell.file("changed.py", CHANGING.format(version="1.1.0"))
        os.utime(changed, ns=(0, second * 10**9 + 1))
        Path(changed).replace(file)
        dev.says("acme/answer 1.1.0 is registered")
        # Also after a change of a module in a package below.
        shell.file("changing/environment/lib/module.py", "")
        shell.file("changing/answers/values.py", "ANSWER = 2")
        dev.says("(acme/answer 1.1.0 is registered.*){2}")
        assert answer() == {"answer": 2}
        # A mistake ends the worker, not the command.
        shell.file("changing/changing.py", "def")
        dev.says("SyntaxError")
        shell.file("changing/changing.py", CHANGING.format(version="1.1.0"))
        dev.says("SyntaxError.*acme/answer 1.1.0 is registered")
        assert answer() == {"answer": 2}
        assert dev.log().count("the code has changed") == 4
        assert dev.stop() == 0
    # The worker has ended too.
    assert not [one.pid for one in psutil.process_iter(["cmdline"]) if file in (one.info["cmdline"] or [])]
