"""The parent of a worker: a small process that outlives its child and has the child's leases released.

It forks before the worker's own modules are loaded, sleeps in one system call, and loads a database driver only when
its child has died with leases in hand.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from models.oom_kills import LOOK_SECONDS, OomKillWatch

SET_PARENT_DEATH_SIGNAL: Final = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
AWAITED: Final = frozenset({*FORWARDED, signal.SIGCHLD})
KILLED: Final = 128
"""Added to the number of the signal that has ended the child, as shells do."""
MAX_NAME_BYTES: Final = 4_096
"""What a pipe takes at once (PIPE_BUF), whoever reads it or not."""

Announce = Callable[[str], None]
"""Called by the child with the name that its leases will bear, before it takes the first."""


@dataclass(frozen=True, slots=True)
class ChildDeath:
    """The end of a child that may have left leases behind."""

    owner: str
    """The name in its leases."""
    exit_code: int
    """Minus the number of the signal, where one has ended it."""
    is_out_of_memory: bool = False
    """The kernel killed it for want of memory."""


def fork_worker(release: Callable[[ChildDeath], None]) -> Announce:
    """Return in a child that dies with its parent; the parent stays here, and exits with the code of the child.

    The parent forwards signals. It calls `release` once the child is dead, unless the child ended with 0 or never named
    its leases. Elsewhere than on Linux there is no parent: a child could outlive it unnoticed.
    """
    if sys.platform != "linux":
        return lambda _owner: None
    gc.freeze()  # else a collection in the child would copy the pages that both share
    parent = os.getpid()
    reads, writes = os.pipe()
    # Blocked before the fork: a signal in between is forwarded too, and PID 1 of a container receives it at all.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    watch = OomKillWatch()  # from before there is a child that may be killed
    child = os.fork()
    if child:
        os.close(writes)
        _stay(child, reads, watch, release)
    os.close(reads)
    _die_with(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return lambda owner: _announce(writes, owner)


def _stay(child: int, reads: int, watch: OomKillWatch, release: Callable[[ChildDeath], None]) -> NoReturn:
    code = os.waitstatus_to_exitcode(_wait_for(child, watch))
    is_out_of_memory = watch.explains(code)
    owner = _announced(reads)
    # From now on a signal ends the parent as it would any process.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
    if code != 0 and owner:
        try:
            release(ChildDeath(owner, code, is_out_of_memory=is_out_of_memory))
        except Exception:  # noqa: BLE001 - the code of the child counts, and a sweep takes its leases back
            sys.excepthook(*sys.exc_info())
    sys.exit(code if code >= 0 else KILLED - code)


def _wait_for(child: int, watch: OomKillWatch) -> int:
    """Forward signals until the child has ended, and return its status; reaps whatever else is inherited as PID 1."""
    while True:
        arrived = signal.sigtimedwait(AWAITED, LOOK_SECONDS)
        # A process that was stopped for longer than it waits is given a signal that is none, by a bug of CPython.
        if arrived is None or arrived.si_signo not in AWAITED:
            watch.look()
        elif arrived.si_signo != signal.SIGCHLD:
            os.kill(child, arrived.si_signo)  # not reaped yet, so the number is still its own
        elif (status := _reaped(child)) is not None:
            return status


def _reaped(child: int) -> int | None:
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
    """Be killed when the parent is: whoever kills it means both."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(KILLED + signal.SIGKILL)


def _announced(descriptor: int) -> str:
    """Return what the child has announced; an empty text where that is nothing."""
    os.set_blocking(descriptor, False)  # a process that the child has left behind may hold the other end
    try:
        return os.read(descriptor, MAX_NAME_BYTES).decode()
    except BlockingIOError:
        return ""


def _announce(descriptor: int, owner: str) -> None:
    os.write(descriptor, owner.encode())
    os.close(descriptor)
