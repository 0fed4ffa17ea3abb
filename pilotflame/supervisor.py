"""Command `pilotflame server`: gateway, worker and scheduler of one machine as children of one process.

It restarts a child that ends, and stops them in order. It listens for the gateway, so that connections wait while the
gateway restarts, and a second server on the same port is refused at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from pilotflame.command_error import REFUSED, CommandError

FIRST_PAUSE_SECONDS: Final = 0.25
LONGEST_PAUSE_SECONDS: Final = 30.0
STABLE_SECONDS: Final = 60.0
"""A child that ran for longer begins with the first pause again."""
STOP_SECONDS: Final = 60.0
"""Seconds from the stop signal of a child to its SIGKILL; longer than any process takes to drain."""
STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
STOP_ORDER: Final = ("deployer", "gateway", "worker", "scheduler")
"""The deployer first, whose pods hand off their runs to the gateway; then no more requests; then the runs."""
LISTEN_VARIABLE: Final = "PILOTFLAME_LISTEN_FD"
SET_PARENT_DEATH_SIGNAL: Final = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
KILLED: Final = 128
"""Offset of exit codes for signals, as in shells."""

log = structlog.get_logger()


def next_pause(pause_seconds: float, lived_seconds: float) -> float:
    """Return the seconds to wait before the next start of a child: twice the last pause, from 0.25 to 30 seconds.

    After a life of 60 seconds, it is the shortest pause.
    """
    if lived_seconds >= STABLE_SECONDS:
        return FIRST_PAUSE_SECONDS
    return min(max(2 * pause_seconds, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)


@dataclass
class SupervisedChild:
    """A process that is restarted when it ends."""

    name: str
    listener: socket.socket | None = None
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    pause_seconds: float = 0.0
    restart_at: float = 0.0
    starts: int = 0

    def start(self) -> None:
        """Start the process; it gets SIGTERM if this process dies."""
        environment = dict(os.environ)
        passed: list[int] = []
        if self.listener is not None:
            passed = [self.listener.fileno()]
            environment[LISTEN_VARIABLE] = str(passed[0])
        parent = os.getpid()

        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
                if os.getppid() != parent:
                    os._exit(KILLED + signal.SIGTERM)

        self.process = subprocess.Popen(  # noqa: S603 - this program itself
            [sys.executable, "-m", "pilotflame", self.name],
            env=environment,
            pass_fds=passed,
            preexec_fn=prepare,  # noqa: PLW1509 - no other thread holds locks that it needs
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which stops its children in order.
        )
        self.started_at = time.monotonic()
        self.starts += 1
        log.info("process started", process=self.name, pid=self.process.pid)

    def note_end(self) -> int | None:
        """Return the exit code of a process that has ended, once, and plan its restart; None while it runs or
        after that.
        """
        code = None if self.process is None else self.process.poll()
        if code is None:
            return None
        now = time.monotonic()
        self.process = None
        self.pause_seconds = next_pause(self.pause_seconds, now - self.started_at)
        self.restart_at = now + self.pause_seconds
        return code


class Supervisor:
    """Children of a server, in the order of their stop."""

    def __init__(self, names: Sequence[str], listener: socket.socket) -> None:
        self._children = [
            SupervisedChild(name, listener if name == "gateway" else None)
            for name in STOP_ORDER
            if name in names
        ]

    def run(self) -> int:
        """Run the children until a stop signal, and restart those that end.

        Return the exit code: 0 if every child ended with 0 after the signal, else 1. No child outlives the
        call.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
        try:
            for child in reversed(self._children):
                child.start()
            return self._keep_running()
        finally:
            self._kill()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _keep_running(self) -> int:
        while True:
            if self._wait(self._seconds_to_restart()) in STOP_SIGNALS:
                return self._stop()
            for child in self._children:
                if (code := child.note_end()) is not None:
                    if code == REFUSED and child.starts == 1:
                        # Its own message says what is wrong, and nothing changes until the user does.
                        log.error("process refused to start", process=child.name)
                        self._stop()
                        return REFUSED
                    log.warning(
                        "process ended", process=child.name, code=code, restart_seconds=child.pause_seconds
                    )
                if child.process is None and child.restart_at <= time.monotonic():
                    child.start()

    def _seconds_to_restart(self) -> float:
        due = [child.restart_at for child in self._children if child.process is None]
        return max(min(due) - time.monotonic(), 0.01) if due else LONGEST_PAUSE_SECONDS

    def _stop(self) -> int:
        """Stop the children one after the other, and return the exit code: 0 if all exited with 0, else 1.

        A child that takes longer than 60 seconds is killed. Another stop signal reaches all that are left at
        once.
        """
        log.info("server stops")
        code = 0
        for child in self._children:
            if (process := child.process) is None:
                continue
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while process.poll() is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    process.kill()
                if self._wait(max(left, 0.1)) in STOP_SIGNALS:
                    self._signal_all(signal.SIGTERM)
            child.process = None
            if process.returncode != 0:
                code = code or 1
                log.warning("process ended", process=child.name, code=process.returncode)
        return code

    def _signal_all(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.process is not None:
                child.process.send_signal(number)

    def _kill(self) -> None:
        """Kill all children that still run, also after an error of this process, and wait for their end."""
        self._signal_all(signal.SIGKILL)
        for child in self._children:
            if child.process is not None:
                child.process.wait()

    def _wait(self, seconds: float) -> int | None:
        """Return the number of the next stop signal or SIGCHLD; None if none arrives within `seconds`."""
        arrived = signal.sigtimedwait({*STOP_SIGNALS, signal.SIGCHLD}, seconds)
        return None if arrived is None else arrived.si_signo


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket for the gateway; raises `CommandError` if another process listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CommandError(
            f"Port {port} of {host} is not available ({error.strerror}): stop the server that uses it,"
            " or set PILOTFLAME_PORT"
        ) from error
