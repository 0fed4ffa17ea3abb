"""Starts of Pilotflame as shipped, in an empty folder and on a free port, until it answers."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.http1 import BenchmarkApi, ConnectionLost, KeptConnection

PROJECT = Path(__file__).parent.parent
READY_SECONDS = 60
STOP_SECONDS = 30
POLL_SECONDS = 0.01

RunningProcesses = Mapping[str, "subprocess.Popen[bytes]"]


class ProcessEnded(Exception):
    """A process ended by itself or was not ready in time. The text is the end of its output."""


@dataclass(frozen=True, slots=True)
class ServerUnderTest:
    """Server that answers requests, and the ids of its processes by name."""

    api: BenchmarkApi
    process_ids: Mapping[str, int]
    folder: Path
    """Its data and logs."""
    started_at: float
    """By `perf_counter`."""
    ready_seconds: float


@asynccontextmanager
async def run_dev(
    folder: Path,
    settings: Mapping[str, str] | None = None,
    *,
    checkout: Path = PROJECT,
    program: Sequence[str] = ("pilotflame",),
) -> AsyncIterator[ServerUnderTest]:
    """Run `pilotflame dev` on SQLite in `folder` during the block, and yield it once it is ready.

    Settings are named without `PILOTFLAME_`. Raises `ProcessEnded` if it isn't ready in time.
    """
    port = find_free_port()
    api = BenchmarkApi(port, f"sk-{secrets.token_urlsafe(32)}")
    commands = {"dev": [*program, "dev", "--port", str(port)]}
    variables = build_environment(api, folder, checkout, settings)
    async with _wait_until_answering(api, commands, variables, folder, checkout) as pilotflame:
        yield pilotflame


PROCESSES = ("gateway", "worker", "scheduler", "deployer")


@asynccontextmanager
async def run_production(
    folder: Path,
    database_url: str,
    redis_url: str | None,
    settings: Mapping[str, str] | None = None,
    *,
    names: Sequence[str] = PROCESSES,
    checkout: Path = PROJECT,
) -> AsyncIterator[ServerUnderTest]:
    """Run processes of the Procfile on a database, which is migrated first,
    and a Redis if there is one, during the block.

    `names` selects the processes. Settings are named without `PILOTFLAME_`. Raises `ProcessEnded` if they aren't ready
    in time.
    """
    api = BenchmarkApi(find_free_port(), f"sk-{secrets.token_urlsafe(32)}")
    variables = build_environment(api, folder, checkout, settings) | {
        "PILOTFLAME_RUNNER_GATEWAY_URL": f"http://127.0.0.1:{api.port}",
        "PILOTFLAME_DATABASE_URL": database_url,
        "PILOTFLAME_SECRET_KEY": secrets.token_urlsafe(48),
        **({} if redis_url is None else {"PILOTFLAME_REDIS_URL": redis_url}),
    }
    subprocess.run(  # noqa: ASYNC221 - nothing else is under way
        ["pilotflame", "migrate"], cwd=checkout, env=variables, check=True, stdout=subprocess.DEVNULL
    )
    commands = {name: command for name, command in read_procfile().items() if name in names}
    async with _wait_until_answering(api, commands, variables, folder, checkout) as pilotflame:
        yield pilotflame


def read_procfile() -> dict[str, Sequence[str]]:
    """Return the commands of the Procfile, by the name of the process that each starts."""
    commands = [
        shlex.split(line.partition(":")[2]) for line in (PROJECT / "Procfile").read_text().splitlines()
    ]
    return {command[-1]: command for command in commands}


def build_environment(
    api: BenchmarkApi,
    folder: Path,
    checkout: Path = PROJECT,
    settings: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the environment variables of all processes, without the user's own settings."""
    programs = Path(sys.executable).parent if checkout == PROJECT else checkout / ".venv/bin"
    return environment_as_installed() | {
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]),
        "PILOTFLAME_DATA_DIR": str(folder / "data"),
        "PILOTFLAME_PORT": str(api.port),
        "PILOTFLAME_PUBLIC_URL": f"http://127.0.0.1:{api.port}",
        "PILOTFLAME_BOOTSTRAP_API_KEY": api.key,
        "PILOTFLAME_OUTBOUND_ALLOWED_NETWORKS": "127.0.0.1/32",
        **{f"PILOTFLAME_{name}": value for name, value in (settings or {}).items()},
    }


def environment_as_installed() -> dict[str, str]:
    """Return this environment without the user's own settings, and with compiled modules, as wheel and image
    have them: a variable that keeps Python from writing them would make every start compile a thousand modules.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PILOTFLAME_") and name != "PYTHONDONTWRITEBYTECODE"
    }


def find_free_port() -> int:
    """Return an unused port."""
    with socket.create_server(("127.0.0.1", 0)) as candidate:
        port: int = candidate.getsockname()[1]
    return port


@contextmanager
def run_commands(
    commands: Mapping[str, Sequence[str]],
    variables: Mapping[str, str],
    folder: Path,
    checkout: Path = PROJECT,
) -> Iterator[RunningProcesses]:
    """Run commands during the block, each with its own log; they are stopped after it,
    and killed if this process dies.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with log_file(name, folder).open("ab") as log:
                processes[name] = subprocess.Popen(
                    ["setpriv", "--pdeathsig=KILL", *command],
                    cwd=checkout,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C ends the benchmark, and it ends them
                )
        yield processes
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        for process in processes.values():
            _wait_or_kill(process)


def log_file(name: str, folder: Path) -> Path:
    """Return the file that a process writes to."""
    return folder / f"{name}.log"


def require_running(processes: RunningProcesses, folder: Path) -> None:
    """Raise `ProcessEnded`, with the end of its log, for a process that has ended."""
    for name, process in processes.items():
        if process.poll() is not None:
            said = log_file(name, folder).read_text(errors="replace")
            raise ProcessEnded(f"{name} ended with status {process.returncode}:\n{said[-4000:]}")


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@asynccontextmanager
async def _wait_until_answering(
    api: BenchmarkApi,
    commands: Mapping[str, Sequence[str]],
    variables: Mapping[str, str],
    folder: Path,
    checkout: Path,
) -> AsyncIterator[ServerUnderTest]:
    """Run commands during the block, and yield the server once it is ready;
    raises `ProcessEnded` if it isn't in time.
    """
    started_at = perf_counter()
    with run_commands(commands, variables, folder, checkout) as processes:
        while not await is_ready(api):
            require_running(processes, folder)
            if perf_counter() - started_at > READY_SECONDS:
                raise ProcessEnded(f"Not ready after {READY_SECONDS} seconds; see {folder}")
            await asyncio.sleep(POLL_SECONDS)
        ready_seconds = perf_counter() - started_at
        process_ids = {name: process.pid for name, process in processes.items()}
        yield ServerUnderTest(api, process_ids, folder, started_at, ready_seconds)


async def is_ready(api: BenchmarkApi) -> bool:
    """Return whether the gateway answers `/readyz` with 200; False also if none listens."""
    try:
        connection = await KeptConnection.open(api.port)
    except OSError:
        return False
    try:
        return (await connection.send(api.get("/readyz"))).status == 200
    except ConnectionLost:
        return False
    finally:
        connection.close()
