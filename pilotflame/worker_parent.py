"""Parent process of a worker: outlives its child and releases the child's leases.

It forks before the worker's own modules are loaded, sleeps in one system call, and loads a database driver only after
the child has died with leases.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Final, NamedTuple, NoReturn

from models.oom_kills import LOOK_SECONDS, OomKillWatch

SET_PARENT_DEATH_SIGNAL: Final = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
AWAITED: Final = frozenset({*FORWARDED, signal.SIGCHLD})
KILLED: Final = 128
"""Offset of exit codes for signals, as in shells."""
MAX_NAME_BYTES: Final = 4_096
"""Size of an atomic write to a pipe (PIPE_BUF), which doesn't block without a reader."""

Announce = Callable[[str], None]
"""Callback of the child with the owner name of its leases, called before it takes the first."""


class ChildDeath(NamedTuple):
    """Death of a child that may have left leases behind."""

    owner: str
    """Owner name in the child's leases."""
    exit_code: int
    """Exit code, or the negative number of the signal that ended the child."""
    is_out_of_memory: bool = False
    """Whether the kernel's OOM killer ended the child."""


def fork_worker(release: Callable[[ChildDeath], None]) -> Announce:
    """Fork, and return in the child; the parent stays in this call, and exits with the code of the child.

    The child dies with its parent. The child must call the returned function with the owner name of its leases. The
    parent forwards signals, and calls `release` after the death of the child, unless the child exited with 0 or never
    announced an owner. Outside Linux there is no parent: a child could outlive it unnoticed.
    """
    if sys.platform != "linux":
        return lambda _owner: None
    gc.freeze()  # Otherwise a garbage collection in the child would copy the shared pages.
    parent = os.getpid()
    reads, writes = os.pipe()
    # Blocked before the fork: a signal in between is forwarded too, and PID 1 of a container receives it at all.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    watch = OomKillWatch()  # Created before the child, which may be killed early.
    child = os.fork()
    if child:
        os.close(writes)
        _supervise_child(child, reads, watch, release)
    os.close(reads)
    _die_with(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return lambda owner: _send_announcement(writes, owner)


def _supervise_child(
    child: int, reads: int, watch: OomKillWatch, release: Callable[[ChildDeath], None]
) -> NoReturn:
    """Forward signals to the child until it ends, call `release` if it failed with an announced owner,
    and exit with its code.
    """
    code = os.waitstatus_to_exitcode(_wait_for_child(child, watch))
    is_out_of_memory = watch.was_oom_kill(code)
    owner = _read_announcement(reads)
    # From here on a signal ends the parent as it ends any process.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
    if code != 0 and owner:
        try:
            release(ChildDeath(owner, code, is_out_of_memory=is_out_of_memory))
        except Exception:  # noqa: BLE001 - the exit code of the child matters, and a sweep reclaims its leases
            sys.excepthook(*sys.exc_info())
    sys.exit(code if code >= 0 else KILLED - code)


def _wait_for_child(child: int, watch: OomKillWatch) -> int:
    """Forward signals to the child until it ends, and return its wait status; as PID 1, also reap inherited processes.

    Every two seconds it looks for kills by the kernel for lack of memory.
    """
    while True:
        arrived = signal.sigtimedwait(AWAITED, LOOK_SECONDS)
        # A bug of CPython: after the process was stopped for longer than the timeout, `sigtimedwait` returns an invalid
        # signal.
        if arrived is None or arrived.si_signo not in AWAITED:
            watch.refresh()
        elif arrived.si_signo != signal.SIGCHLD:
            os.kill(child, arrived.si_signo)  # The child is not reaped yet, so its id can't have been reused.
        elif (status := _reap_child(child)) is not None:
            return status


def _reap_child(child: int) -> int | None:
    """Reap all ended processes; return the wait status of the child, None if it still runs."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if process == child:
            return status
        if process == 0:
            return None


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, and exit if it has died already."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(KILLED + signal.SIGKILL)


def _read_announcement(descriptor: int) -> str:
    """Return the owner name that the child has announced through the pipe; empty if it has announced none."""
    os.set_blocking(descriptor, False)  # A process that the child has left behind may keep the pipe open.
    try:
        return os.read(descriptor, MAX_NAME_BYTES).decode()
    except BlockingIOError:
        return ""


def _send_announcement(descriptor: int, owner: str) -> None:
    os.write(descriptor, owner.encode())
    os.close(descriptor)
