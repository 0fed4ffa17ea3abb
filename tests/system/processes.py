"""Server processes, and the faults that tests inject into them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.command_runs import COMMAND
from tests.forks import ForkedCommand
from tests.system.wait_conditions import wait_until

SHUTDOWN_SECONDS = 60.0
"""Within this time of SIGTERM a process has ended."""
CONNECT_SECONDS = 0.2
UNREAD_SECONDS = 0.5
"""Delay until the test reads a request that a process sent before it died."""

LOOK_SECONDS = 0.001
"""Pause between looks at the state of a process that is about to change, in which it has the processor."""
STOPPED = "T"
GONE = ("", "Z", "X")
"""States of processes that a signal has stopped, and of those that have ended."""

ABANDONED = re.compile(r'"event":"run abandoned".*?"execution_id":"(\w+)"')


@dataclass(slots=True)
class InjectedFault:
    """Fault that a test injected into a process with runs, or into the database, with its duration; a kill
    has none.
    """

    what: str
    began_at: float
    """Unix time."""
    ended_at: float

    def lies_between(self, earlier: float, later: float) -> bool:
        """Return whether the fault may explain a repetition: it overlaps the time from `earlier` to `later`."""
        return self.began_at <= later and earlier <= self.ended_at + UNREAD_SECONDS


class SystemProcess:
    """One process of a deployment, under the name that it has in the Procfile."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        faults: list[InjectedFault],
    ) -> None:
        self.name = name
        self.environment = dict(environment)
        self._arguments = arguments
        self._folder = folder
        self._log = folder / f"{name}.log"
        self._log.touch()
        self._log_start = 0
        self._heard_to = 0
        self._faults = faults
        self._has_runs = arguments[0] in {"worker", "dev"}
        self._has_http = arguments[0] in {"gateway", "dev"}
        self._pause: InjectedFault | None = None
        self._process: ForkedCommand | subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process has been started and has not ended; also while it is paused."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_at_work(self) -> bool:
        """Whether the process has started and isn't paused."""
        if not self.is_alive or self._pause is not None:
            return False
        if self._has_http:
            return _is_listening(int(self.environment["PILOTFLAME_PORT"]))
        return "ready" in self.log()

    def start(self) -> None:
        """Start the process, which must not be alive; its log continues."""
        assert not self.is_alive
        self._log_start = self._log.stat().st_size
        if "PYTHONPATH" in self.environment:
            # It has damaged code, or that of another version, which a fork of the loaded command never reads.
            self._process = self._execute()
        else:
            self._process = ForkedCommand(
                COMMAND, self._arguments, self.environment, (self._log, self._log), self._folder
            )

    def _execute(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [COMMAND, *self._arguments],
                env=self.environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ensure_started(self) -> None:
        """Start the process unless it lives."""
        if not self.is_alive:
            self.start()

    def kill(self) -> None:
        """Kill the process with SIGKILL, as a crash would, and wait until it and its child are gone."""
        now = time.time()
        self._note(InjectedFault(f"{self.name} killed", now, now))
        self._end_pause()
        family = self._family()
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()
        while any(_read_state(process) not in GONE for process in family):
            # A worker dies with its parent within milliseconds, during which no other fault may strike.
            time.sleep(LOOK_SECONDS)

    def pause(self) -> None:
        """Stop the process with SIGSTOP, unnoticed by others; return once it is stopped."""
        self._end_pause()  # of another fault, if two strike at once
        self._pause = InjectedFault(f"{self.name} paused", time.time(), float("inf"))
        self._note(self._pause)
        family = self._family()
        for process in family:
            _send(process, signal.SIGSTOP)
        while any(_read_state(process) not in {STOPPED, *GONE} for process in family):
            time.sleep(LOOK_SECONDS)  # it takes microseconds, during which no other fault may strike

    def resume(self) -> None:
        """Continue the process with SIGCONT after a pause."""
        for process in self._family():
            _send(process, signal.SIGCONT)
        self._end_pause()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the process during a block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def terminate(self) -> None:
        """Ask the process to end with SIGTERM, as a deployment of a new version does."""
        self._signal(signal.SIGTERM)

    async def exit_code(self, within: float = SHUTDOWN_SECONDS) -> int:
        """Wait for the end of the process and return its exit code; raises TimeoutError."""
        process = self._process
        assert process is not None
        await wait_until(lambda: process.poll() is not None, within, what=f"{self.name} ends")
        return process.wait()

    def twin(self) -> SystemProcess:
        """Return another process of the same kind and environment, not yet started."""
        return SystemProcess(
            f"{self.name}-twin", self._arguments, self.environment, self._folder, self._faults
        )

    def log(self) -> str:
        """Return the log of the process since its last start."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def has_logged(self, event: str, execution_id: str) -> bool:
        """Return whether a line of the log since the last start has both the event and the execution id."""
        return any(event in line and execution_id in line for line in self.log().splitlines())

    def abandoned(self) -> list[str]:
        """Return the ids of executions that the process has ever given up because it had lost their leases."""
        return ABANDONED.findall(self._log.read_text(errors="replace"))

    def complaints(self) -> list[str]:
        """Return the log lines with errors since the last call."""
        with self._log.open("rb") as log:
            log.seek(self._heard_to)
            lines = log.readlines()
            self._heard_to = log.tell()
        return [line.decode() for line in lines if b'"level":"error"' in line or b"Traceback" in line]

    def has_socket(self, sockets: Collection[str]) -> bool:
        """Return whether the process has one of these sockets open."""
        return self.is_alive and any(not _read_descriptors(one).isdisjoint(sockets) for one in self._family())

    def _family(self) -> list[int]:
        """Return the id of the process, and of a worker also that of the child that executes the runs.

        The list is empty if the process is gone.
        """
        if _read_state(self.process_id) in GONE:
            return []
        if self._arguments[0] != "worker":
            return [self.process_id]
        return [self.process_id, *_find_children(self.process_id)[:1]]

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _note(self, fault: InjectedFault) -> None:
        if self._has_runs:
            self._faults.append(fault)

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.ended_at = time.time()
            self._pause = None


def find_sockets(port: int) -> Collection[str]:
    """Return the sockets of all IPv4 connections with this local port, as the descriptors of their processes name them.

    Several have it if they lead to different servers. The kernel's list is read once: psutil would read it again for
    each process, and decode all of it.
    """
    end = f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    connections = [line.split() for line in lines if end in line]
    return {f"socket:[{fields[9]}]" for fields in connections if fields[1].endswith(end)}


def _read_descriptors(process_id: int) -> set[str]:
    """Return the targets of all open descriptors of a process; none if it is gone or about to go."""
    targets = set()
    with suppress(FileNotFoundError, PermissionError, ProcessLookupError):
        for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
            with suppress(FileNotFoundError):
                targets.add(str(descriptor.readlink()))
    return targets


def _find_children(process_id: int) -> list[int]:
    """Return the ids of the children of a process, in their order, by the lists that the kernel keeps of them.

    To find them by their parents, as psutil does, every process of the machine would be read.
    """
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{process_id}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                children += map(int, (thread / "children").read_text().split())
    return sorted(children)


def _read_state(process_id: int) -> str:
    """Return the letter that the kernel gives for the state of a process; none if there is no such process."""
    with suppress(FileNotFoundError, ProcessLookupError):
        # The name of the program before it may contain spaces and parentheses.
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _send(process_id: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, number)


def _is_listening(port: int) -> bool:
    with socket.socket() as client:
        # While a process neither accepts nor refuses, a connection would hold up this event loop for a minute.
        client.settimeout(CONNECT_SECONDS)
        return client.connect_ex(("127.0.0.1", port)) == 0
