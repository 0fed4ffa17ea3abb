"""Fixture `pilotflame` of the SDK, as a project with tests of its own uses it."""

import os
import subprocess
import sys
from pathlib import Path

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
    (tmp_path / "conftest.py").write_text(PROJECT)
    (tmp_path / "test_workflow.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PILOTFLAME_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
