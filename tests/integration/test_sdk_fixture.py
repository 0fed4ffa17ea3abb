"""Fixture `pilotflame` of the SDK, as a project with tests of its own uses it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from docs.tables import ROOT
from tests import relays
from tests.integration.command_shell import KEY, open_shell

SDK_PROJECT = ROOT / "sdk/python/pyproject.toml"
PROJECT = 'pytest_plugins = ["pilotflame_sdk.pytest_plugin"]'
TESTS = """
from pilotflame_sdk import Client, NotFound
import pytest

created = []


def create(pilotflame: Client) -> str:
    graph = {"name": "Greeting", "nodes": [
        {"id": "start", "type": "manual"},
        {"id": "greet", "type": "template", "config": {"text": "Hello, {{ data.body.name }}!"}},
    ], "connections": [{"source": "start", "target": "greet"}]}
    return pilotflame.workflows.create(**graph)["workflowId"]


def test_a_run(pilotflame: Client) -> None:
    created.append(create(pilotflame))
    assert pilotflame.run("Greeting", {"name": "Ada"}, wait=60).outputs["greet"] == {"text": "Hello, Ada!"}


def test_an_organization_of_its_own(pilotflame: Client) -> None:
    with pytest.raises(NotFound):
        pilotflame.workflows.get(created[0])
"""


def test_a_project_tests_its_workflows_with_the_fixture(tmp_path: Path) -> None:
    assert "2 passed" in run_project(tmp_path)


def test_a_project_may_use_a_running_server(tmp_path: Path) -> None:
    (tmp_path / "shell").mkdir()
    with open_shell(tmp_path / "shell") as shell:
        options = ("-k", "a_run", "--pilotflame-url", shell.given["PILOTFLAME_URL"])
        # All tests share its organization.
        output = run_project(tmp_path, *options, PILOTFLAME_TEST_API_KEY=KEY)
        assert "1 passed, 1 deselected" in output
        assert [one["name"] for one in shell.json("workflows", "list", "-o", "json")] == ["Greeting"]


def run_project(folder: Path, *options: str, **variables: str) -> str:
    """Run the tests of a project in a folder, and return their output."""
    (folder / "conftest.py").write_text(PROJECT)
    (folder / "test_workflow.py").write_text(TESTS)
    # The fixture finds the command beside the Python that it runs in.
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    (programs / "pilotflame").symlink_to(relays.find_command())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PILOTFLAME_")}
    # An installed SDK, whose plugin the project's conftest names again; no other plugin is needed.
    metadata = folder / "pilotflame_sdk-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pilotflame-sdk\nVersion: 0\n")
    entry_points = tomllib.loads(SDK_PROJECT.read_text())["project"]["entry-points"]["pytest11"]
    lines = [f"{name} = {module}" for name, module in entry_points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]))
    paths = {
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    installed = [option for name in entry_points for option in ("-p", name)]
    command = [str(programs / "python"), "-m", "pytest", "-q", "--rootdir", str(folder), *installed, *options]
    done = subprocess.run(
        [*command, str(folder / "test_workflow.py")],
        cwd=folder,
        env=environment | paths | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
