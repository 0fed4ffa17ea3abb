"""Command `pilotflame server`: gateway, worker and scheduler of one machine as children of one process.

It forks them after it has loaded their modules, restarts a child that ends, and stops them in order. It listens for the
gateway, so that connections wait while the gateway restarts, and a second server on the same port is refused at once.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from models.timestamps import HOST_TIME
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
SET_NAME: Final = 15
"""PR_SET_NAME of prctl(2): the name that `ps -o comm` and `top` show, of up to 15 bytes."""
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
    """A forked process that is restarted when it ends."""

    name: str
    pid: int | None = None
    """None while it does not run."""
    started_at: float = 0.0
    pause_seconds: float = 0.0
    restart_at: float = 0.0
    starts: int = 0

    def note_start(self, pid: int) -> None:
        """Record that the process was started now with this id, and log it."""
        self.pid = pid
        self.started_at = time.monotonic()
        self.starts += 1
        log.info("process started", process=self.name, pid=pid)

    def reap(self, options: int = os.WNOHANG) -> int | None:
        """Return the exit code of the process once it has ended, negative for a signal;
        None while it runs and in later calls.

        `options` are those of `waitpid`; 0 waits for the end.
        """
        if self.pid is None:
            return None
        reaped, status = os.waitpid(self.pid, options)
        if reaped == 0:
            return None
        self.pid = None
        return os.waitstatus_to_exitcode(status)

    def plan_restart(self) -> None:
        """Set the time of the next start, after the process has ended."""
        now = time.monotonic()
        self.pause_seconds = next_pause(self.pause_seconds, now - self.started_at)
        self.restart_at = now + self.pause_seconds

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process if it runs; it is not reaped yet, so its id belongs to no other process."""
        if self.pid is not None:
            os.kill(self.pid, number)


class Supervisor:
    """Children of a server, in the order of their stop."""

    def __init__(self, names: Sequence[str], listener: socket.socket) -> None:
        """The gateway inherits the socket `listener`."""
        self._listener = listener
        self._children = [SupervisedChild(name) for name in STOP_ORDER if name in names]

    def run(self) -> int | str:
        """Run the children until a stop signal, and restart those that end.

        Return the exit code: 0 if every child ended with 0 after the signal, 2 if one refuses to start at first, else
        1. No child outlives the call. It also returns in each child, with the name of the process that the caller has
        to run.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
        gc.freeze()  # Otherwise a garbage collection in a child would copy the shared pages.
        try:
            for child in reversed([*self._children]):
                if not self._fork(child):
                    return child.name
            return self._keep_running()
        finally:
            self._kill()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _fork(self, child: SupervisedChild) -> bool:
        """Start a child; return True in this process, and False in the child.

        The child gets SIGTERM if this process dies. It forgets the other children, and closes the listening socket
        unless it is the gateway.
        """
        parent = os.getpid()
        if pid := os.fork():
            child.note_start(pid)
            return True
        self._children = []  # They are not children of this process.
        os.setsid()  # Ctrl-C reaches the supervisor alone, which stops its children in order.
        _follow_parent(parent, child.name)
        HOST_TIME.restart()
        if child.name == "gateway":
            os.environ[LISTEN_VARIABLE] = str(self._listener.detach())
        else:
            self._listener.close()
        return False

    def _keep_running(self) -> int | str:
        """Restart children that end, until a stop signal or until one refuses its first start; return as `run`."""
        while True:
            if self._wait_for_signal(self._seconds_to_restart()) in STOP_SIGNALS:
                return self._stop()
            for child in self._children:
                if (code := child.reap()) is not None:
                    child.plan_restart()
                    if code == REFUSED and child.starts == 1:
                        # Its own message says what is wrong, and nothing changes until the user does.
                        log.error("process refused to start", process=child.name)
                        self._stop()
                        return REFUSED
                    log.warning(
                        "process ended", process=child.name, code=code, restart_seconds=child.pause_seconds
                    )
                if child.pid is None and child.restart_at <= time.monotonic() and not self._fork(child):
                    return child.name

    def _seconds_to_restart(self) -> float:
        """Return the seconds until the next restart is due, at least 0.01; 30 if all children run."""
        due = [child.restart_at for child in self._children if child.pid is None]
        return max(min(due) - time.monotonic(), 0.01) if due else LONGEST_PAUSE_SECONDS

    def _stop(self) -> int:
        """Stop the running children one after the other; return the exit code: 0 if all these exited with 0, else 1.

        A child that takes longer than 60 seconds is killed. Another stop signal is sent to all that are left at once.
        """
        log.info("server stops")
        code = 0
        for child in self._children:
            child.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            is_running = child.pid is not None
            while is_running and (ended := child.reap()) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    child.send_signal(signal.SIGKILL)
                if self._wait_for_signal(max(left, 0.1)) in STOP_SIGNALS:
                    self._signal_all(signal.SIGTERM)
            if is_running and ended != 0:
                code = code or 1
                log.warning("process ended", process=child.name, code=ended)
        return code

    def _signal_all(self, number: signal.Signals) -> None:
        for child in self._children:
            child.send_signal(number)

    def _kill(self) -> None:
        """Kill all children that still run, also after an error of this process, and wait for their end."""
        self._signal_all(signal.SIGKILL)
        for child in self._children:
            child.reap(options=0)

    def _wait_for_signal(self, seconds: float) -> int | None:
        """Return the number of the next stop signal or SIGCHLD; None if none arrives within `seconds`."""
        arrived = signal.sigtimedwait({*STOP_SIGNALS, signal.SIGCHLD}, seconds)
        return None if arrived is None else arrived.si_signo


def _follow_parent(parent: int, name: str) -> None:
    """Name this process, and have the kernel send it SIGTERM when its parent dies; exit if that has died already.

    Does nothing outside Linux.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    library.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    library.prctl(SET_NAME, f"pf-{name}".encode(), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(KILLED + signal.SIGTERM)


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket for the gateway; raises `CommandError` if the port or address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CommandError(
            f"Port {port} of {host} is not available ({error.strerror}): stop the server that uses it,"
            " or set PILOTFLAME_PORT"
        ) from error
