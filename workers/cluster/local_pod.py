"""Local pod: a subprocess on a loopback port with its own folder, restarted until it is stopped."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import msgspec
from msgspec import Struct

from models.oom_kills import OomKillWatch
from models.timestamps import HOST_TIME
from workers.cluster import local_process
from workers.cluster.atomic_files import replace_file
from workers.cluster.driver import (
    HOST_VARIABLE,
    POD_VARIABLE,
    PORT_VARIABLE,
    READINESS_PATH,
    TOKEN_VARIABLE,
    DesiredDeployment,
    ObservedPod,
    PodFailure,
    PodFailureReason,
    PodStage,
)

HOST = "127.0.0.1"
POD_FILE = "pod.json"
LOG_FILE = "log"
ROTATED_LOG_FILE = "log.1"
WORK_FOLDER = "work"
SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
LAST_WORDS_BYTES = 2_000
FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 30.0
MAX_DOUBLINGS = 10
STABLE_SECONDS = 10.0
"""Ready time after which a crash doesn't count as one of a crash loop."""
PROBE_TIMEOUT_SECONDS = 2.0
STARTING_PROBE_SECONDS = 0.05
PROBE_SECONDS = 1.0
PROBE_FAILURES = 3
BIRTH_PROBES = 20


class LocalPodLimits(Struct, frozen=True):
    """Limits of a local pod."""

    grace_seconds: float = 75.0
    """Time from SIGTERM to SIGKILL. Runs have 60 s of it to finish, and are then handed off."""
    log_bytes: int = 1_000_000
    """Size of each of its two log files."""


class LocalPodRecord(msgspec.Struct, frozen=True):
    """Record of a pod, by which a later deployer finds it."""

    template: str
    definition_hash: str
    boot_id: str = ""
    port: int = 0
    terminating_since: float | None = None
    """Unix time."""


