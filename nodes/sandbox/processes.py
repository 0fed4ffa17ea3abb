"""Pool of child processes for untrusted or long work, which must not run on the worker's event loop.

A child starts on demand, and ends after an idle time. A failure of one ends its job alone: a child that exceeds its
time limit, or whose job is abandoned, is killed with everything that it has started.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from concurrency.loop_share import LoopShare
from engine.node_api import NodeResult
from engine.run_errors import NodeError
from nodes.output_sizes import MAXIMUM_BYTES
from nodes.sandbox.fairness import FairSlots
from nodes.sandbox.frames import (
    HEADER,
    FrameTag,
    InvalidFrame,
    ValueAssembler,
    decode_failure,
    decode_frame,
    decode_line,
    decode_paths,
    decode_port,
    encode_frame,
    parse_header,
)

if TYPE_CHECKING:
    from asyncio.subprocess import Process

IDLE_SECONDS = 60.0
START_SECONDS = 30.0
GRACE_SECONDS = 0.5
"""Extra time for a child that enforces its own time limit: it can report the timeout, and needs no replacement."""
BUSY_SECONDS = 240.0
"""Working time after which a child is replaced, before it reaches its limit of CPU time."""
MAX_ANSWER_BYTES = 2 * MAXIMUM_BYTES
"""Maximum size of all frames of a job; each counts as a few bytes more than it has."""
FRAME_BYTES = 64
MAX_LOG_LINES = 1_001
SENT_BYTES = 262_144
CHILD_ENVIRONMENT = {"LC_ALL": "C.UTF-8"}
"""Some event loops take an empty environment for a missing one, and would pass on their own."""
LAUNCH_SCRIPT = (
    "import sys; sys.path = sys.argv[3:]; "
    "from nodes.sandbox.children import child; child.main(sys.argv[1], int(sys.argv[2]))"
)


class ProcessKind(StrEnum):
    """Kind of a child process; `nodes.sandbox.children.child` maps it to a module."""

    LIBRARY = "library"
    """Library nodes that compute for long."""
    FORMS = "forms"
    """Validation of people's answers by users' schemas."""
    MONTY = "monty"
    """User code in the Monty interpreter."""
    PYTHON = "python"
    """User code in CPython; each script gets its own child."""
    SQLITE = "sqlite"
    """Users' statements on SQLite files."""


class JobListener(msgspec.Struct, frozen=True):
    """Receiver of the reports of a job besides its result."""

    log: Callable[[str, str], None]
    unresolved: list[str]


