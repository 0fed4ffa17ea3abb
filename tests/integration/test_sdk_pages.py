"""Examples of the pages about the SDK: the same ones by curl, in Python and from the command line have one result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pilotflame_sdk import Client

from docs.tables import ROOT
from tests import command_runs, relays
from tests.integration.command_shell import KEY, CommandShell, open_shell

GREETING: dict[str, Any] = {
    "name": "Greeting",
    "nodes": [
        {"id": "start", "type": "manual"},
        {"id": "greet", "type": "template", "config": {"text": 'Hello {{ data.body.name ?? "you" }}'}},
    ],
    "connections": [{"source": "start", "target": "greet"}],
}
QUEUED: dict[str, Any] = {
    "name": "Queued",
    "nodes": [{"id": "start", "type": "queue-trigger"}],
    "connections": [],
}


def read_blocks(page: str, section: str, kind: str) -> list[str]:
    """Return the code blocks of a section of a page."""
    text = (ROOT / f"docs/{page}.md").read_text()
    found = re.search(rf"^#+ {re.escape(section)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, section
    return re.findall(rf"^```{kind}\n(.*?)^```", found[1], re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShell]:
    with open_shell(tmp_path_factory.mktemp("shell")) as shell:
        yield shell


@pytest.fixture(scope="module")
def client(shell: CommandShell) -> Iterator[Client]:
    with Client(shell.given["PILOTFLAME_URL"], KEY) as client:
        for definition in (GREETING, QUEUED):
            client.workflows.put({**definition, "status": "active"})
        yield client


def run_shell(shell: CommandShell, block: str, **variables: str) -> str:
    """Run a block of commands, and return its output."""
    path = f"{relays.find_command().parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=shell.folder,
        env={
            **shell.given,
            **variables,
            "PATH": path,
            "API": f"{shell.given['PILOTFLAME_URL']}/api/v1",
            "KEY": KEY,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_python(shell: CommandShell, block: str) -> str:
    """Run a Python program, and return its output."""
    file = Path(shell.file("program.py", block))
    done = command_runs.run_program(file, given=shell.given, folder=shell.folder)
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_a_start_by_curl_python_and_command_has_one_result(client: Client, shell: CommandShell) -> None:
    curl, command = read_blocks("sdk", "Start a run", "text")
    python, parallel = read_blocks("sdk", "Start a run", "python")
    workflow = client.workflows.find("Greeting")
    greeted = {"text": "Hello Ada"}
    by_curl = json.loads(run_shell(shell, curl, WORKFLOW=workflow))
    assert (by_curl["status"], by_curl["outputs"]["greet"]) == ("completed", greeted)
    assert str(greeted) in run_python(shell, python)
    assert json.loads(run_shell(shell, command)) == {"greet": greeted}
    assert "completed" in run_python(shell, parallel)


def test_tags_by_curl_python_and_command_find_the_same_runs(client: Client, shell: CommandShell) -> None:
    (curl,) = read_blocks("executions", "Tags and metadata", "sh")
    (python,) = read_blocks("executions", "Tags and metadata", "python")
    (command,) = read_blocks("executions", "Tags and metadata", "text")
    run_shell(shell, curl, WORKFLOW=client.workflows.find("Greeting"))
    run_python(shell, f"from pilotflame_sdk import Client\nclient = Client()\n{python}")
    listed = run_shell(shell, f"{command.rstrip()} -o name").split()
    found = [one["id"] for one in client.executions.iterate(metadata={"order": "7"}, tag="nightly")]
    assert (len(found), listed[-3:]) == (3, found)


def test_the_examples_of_operations_run(client: Client) -> None:
    (python,) = read_blocks("sdk", "Every operation", "python")
    workflow_id = client.workflows.find("Queued")
    given = {"client": client, "workflow_id": workflow_id, "greeting": GREETING}
    exec(python, given)  # noqa: S102 - an example of the page
    assert client.workflows.get(workflow_id)["status"] == "active"
    found = list(client.executions.iterate(workflow_id=workflow_id))
    assert [client.executions.get(one["id"])["trigger"]["data"]["message"] for one in found] == [{"order": 7}]


def test_the_worker_of_the_page_is_registered_pulled_built_into_a_workflow_and_tested(
    client: Client, shell: CommandShell
) -> None:
    (worker,) = read_blocks("sdk", "Workers", "python")
    shell.file("images.py", worker)
    run_shell(shell, "pilotflame nodes apply images.py")
    pull = read_blocks("sdk", "Workflows in Python", "text")[0]
    run_shell(shell, pull)
    (built,) = read_blocks("sdk", "Workflows in Python", "python")
    run_python(shell, built)
    checked = client.workflows.validate(client.workflows.find("Thumbnails"))
    assert [one["type"] for one in checked["errors"]] == [], checked

    (test,) = read_blocks("sdk", "Tests", "python")
    module = ModuleType("images")
    page = vars(module)
    page |= {"exists": bool, "tiles": lambda _image: [], "upload": lambda key: key and "https://..."}
    sys.modules["images"] = module  # the classes of the page look their annotations up there
    try:
        exec(worker, page)  # noqa: S102 - as above
        exec(test, page)  # noqa: S102 - as above
        page["test_resize"]()
    finally:
        del sys.modules["images"]