class LocalPod:
    """Pod that supervises its own process."""

    def __init__(
        self,
        folder: Path,
        record: LocalPodRecord,
        session: aiohttp.ClientSession,
        limits: LocalPodLimits,
        changed: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.record = record
        self.is_ready = False
        self.is_gone = False
        self.failure: PodFailure | None = None
        self.ended_at: datetime | None = None
        self._is_out_of_memory = False
        self._oom_kills = OomKillWatch()
        self._session = session
        self._limits = limits
        self._changed = changed
        self._stop = asyncio.Event()
        self._failures = 0
        self._ready_since: float | None = None
        if self.is_terminating:
            self._stop.set()

    @property
    def is_terminating(self) -> bool:
        return self.record.terminating_since is not None

    @property
    def address(self) -> str | None:
        return f"http://{HOST}:{self.record.port}" if self.record.port else None

    @property
    def observed(self) -> ObservedPod:
        """State of the pod, as the driver reports it."""
        return ObservedPod(
            name=self.folder.name,
            definition_hash=self.record.definition_hash,
            address=self.address,
            is_ready=self.is_ready and not self.is_terminating,
            is_terminating=self.is_terminating,
            stage=PodStage.READY if self.is_ready else PodStage.STARTED,
            ended_at=self.ended_at,
            failure=None if self.is_terminating else self.failure,
            is_out_of_memory=self._is_out_of_memory,
        )

    def stop(self) -> None:
        """Mark the pod as terminating, durably in its record: its process gets SIGTERM now, and SIGKILL after
        the grace period.
        """
        if not self.is_terminating:
            self._save_record(terminating_since=HOST_TIME.seconds())
            self._stop.set()

    async def end(self, patience_seconds: float) -> None:
        """End the process of a pod that nobody supervises any more: SIGTERM, then SIGKILL after `patience_seconds`;
        keep its folder.
        """
        running = local_process.find_process(self.folder / WORK_FOLDER)
        if running is None or not running.is_alive:
            return
        running.send(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_seconds):
                await running.wait_ended()
        running.kill_session()

    async def supervise(self, desired: DesiredDeployment) -> None:
        """Run the program, and again after each exit with growing pauses, until the pod is stopped; then
        remove its folder.

        A process that an earlier deployer has started is taken over.
        """
        running = await self._find_process()
        if running is not None:
            await self._watch_until_exit(running)
        while not self.is_terminating:
            try:
                running = self._start(desired)
            except OSError as error:
                message = f"The program could not be started: {error}"
                is_final = isinstance(error, FileNotFoundError | PermissionError)
                await self._back_off_after(
                    PodFailure(PodFailureReason.NOT_CREATED, message, is_final=is_final)
                )
                continue
            await self._watch_until_exit(running)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.is_gone = True
        self._changed()

    async def _find_process(self) -> local_process.LocalProcess | None:
        """Return the process that an earlier deployer has started, if it is alive; otherwise None."""
        if not self.record.port or self.record.boot_id != local_process.read_boot_id():
            return None
        for _ in range(
            BIRTH_PROBES
        ):  # a process that was just being started may not have written its birth file yet
            found = local_process.find_process(self.folder / WORK_FOLDER)
            if found is not None:
                return found if found.is_alive else None
            await asyncio.sleep(STARTING_PROBE_SECONDS)
        return None

    def _start(self, desired: DesiredDeployment) -> local_process.LocalProcess:
        """Start the program with a free port, in the pod's work folder, and return its process; raises `OSError`."""
        work = self.folder / WORK_FOLDER
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._save_record(boot_id=local_process.read_boot_id(), port=_find_free_port())
        if self.ended_at is not None:
            # Set again: if the clock was set back since, the new process starts by that clock too.
            self.ended_at = datetime.now(UTC)  # noqa: TID251 - compared with its process's own start
        environment = {
            "PATH": SEARCH_PATH,
            "LANG": "C.UTF-8",
            "HOME": str(work),
            "TMPDIR": str(work),
            **desired.environment,
            HOST_VARIABLE: HOST,
            PORT_VARIABLE: str(self.record.port),
            POD_VARIABLE: self.folder.name,
            TOKEN_VARIABLE: desired.token,
        }
        return local_process.start_process(
            desired.command, folder=work, log=self.folder / LOG_FILE, environment=environment
        )

    async def _watch_until_exit(self, running: local_process.LocalProcess) -> None:
        """Probe the program until it exits; after a crash, report the failure and wait before the caller
        restarts it.
        """
        helpers = [asyncio.create_task(self._probe_readiness()), asyncio.create_task(self._drain(running))]
        try:
            code = await running.wait_ended()
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        self.ended_at = datetime.now(UTC)  # noqa: TID251 - as above
        self._is_out_of_memory = self._oom_kills.was_oom_kill(code)
        if not self.is_terminating:
            reason = PodFailureReason.OUT_OF_MEMORY if self._is_out_of_memory else PodFailureReason.CRASH_LOOP
            await self._back_off_after(PodFailure(reason, self._exit_message(code)))

    async def _back_off_after(self, failure: PodFailure) -> None:
        """Report a failure of the process, and wait before the next start: 0.2 s doubled by each failure, at
        most 30 s.

        Ten seconds of readiness reset the count. A stop of the pod ends the wait.
        """
        steady = self._ready_since is not None and time.monotonic() - self._ready_since > STABLE_SECONDS
        self._failures = 0 if steady else min(self._failures + 1, MAX_DOUBLINGS)
        self._set_ready(is_ready=False)
        self.failure = failure
        self._changed()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(FIRST_PAUSE_SECONDS * 2**self._failures, MAX_PAUSE_SECONDS)):
                await self._stop.wait()

    async def _drain(self, running: local_process.LocalProcess) -> None:
        """Wait for the stop of the pod, then send SIGTERM, and SIGKILL after the grace period."""
        await self._stop.wait()
        running.send(signal.SIGTERM)
        # Never longer than its grace, even if the clock was set back since an earlier deployer stopped it.
        grace_seconds = self._limits.grace_seconds
        since = self.record.terminating_since or HOST_TIME.seconds()
        await asyncio.sleep(min(since + grace_seconds - HOST_TIME.seconds(), grace_seconds))
        running.kill_session()

    async def _probe_readiness(self) -> None:
        """Probe readiness until canceled: each second, and every 0.05 s while it is not ready; three failures
        end readiness.

        Each round also rotates a large log and looks for kills for lack of memory.
        """
        misses = 0
        while True:
            if await self._is_answering():
                misses = 0
                self._set_ready(is_ready=True)
            elif self.is_ready:
                misses += 1
                if misses >= PROBE_FAILURES:
                    self._set_ready(is_ready=False)
            self._rotate_log()
            self._oom_kills.refresh()
            await asyncio.sleep(PROBE_SECONDS if self.is_ready else STARTING_PROBE_SECONDS)

    async def _is_answering(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_SECONDS)
        try:
            async with self._session.get(f"{self.address}{READINESS_PATH}", timeout=timeout) as response:
                return response.ok
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def _set_ready(self, *, is_ready: bool) -> None:
        if is_ready == self.is_ready:
            return
        self.is_ready = is_ready
        self._ready_since = time.monotonic() if is_ready else None
        if is_ready:
            self.failure = None
        self._changed()

    def _rotate_log(self) -> None:
        """Copy the end of a large log to another file, in place of the last copy, and truncate it.

        The program keeps its descriptor of the file. A failure is ignored.
        """
        log = self.folder / LOG_FILE
        with suppress(OSError):  # repeated in a second
            if log.stat().st_size > self._limits.log_bytes:
                (self.folder / ROTATED_LOG_FILE).write_bytes(_read_tail(log, self._limits.log_bytes))
                os.truncate(log, 0)

    def log_lines(self, limit: int) -> Sequence[str]:
        """Return up to `limit` last lines of the pod's log, also from the file before the last rotation."""
        lines: list[str] = []
        for name in (ROTATED_LOG_FILE, LOG_FILE):
            with suppress(FileNotFoundError):
                lines += (
                    _read_tail(self.folder / name, self._limits.log_bytes)
                    .decode(errors="replace")
                    .splitlines()
                )
        return lines[-limit:]

    def _exit_message(self, code: int | None) -> str:
        message = f"The program in the pod {_describe_exit(code)}"
        with suppress(FileNotFoundError):
            words = _read_tail(self.folder / LOG_FILE, LAST_WORDS_BYTES).decode(errors="replace").strip()
            return f"{message}: {words}" if words else message
        return message

    def _save_record(self, **changes: str | float) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(self.folder / POD_FILE, msgspec.json.encode(self.record))


def new_pod_name(deployment: str) -> str:
    """Return a random name for a new pod, which begins with the name of its deployment."""
    return f"{deployment}-{secrets.token_hex(4)}"


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "ended"
    return f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def _find_free_port() -> int:
    """Return a port of this machine that is free now.

    If another process takes it first, the program crashes and gets another port.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _read_tail(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read(size)
