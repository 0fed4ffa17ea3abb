"""Processes that are forked from one that has loaded the command, since most of a start's time is loading code."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import workers.deployer.main
from pilotflame import commands, migration_process
from pilotflame.command import main
from tests import relay_server

LOADED = (
    "alembic.command",
    "gateway.main",
    "pilotflame.accounts",
    "pilotflame.all_in_one",
    "pilotflame.cli",
    "pilotflame.dev",
    "runner.main",
    "scheduler.main",
    "workers.main",
    "workers.deployer.main",
    # Modules that the processes and commands load when they first need them.
    *(module.name for module in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}.")),
    "aiohttp",
    "apscheduler.executors.asyncio",
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.kdf.hkdf",
    "encodings.idna",
    "httpcore2",
    "httpx2",
    "jsonschema_rs",
    "journal.postgresql.postgresql_store",
    "journal.sqlite.sqlite_store",
    "messages.local_broker",
    "messages.redis_broker",
    "models.postgresql_sessions",
    "models.sqlite_driver",
    "nodes.library.agent",
    "nodes.library.llm",
    "nodes.library.manual",
    "opentelemetry.sdk.metrics",
    "pilotflame.live_view",
    "pilotflame.worker_files",
    "pilotflame_sdk.client",
    "pilotflame_sdk.profiles",
    "pilotflame_sdk.server_events",
    "pilotflame_sdk.worker",
    "pilotflame_sdk.worker_connection",
    "pilotflame_sdk.workflow_files",
    "runner.settings",
    "telemetry.exposition",
    "typer._adapters",
    "typer._click._textwrap",
    "typer._click.decorators",
    "uvicorn.lifespan.off",
    "uvicorn.lifespan.on",
    "yaml",
    "tests.integration.dies_at_commit",
    "tests.relays",
    "tests.frozen_heap",
)
PRELOAD = "LD_PRELOAD"

_MODULES = ["tests.paused_collections", "tests.forks", *LOADED]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_MODULES)


class ForkedProcess:
    """Function in a process and a session of its own, with those methods of `subprocess.Popen` that tests need."""

    def __init__(
        self, function: Callable[..., object], *arguments: object, preload: str | None = None
    ) -> None:
        """Start the process, which dies with the tests. Function and arguments must be picklable.

        `preload` is the file of a library that the dynamic linker has loaded into it before all others.
        """
        # A daemon: else the tests would wait for it in the end.
        self._process = _context.Process(target=_run_forked, args=(function, arguments), daemon=True)
        if preload is None:
            self._process.start()
            return
        # The module knows one server only.
        connect = _start_server(preload).connect_to_new_process
        with patch.object(forkserver, "connect_to_new_process", connect):
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("pilotflame", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        # A process that ends between the two is gone, though no exit code is known yet.
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedCommand(ForkedProcess):
    """Command `pilotflame` in a process of its own."""

    def __init__(
        self,
        command: Path,
        arguments: Sequence[str],
        given: Mapping[str, str],
        outputs: tuple[Path, Path],
        folder: Path | None = None,
        source: Path | None = None,
        relay: Path | None = None,
    ) -> None:
        """Start the process with `given` as its whole environment.

        Its output is appended to two files, for stdout and stderr, or to one that is named twice. `source` is the file
        of its standard input, `folder` its working folder. The command starts pods and migrations by the file
        `relay`, if it is given. `LD_PRELOAD` may name the library of a shifted clock.
        """
        typed = [str(command), *arguments]
        super().__init__(
            _run_command,
            typed,
            dict(given),
            outputs,
            folder or Path.cwd(),
            source or Path(os.devnull),
            relay,
            preload=given.get(PRELOAD),
        )


class ForkedProgram(ForkedProcess):
    """Python file that runs as `python FILE` would, in a process that has loaded the SDK; it may have no children of
    `multiprocessing`.
    """

    def __init__(
        self, file: Path, given: Mapping[str, str], outputs: tuple[Path, Path], folder: Path | None = None
    ) -> None:
        """Start the process with `given` as its whole environment; `outputs` and `folder` are as of a command."""
        super().__init__(_run_program, file, dict(given), outputs, folder or Path.cwd())


@functools.cache
def _start_server(preload: str) -> forkserver.ForkServer:
    """Start a process that has loaded the command, and a library before it, and return its client."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(_MODULES)
    with patch.dict(os.environ, {PRELOAD: preload}):
        server.ensure_running()
    return server


def _run_forked(function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Call a function in this new process."""
    relay_server.lead_session()
    function(*arguments)


def _run_command(
    typed: Sequence[str],
    given: Mapping[str, str],
    outputs: tuple[Path, Path],
    folder: Path,
    source: Path,
    relay: Path | None,
) -> None:
    """Run the command in this process, with its environment, folder, standard input and outputs replaced."""
    with source.open("rb") as given_input:
        os.dup2(given_input.fileno(), 0)
    _redirect(outputs)
    run_here(typed, given, folder, relay)


def _run_program(file: Path, given: Mapping[str, str], outputs: tuple[Path, Path], folder: Path) -> None:
    """Run a Python file in this process, with its environment, folder and outputs replaced."""
    _redirect(outputs)
    _move(given, folder)
    sys.argv = [str(file)]
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name="__main__")


def _redirect(outputs: tuple[Path, Path]) -> None:
    """Append stdout and stderr of this process to two files."""
    for descriptor, file in zip((1, 2), outputs, strict=True):
        with file.open("ab") as sink:
            os.dup2(sink.fileno(), descriptor)


def _move(given: Mapping[str, str], folder: Path) -> None:
    """Replace the environment and the folder of this process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(given)


def run_here(typed: Sequence[str], given: Mapping[str, str], folder: Path, relay: Path | None) -> None:
    """Run the command in this process, in a folder, with `given` as its whole environment.

    It starts pods and migrations by the file `relay`, if it is given.
    """
    if relay is not None:
        # They are constants of the command.
        setattr(workers.deployer.main, "LOCAL_COMMAND", (str(relay), "runner"))  # noqa: B010 - it is `Final`
        setattr(migration_process, "MIGRATE_COMMAND", (str(relay), "migrate"))  # noqa: B010 - so is it
    _move(given, folder)
    if PRELOAD in given:
        # The environment in which the library was loaded did not name the file of this process's clock.
        ctypes.CDLL(None).map_shift()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = [*typed]
    main()
