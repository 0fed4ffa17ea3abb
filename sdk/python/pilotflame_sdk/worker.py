"""Worker: a process that runs functions of yours as nodes of workflows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar
from uuid import uuid4

from pilotflame_sdk.errors import (
    ConfigurationError,
    Conflict,
    LoginRequired,
    PilotflameError,
    ScopeRequired,
)
from pilotflame_sdk.held_tasks import HeldTask, HeldTasks
from pilotflame_sdk.node_definitions import NodeDefinition, choose_definition, define_node, retry_rule
from pilotflame_sdk.profiles import ServerAddress, find_server
from pilotflame_sdk.task_channel import TaskChannel
from pilotflame_sdk.task_execution import RELEASE, TaskExecutor
from pilotflame_sdk.tasks import TaskLogHandler
from pilotflame_sdk.transport import Transport
from pilotflame_sdk.version import VERSION
from pilotflame_sdk.worker_connection import connect

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
BLOCKED_SECONDS: Final = 1.0
CLOSE_SECONDS: Final = 5.0
CLAIM_END_SECONDS: Final = 60.0
"""Time in which an open poll ends, also at a server that does not know that the worker stops."""
DRAIN_LOOK_SECONDS: Final = 0.2


class Worker:
    """Runs functions as nodes of workflows: `node` registers a function, `run` serves until SIGTERM.

    `slots` is the number of functions that run at once, `grace` the seconds that running ones get to end after
    SIGTERM. The server is that of the arguments, of PILOTFLAME_URL and PILOTFLAME_API_KEY, or of a profile.
    """

    def __init__(
        self,
        name: str = "",
        *,
        slots: int = 10,
        grace: float = 60.0,
        pools: Sequence[str] = ("default",),
        url: str | None = None,
        api_key: str | None = None,
        profile: str | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError("slots must be at least 1")
        self.name = name or re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())
        self.slots = slots
        self.grace = grace
        self.pools = tuple(pools)
        self.definitions: list[NodeDefinition] = []
        self._find_server = partial(find_server, url, api_key, profile=profile)
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_calls = 0

    def node(  # noqa: PLR0913 - a parameter for each rule of a node type
        self,
        type: str,  # noqa: A002 - the name of the API
        version: str,
        *,
        effect: str = "write",
        timeout: float | None = None,
        retry: int | Mapping[str, Any] | None = None,
        ports: Sequence[str] = ("output",),
        process: bool = False,
        name: str | None = None,
        description: str | None = None,
        category: str | None = None,
        pool: str | None = None,
        concurrency: int | Mapping[str, Any] | None = None,
        lease: float | None = None,
    ) -> Callable[[Function], Function]:
        """Return a decorator that makes a function a node type; the function itself stays as it is.

        The annotation of its config (a dataclass, msgspec struct or pydantic model) becomes the schema of the node's
        config. A plain function runs in a thread, an async one on the event loop, and with `process` a plain one in
        a process of its own, which is killed when the task is cancelled. `retry` is the most attempts, or a rule with
        `maxAttempts`, `delay` and `maxDelay`. Raises `ValueError` and `TypeError`.
        """

        def register(function: Function) -> Function:
            limit = {"limit": concurrency} if isinstance(concurrency, int) else concurrency
            definition = define_node(
                function,
                type,
                version,
                is_process=process,
                fields={
                    "name": name,
                    "description": description,
                    "category": category,
                    "effect": effect,
                    "ports": {"inputs": ["input"], "outputs": list(ports)},
                },
                task_rules={
                    "timeoutSeconds": timeout,
                    "leaseSeconds": lease,
                    "retry": retry_rule(retry),
                    "concurrency": limit,
                    "pool": pool,
                },
            )
            if any((one.type, one.version) == (type, version) for one in self.definitions):
                raise ValueError(f"{type} {version} is registered twice")
            self.definitions.append(definition)
            return function

        return register

    def register(self) -> list[str]:
        """Add the node types to the organization, and return them as `type version`.

        The same content again changes nothing. Raises `Conflict` for other content of a stored version, and
        `ScopeRequired` for a key without the scope `nodes:write`.
        """
        done = []
        with Transport(*self._server_parts()) as server:
            for one in self.definitions:
                try:
                    server.request("POST", "/api/v1/workflow-nodes", json=dict(one.document))
                except Conflict as error:
                    if error.code == "version-exists":
                        error.args = (f"{one.type} {one.version} has changed: give it a new version",)
                    raise
                done.append(f"{one.type} {one.version}")
        return done

    def run(self) -> None:
        """Serve tasks until SIGTERM or SIGINT, then drain: running functions may end within the grace.

        Blocks. Ends the program with a line on standard error if the server refuses the worker, or its address or key
        is missing: `SystemExit` with the exit codes of the command line. Raises `ValueError` without a node.
        """
        try:
            asyncio.run(self._run_until_signal())
        except PilotflameError as error:
            sys.stderr.write(f"worker {self.name}: {error}\n")
            sys.exit(_exit_code(error))

    async def _run_until_signal(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # Windows has no such signals.
                loop.add_signal_handler(number, self.stop)
        await self.serve()

    def stop(self) -> None:
        """Begin to drain: claim no more tasks, and let running functions end; safe to call from any thread.

        A second call ends without waiting for running functions. Does nothing before `serve`.
        """
        loop, stopping = self._loop, self._stopping
        if loop is None or stopping is None:
            return
        self._stop_calls += 1
        if self._stop_calls > 1:
            self.grace = 0.0
        loop.call_soon_threadsafe(stopping.set)

    async def serve(self) -> None:
        """Serve tasks on the running event loop until `stop` is called, then drain.

        Raises `APIError` if the server refuses the worker, and `ValueError` without a node.
        """
        if not self.definitions:
            raise ValueError("The worker has no node: decorate a function with @worker.node(...)")
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        held = HeldTasks(self.slots)
        executor: TaskExecutor  # it reports to the channel, which gives it its tasks

        def start_tasks(tasks: list[HeldTask]) -> None:
            self._start(executor, tasks)

        url, key = self._server_parts()
        channel = TaskChannel(
            partial(connect, url, key), self._identity(), self._types(), self.pools, held, start_tasks
        )
        executor = TaskExecutor(self.slots, self._loop, channel, held.finish)
        # The handler below would silence warnings in programs that have not set up logging.
        logging.basicConfig(format=LOG_FORMAT)
        handler = TaskLogHandler(logging.INFO)
        logging.getLogger().addHandler(handler)
        watch = _LoopWatch(self._loop)
        watch.start()
        channel.start()
        served = ", ".join(f"{one.type} {one.version}" for one in self.definitions)
        sys.stderr.write(f"worker {self.name} serves {served} of {url}, pools {', '.join(self.pools)}\n")
        sys.stderr.flush()
        try:
            await self._wait_for_stop(channel)
        finally:
            await self._drain(channel, held)
            watch.stop()
            logging.getLogger().removeHandler(handler)
        if channel.failure is not None:
            raise channel.failure

    async def _wait_for_stop(self, channel: TaskChannel) -> None:
        assert self._stopping is not None  # noqa: S101 - set by `serve`
        while not self._stopping.is_set() and not channel.draining.is_set():
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 0.2)

    async def _drain(self, channel: TaskChannel, held: HeldTasks) -> None:
        """Let running functions end within the grace (seconds), then ask them to stop, and give their tasks back."""
        give_up_at = time.monotonic() + self.grace
        await asyncio.to_thread(channel.drain)
        await asyncio.to_thread(channel.join_claims, CLAIM_END_SECONDS)
        # `stop` called again sets the grace to 0.
        while held.is_running and self.grace and time.monotonic() < give_up_at:
            await asyncio.to_thread(held.wait_for_change, DRAIN_LOOK_SECONDS)
        for one in held.list_running():
            one.end()
        # Cancelled coroutines and patient functions report by themselves.
        await asyncio.sleep(0.1)
        for one in held.list_running():
            held.finish(one, RELEASE)
        await asyncio.to_thread(channel.close, CLOSE_SECONDS)

    def _start(self, executor: TaskExecutor, tasks: list[HeldTask]) -> None:
        """Start the functions of claimed tasks; tasks without a fitting definition are given to other workers."""
        for held in tasks:
            definition = choose_definition(self.definitions, held.task.type, held.task.version)
            executor.start(held, definition, held.task.config)

    def _server_parts(self) -> tuple[str, str]:
        """Return URL and API key of the worker's server."""
        found: ServerAddress = self._find_server()
        return found.url, found.api_key

    def _identity(self) -> Mapping[str, str]:
        """Return the worker as requests name it, with a new id at each call."""
        # A new id for each start of the process: leases of the one before are not its own.
        return {"id": f"w_{uuid4().hex}", "name": f"{self.name}-{os.getpid()}", "sdk": f"py/{VERSION}"}

    def _types(self) -> list[Mapping[str, str]]:
        return [{"type": one.type, "version": one.version} for one in self.definitions]


def _exit_code(error: PilotflameError) -> int:
    """Return 4 for a missing or refused key, 2 for other wrong settings, and 1 for other refusals."""
    if isinstance(error, (LoginRequired, ScopeRequired)):
        return 4
    return 2 if isinstance(error, ConfigurationError) else 1


class _LoopWatch:
    """Thread that logs where the event loop is blocked."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._seen = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pilotflame-loop-watch", daemon=True)
        self._loop_thread = threading.get_ident()

    def start(self) -> None:
        """Start the watching thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the watching thread."""
        self._stopped.set()

    def _watch(self) -> None:
        """Log a stack trace each time that the event loop is blocked for over a second; the body of the thread."""
        while not self._stopped.wait(BLOCKED_SECONDS / 2):
            self._seen.clear()
            try:
                self._loop.call_soon_threadsafe(self._seen.set)
            except RuntimeError:
                return  # The loop is closed.
            if not self._seen.wait(BLOCKED_SECONDS) and not self._stopped.is_set():
                frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - the documented way
                stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
                log.warning("an async node blocks the event loop for over %s s:\n%s", BLOCKED_SECONDS, stack)
                self._seen.wait()