class ProcessPool:
    """Pool of child processes of one kind."""

    def __init__(
        self,
        kind: ProcessKind,
        *,
        limit: int,
        idle_seconds: float = IDLE_SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`limit` is the number of jobs that run at once, of which `FairSlots` allows more for fairness.

        `environment` adds variables to those of the children, which end after `idle_seconds` without a job.
        """
        self._kind = kind
        self._environment = {**CHILD_ENVIRONMENT, **(environment or {})}
        self._idle_seconds = idle_seconds
        self._grace_seconds = GRACE_SECONDS if kind in {ProcessKind.MONTY, ProcessKind.SQLITE} else 0
        self._places = FairSlots(limit)
        self._idle: list[ChildProcess] = []
        self._ends: set[asyncio.Task[None]] = set()

    async def run(
        self, job: bytes, listener: JobListener, *, organization_id: str, seconds: float
    ) -> NodeResult:
        """Run an encoded job in a child process, and return its result; `listener` gets its log lines and unresolved
        paths.

        Organizations share the processes fairly; the wait for one doesn't count. Raises the `NodeError` that the job
        has reported, or one with the code `timeout` (after `seconds`, and for some kinds a grace), `crashed` (retryable
        if the child has not started) or `busy` (retryable). A child that has not replied is ended.
        """
        async with self._places.hold(organization_id):
            child = await self._acquire()
            began_at = time.monotonic()
            try:
                async with asyncio.timeout(seconds + self._grace_seconds):
                    outcome = await child.perform(job, listener)
            except TimeoutError as error:
                self._end(child)
                raise NodeError(f"The time limit of {seconds:g} s was exceeded", code="timeout") from error
            except (InvalidFrame, EOFError, OSError) as error:
                self._end(child)
                message = "The process of the node ended unexpectedly"
                raise NodeError(message, code="crashed") from error
            except BaseException:
                self._end(child)
                raise
            child.busy_seconds += time.monotonic() - began_at
            self._release(child)
        if isinstance(outcome, NodeError):
            raise outcome
        return outcome

    async def close(self) -> None:
        """End every idle child process, and wait for all that are ending; running jobs are not awaited."""
        while self._idle:
            self._end(self._idle[-1])
        if self._ends:
            await asyncio.wait(self._ends)

    async def _acquire(self) -> ChildProcess:
        """Return an idle child that is alive, or a new one; raises `NodeError` if none can be started."""
        while self._idle:
            child = self._idle.pop()
            child.keep_alive()
            if child.is_alive:
                return child
            self._end(child)
        return await self._start()

    async def _start(self) -> ChildProcess:
        """Start a child process and return it once it can accept a job; raises a retryable `NodeError` if it fails."""
        try:
            child = await ChildProcess.start(self._kind, self._environment)
        except OSError as error:
            raise NodeError("No process could be started", code="busy", retryable=True) from error
        try:
            async with asyncio.timeout(START_SECONDS):
                await child.wait_ready()
        except (TimeoutError, InvalidFrame, EOFError, OSError) as error:
            self._end(child)
            raise NodeError("The process failed to start", code="crashed", retryable=True) from error
        except BaseException:
            self._end(child)
            raise
        return child

    def _release(self, child: ChildProcess) -> None:
        """Keep a child until it has been idle for `idle_seconds`; end it at once if it runs Python scripts, or has
        worked for long.
        """
        if self._kind is ProcessKind.PYTHON or child.busy_seconds > BUSY_SECONDS:
            self._end(child)
            return
        child.rest = asyncio.get_running_loop().call_later(self._idle_seconds, self._end, child)
        self._idle.append(child)

    def _end(self, child: ChildProcess) -> None:
        """Kill a child, and wait for its end in the background."""
        child.keep_alive()
        child.kill()
        if child in self._idle:
            self._idle.remove(child)
        end = asyncio.create_task(child.wait_ended())
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)


class ChildProcess:
    """Child process, from the view of its parent."""

    def __init__(self, process: Process) -> None:
        self.busy_seconds = 0.0
        self.rest: asyncio.TimerHandle | None = None
        """Timer that ends an idle child."""
        self._process = process
        self._in = cast("asyncio.StreamWriter", process.stdin)
        self._out = cast("asyncio.StreamReader", process.stdout)

    @classmethod
    async def start(cls, kind: ProcessKind, environment: Mapping[str, str]) -> ChildProcess:
        """Start a child in a new session with only this environment; it shares nothing with others but its pipes.

        `wait_ready` must follow. Raises `OSError`.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", "-c", LAUNCH_SCRIPT, kind, str(os.getpid()), *_import_paths()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            cwd="/",
            close_fds=True,
            start_new_session=True,
        )
        return cls(process)

    @property
    def is_alive(self) -> bool:
        """Whether the process is running now; the event loop notices its end a moment later."""
        if self._process.returncode is not None or self._out.at_eof():
            return False
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def keep_alive(self) -> None:
        """Cancel the timer that ends the child when it is idle."""
        if self.rest is not None:
            self.rest.cancel()
            self.rest = None

    async def wait_ready(self) -> None:
        """Wait until the child can accept a job, without a time limit; raises `InvalidFrame` or `EOFError` if
        it fails before.
        """
        tag, _ = await self._read_frame()
        if tag is not FrameTag.READY:
            raise InvalidFrame("it isn't ready")

    async def perform(self, job: bytes, listener: JobListener) -> NodeResult | NodeError:
        """Send a job and return its result or its error, without a time limit; log lines (1,001 at most) and unresolved
        paths go to `listener`.

        Raises `InvalidFrame`, `EOFError` or `OSError` if the child ends, or violates the protocol or its limit of
        bytes.
        """
        await self._send(encode_frame(FrameTag.JOB, job))
        assembly = ValueAssembler()
        turn = LoopShare()
        received_bytes = lines = 0
        while True:
            tag, body = await self._read_frame()
            received_bytes += len(body) + FRAME_BYTES
            if received_bytes > MAX_ANSWER_BYTES:
                raise InvalidFrame("its answer is too long")
            match tag:
                case FrameTag.LOG if lines < MAX_LOG_LINES:
                    lines += 1
                    listener.log(*decode_frame(decode_line, body))
                case FrameTag.LOG:
                    pass
                case FrameTag.UNRESOLVED:
                    paths = decode_frame(decode_paths, body)
                    listener.unresolved.extend(paths)
                case FrameTag.DONE:
                    return NodeResult(assembly.value(), decode_frame(decode_port, body))
                case FrameTag.FAILED:
                    failure = decode_frame(decode_failure, body)
                    return NodeError(failure.message, code=failure.code, retryable=failure.retryable)
                case _:
                    assembly.add(tag, body)
            await turn.yield_if_due()

    def kill(self) -> None:
        """Kill the child and all processes of its group with SIGKILL; one that has ended is left alone."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait_ended(self) -> None:
        """Wait for the end of a killed child, without a time limit, and close its pipes."""
        self._in.close()
        with suppress(OSError):
            # Unread output must be drained from the pipe, or its end would never be seen.
            while await self._out.read(SENT_BYTES):
                pass
        await self._process.wait()

    async def _send(self, message: bytes) -> None:
        view = memoryview(message)
        for begin in range(0, len(message), SENT_BYTES):
            self._in.write(view[begin : begin + SENT_BYTES])
            await self._in.drain()

    async def _read_frame(self) -> tuple[FrameTag, bytes]:
        length, tag = parse_header(await self._out.readexactly(HEADER.size))
        if length > MAX_ANSWER_BYTES:
            raise InvalidFrame("a frame is too long")
        return tag, await self._out.readexactly(length)


def _import_paths() -> Sequence[str]:
    """Return the import path of this process as absolute paths, for children, which skip the slow module `site`."""
    return [str(Path(entry).absolute()) for entry in sys.path]
