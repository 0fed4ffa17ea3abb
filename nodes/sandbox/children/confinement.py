"""Privilege dropping for processes that work on users' data, as far as the system allows it.

Each step is an independent barrier, and none is taken for granted: a container may have removed the permission to drop
privileges, and most steps exist only on Linux.
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
"""Range of user ids for transient users, at least as systemd reserves it."""
SET_PARENT_DEATH_SIGNAL = 1
SET_DUMPABLE = 4
SET_NO_NEW_PRIVILEGES = 38
NEW_NETWORK = 0x4000_0000
CPU_SECONDS = 400
"""CPU time of a child's life; it is replaced before it reaches the limit."""


def missing_protections() -> list[str]:
    """Return the names of protections (Landlock, seccomp) that the kernel lacks or this container may not use; empty if
    both work.
    """
    walls = {"Landlock": landlock.landlock_version() > 0, "seccomp": system_calls.is_seccomp_available()}
    return [name for name, is_there in walls.items() if not is_there]


def limit_process(
    *, memory_bytes: int, open_files: int, cpu_seconds: int = CPU_SECONDS, file_bytes: int | None = 0
) -> None:
    """Set limits of memory, open files, CPU time and file size that this process cannot raise again; forbid
    core dumps.

    A limit that the system refuses is skipped. By default no file can be written; with None as `file_bytes`
    the file size is left as it is.
    """
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
    """Limit the size in bytes of each file that the process writes; skipped if the system refuses it."""
    _set_limit(resource.RLIMIT_FSIZE, most_bytes)


def limit_processes(most: int) -> None:
    """Limit the number of processes and threads of the process's user; skipped if the system refuses it."""
    _set_limit(resource.RLIMIT_NPROC, most)


def limit_memory(more_bytes: int) -> None:
    """Limit the memory of the process to its current use plus `more_bytes`; skipped if the system refuses it."""
    _set_limit(resource.RLIMIT_AS, _read_used_bytes() + more_bytes)


def limit_cpu(more_seconds: float) -> None:
    """Limit the CPU time of the process to its current use plus `more_seconds`, rounded up.

    Skipped if the system refuses it.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + more_seconds) + 1)


def give_up_rights() -> None:
    """Forbid this process and its children new privileges, such as by setuid programs, for good; hide it from other
    processes of its user.
    """
    _call_prctl(SET_NO_NEW_PRIVILEGES, 1)
    hide_process()


def hide_process() -> None:
    """Hide the process's memory, environment and open files from other processes of its user; root still sees them."""
    _call_prctl(SET_DUMPABLE, 0)


def switch_user() -> bool:
    """Switch to a user id that only this process has, if the process is root; return whether it has that id
    afterwards.
    """
    user = FIRST_USER + os.getpid() % USERS
    if os.geteuid() == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    return os.geteuid() == user


def leave_network() -> None:
    """Enter an empty network namespace, so that the process can reach no network; skipped where it isn't permitted."""
    unshare = getattr(_load_libc(), "unshare", None)
    if unshare is not None:
        unshare(NEW_NETWORK)


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent ends; exit at once if the parent has ended already.

    `parent` is the expected process id. Call it last, since a change of user resets it.
    """
    _call_prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def die_with_pipe() -> None:
    """Start a thread that kills this process and its whole group when the pipe from the parent closes; returns at once.

    It is for a process with children, which the kernel would not kill with it.
    """
    threading.Thread(target=_watch_pipe, daemon=True).start()


def _watch_pipe() -> None:
    watched = poll()
    watched.register(STDIN, 0)  # The hangup of the other end is reported without any event mask.
    watched.poll()
    os.killpg(0, signal.SIGKILL)


def _set_limit(number: int, most: int) -> None:
    _, hard = resource.getrlimit(number)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(number, (most, most))


def _read_used_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - avoids another module
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 256 << 20


def _call_prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _load_libc().prctl(option, value, 0, 0, 0)


@cache
def _load_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
