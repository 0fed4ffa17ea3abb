"""Clients generated from the served OpenAPI document: they compile strictly, and work against a real process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import httpx2
import pytest

from tests.system import harness
from tests.system.client import API_KEY
from tests.tools.environments import PYTHON_CLIENT, TYPESCRIPT_CLIENTS, ToolEnvironment

pytestmark = [pytest.mark.timeout(600), pytest.mark.toolchain]
"""Generators and compilers are slow on a busy machine; a test builds its environment where that is missing."""
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
        # Clients take the address at run time, so that those of one document are equal.
        yield ServedApi(deployment.url, answer.content.replace(deployment.url.encode(), b"http://localhost"))


async def test_python_client_is_generated_without_a_warning_and_works(api: ServedApi) -> None:
    options = ["--meta", "none", "--output-path", "pilotflame_client", "--fail-on-warning"]
    checked = ["--python-executable", str(PYTHON_CLIENT.python), "run.py", "pilotflame_client"]
    client = build_client(
        PYTHON_CLIENT,
        api,
        ["openapi-python-client", "generate", "--path", DOCUMENT, *options],
        [sys.executable, "-m", "mypy", *checked],
    )
    run([str(PYTHON_CLIENT.python), "run.py", api.url, API_KEY], client, PYTHON_CLIENT)


async def test_typescript_clients_compile_strictly_and_work(api: ServedApi) -> None:
    node = str(TYPESCRIPT_CLIENTS.node)
    clients = build_client(
        TYPESCRIPT_CLIENTS,
        api,
        [node, "node_modules/openapi-typescript/bin/cli.js", DOCUMENT, "--output", "schema.ts"],
        [node, "node_modules/@hey-api/openapi-ts/bin/run.js"],
        [node, "node_modules/typescript/bin/tsc"],
    )
    for script in ("built/fetch.js", "built/hey-api.js"):
        run([node, script, api.url, API_KEY], clients, TYPESCRIPT_CLIENTS)


def build_client(tool: ToolEnvironment, api: ServedApi, *commands: Sequence[str]) -> Path:
    """Return the folder in which the commands generated and checked clients of the document without an error.

    The result depends on the document, the locks and the sources of the tool alone, so it is kept for each of these,
    beside the environment of the tool: generators and compilers take half a minute.
    """
    built = tool.folder / "clients" / hash_inputs(tool, api, commands)
    if built.exists():
        return built
    shutil.rmtree(built.parent, ignore_errors=True)
    draft = built.with_suffix(".draft")
    shutil.copytree(tool.sources, draft)
    (draft / DOCUMENT).write_bytes(api.document)
    if (modules := tool.folder / "node_modules").exists():
        (draft / modules.name).symlink_to(modules)
    for command in commands:
        run(command, draft, tool)
    return draft.rename(built)


def hash_inputs(tool: ToolEnvironment, api: ServedApi, commands: Sequence[Sequence[str]]) -> str:
    """Return a name for everything on which a client depends, but the locks, which the environment is named for."""
    found = sha256(api.document)
    found.update(f"{sys.version} {version('mypy')} {commands}".encode())
    for file in sorted(tool.sources.iterdir()):
        if file.is_file():
            found.update(b"%b %b" % (file.name.encode(), file.read_bytes()))
    return found.hexdigest()


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
