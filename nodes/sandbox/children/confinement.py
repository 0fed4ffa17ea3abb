"""Giving up rights: what a process that works on others' data can do without, as far as the system lets it.

Each step is a wall of its own and none is taken for granted: a container may already have taken away the right to give
up rights, and only Linux knows most of them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from functools import cache
from select import poll

from nodes.sandbox.children import landlock, system_calls

STDIN = 0
FIRST_USER = 61_184
USERS = 4_336
"""The user ids that are set aside for processes with a passing one, at least where systemd is."""
SET_PARENT_DEATH_SIGNAL = 1
SET_DUMPABLE = 4
SET_NO_NEW_PRIVILEGES = 38
NEW_NETWORK = 0x4000_0000
CPU_SECONDS = 400
"""Of a child's life; it is replaced before it gets there."""


def missing_protections() -> list[str]:
    """Return what the kernel doesn't offer, or this container may not use, of what keeps code from everything else."""
    walls = {"Landlock": landlock.landlock_version() > 0, "seccomp": system_calls.are_filtered()}
    return [name for name, is_there in walls.items() if not is_there]


def limit_process(
    *, memory_bytes: int, open_files: int, cpu_seconds: int = CPU_SECONDS, file_bytes: int | None = 0
) -> None:
    """Set what the process may take, for good; unless told otherwise no file can be written."""
    for name, most in {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_CORE": 0,
        **({} if file_bytes is None else {"RLIMIT_FSIZE": file_bytes}),
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NOFILE": open_files,
    }.items():
        number = getattr(resource, name, None)
        if number is not None:
            _set_limit(number, most)


def limit_file_size(most_bytes: int) -> None:
    """Let no file that the process writes grow beyond so much."""
    _set_limit(resource.RLIMIT_FSIZE, most_bytes)


def limit_processes(most: int) -> None:
    """Let the user of the process have so many, threads included."""
    _set_limit(resource.RLIMIT_NPROC, most)


def limit_memory(more_bytes: int) -> None:
    """Let the process take so much more than it has."""
    _set_limit(resource.RLIMIT_AS, _used_bytes() + more_bytes)


def limit_cpu(more_seconds: float) -> None:
    """Let the process compute for so long from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + more_seconds) + 1)


def give_up_rights() -> None:
    """Never again get more rights than the process has, nor be looked into by others of its user."""
    _prctl(SET_NO_NEW_PRIVILEGES, 1)
    hide_process()


def hide_process() -> None:
    """Keep the process's memory, environment and open files from other processes of its user; root sees them all."""
    _prctl(SET_DUMPABLE, 0)


def switch_user() -> bool:
    """Take a user of its own, where the process may; returns whether it has one."""
    user = FIRST_USER + os.getpid() % USERS
    if os.geteuid() == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    return os.geteuid() == user


def leave_network() -> None:
    """Go where there is no network but the process's own, where it may."""
    unshare = getattr(_load_libc(), "unshare", None)
    if unshare is not None:
        unshare(NEW_NETWORK)


def die_with_parent(parent: int) -> None:
    """Be killed when the parent ends, however it does; to be called last, since a new user forgets it."""
    _prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def die_with_pipe() -> None:
    """Kill the whole group when the pipe from the parent ends: for a process that has children of its own."""
    threading.Thread(target=_watch_pipe, daemon=True).start()


def _watch_pipe() -> None:
    watched = poll()
    watched.register(STDIN, 0)  # that the other end is closed is told unasked
    watched.poll()
    os.killpg(0, signal.SIGKILL)


def _set_limit(number: int, most: int) -> None:
    _, hard = resource.getrlimit(number)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(number, (most, most))


def _used_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - no module more than it takes
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 256 << 20


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _load_libc().prctl(option, value, 0, 0, 0)


@cache
def _load_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
