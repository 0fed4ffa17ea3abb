"""Clients generated from the served OpenAPI document: they compile strictly, and work against a real process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.system import harness
from tests.system.client import API_KEY
from tests.tools.environments import PYTHON_CLIENT, TYPESCRIPT_CLIENTS, ToolEnvironment

pytestmark = pytest.mark.timeout(600)
"""Generators and compilers are slow on a busy machine; the first test builds their environment where it is missing."""
DOCUMENT = "openapi.json"


@dataclass(frozen=True)
class ServedApi:
    """A server and its document."""

    url: str
    document: bytes


@pytest.fixture(scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServedApi]:
    async with harness.run_one_process(tmp_path_factory.mktemp("server")) as deployment:
        async with httpx2.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"{deployment.url}/openapi.json")
        yield ServedApi(deployment.url, answer.content)


async def test_python_client_is_generated_without_a_warning_and_works(api: ServedApi, tmp_path: Path) -> None:
    place(PYTHON_CLIENT, api, tmp_path)
    options = ["--meta", "none", "--output-path", "pilotflame_client", "--fail-on-warning"]
    run(["openapi-python-client", "generate", "--path", DOCUMENT, *options], tmp_path, PYTHON_CLIENT)
    checked = ["--python-executable", str(PYTHON_CLIENT.python), "run.py", "pilotflame_client"]
    run([sys.executable, "-m", "mypy", *checked], tmp_path, PYTHON_CLIENT)
    run([str(PYTHON_CLIENT.python), "run.py", api.url, API_KEY], tmp_path, PYTHON_CLIENT)


async def test_typescript_clients_compile_strictly_and_work(api: ServedApi, tmp_path: Path) -> None:
    place(TYPESCRIPT_CLIENTS, api, tmp_path)
    (tmp_path / "node_modules").symlink_to(TYPESCRIPT_CLIENTS.folder / "node_modules")
    for script, *arguments in (
        ("node_modules/openapi-typescript/bin/cli.js", DOCUMENT, "--output", "schema.ts"),
        ("node_modules/@hey-api/openapi-ts/bin/run.js",),
        ("node_modules/typescript/bin/tsc",),
        ("built/fetch.js", api.url, API_KEY),
        ("built/hey-api.js", api.url, API_KEY),
    ):
        run([str(TYPESCRIPT_CLIENTS.node), script, *arguments], tmp_path, TYPESCRIPT_CLIENTS)


def place(tool: ToolEnvironment, api: ServedApi, folder: Path) -> None:
    """Put the sources of a tool into a folder, and the document beside them."""
    shutil.copytree(tool.sources, folder, dirs_exist_ok=True)
    (folder / DOCUMENT).write_bytes(api.document)


def run(command: Sequence[str], folder: Path, tool: ToolEnvironment) -> str:
    """Run a program of an environment to its end, and return all that it prints."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=tool.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
