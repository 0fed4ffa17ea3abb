"""Process that outlives its parent and is identified by its start time, not by its PID alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

_PROC = Path("/proc")
_BOOT_ID_FILE = _PROC / "sys/kernel/random/boot_id"
_SHELL = "/bin/sh"
_LAUNCH_SCRIPT = 'cd "$0" && read -r birth </proc/$$/stat && echo "$birth" >../process && exec "$@"'
"""A process writes its own birth file before it executes the program. So no running program goes unrecorded,
even if its parent is killed at any moment.
"""
BIRTH_FILE = "process"
_STANDARD_ERROR = 2
_STATE_FIELD = 0
_BIRTH_FIELD = 19
"""Index after the name in /proc/PID/stat (field 22 in proc(5)): clock ticks from boot to start."""


def read_boot_id() -> str:
    """Return the ID of the machine's boot. Start times are comparable only within one boot."""
    return _BOOT_ID_FILE.read_text().strip()


class LocalProcess(Struct, frozen=True):
    """Process by its PID and start time."""

    pid: int
    birth: int

    @property
    def is_alive(self) -> bool:
        found = _read_state_and_birth(self.pid)
        return found is not None and found[0] not in {"Z", "X"} and found[1] == self.birth

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process; if it has ended, nothing happens, even if another process has its PID."""
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(self.pid)
            try:
                if self.is_alive:
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)

    def kill_session(self) -> None:
        """Kill the process and its descendants, which are in its process group, with SIGKILL; nothing happens
        if it has ended.
        """
        if self.is_alive:
            _kill_group(self.pid)

    async def wait_ended(self) -> int | None:
        """Wait until the process has ended, and kill its descendants; return its exit code.

        That is minus the signal that ended it, or None for a process that is no child of this one or was
        reaped before.
        """
        if self.is_alive:
            try:
                handle = os.pidfd_open(self.pid)
            except ProcessLookupError:
                return None
            try:
                if self.is_alive:
                    await _wait_readable(handle)
                    # Its descendants still have its PID as their group, so the PID can't be reused meanwhile.
                    _kill_group(self.pid)
            finally:
                os.close(handle)
        return self._reap()

    def _reap(self) -> int | None:
        """Kill descendants of the ended process, and return its exit code; None if it is no child of this one."""
        found = _read_state_and_birth(self.pid)
        if found is None or found[1] != self.birth:
            return None
        _kill_group(self.pid)
        with suppress(ChildProcessError):
            _, status = os.waitpid(self.pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status)
        return None


def _kill_group(number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(number, signal.SIGKILL)


def start_process(
    command: Sequence[str], *, folder: Path, log: Path, environment: Mapping[str, str]
) -> LocalProcess:
    """Start a program in its own session with only this environment; return its process.

    It inherits no file that is open here. `folder` is its working directory, and its output is appended to `log`. A
    file beside `folder` records PID and start time, by which `find_process` finds it. Raises `OSError`.
    """
    # Remove the birth file of an earlier process: a program that dies before it writes its own would be
    # mistaken for it.
    (folder.parent / BIRTH_FILE).unlink(missing_ok=True)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        _SHELL,
        [_SHELL, "-c", _LAUNCH_SCRIPT, str(folder), *command],
        dict(environment),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_CLOSE, descriptor) for descriptor in _find_inheritable()),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
    )
    found = _read_state_and_birth(pid)
    return LocalProcess(pid, found[1] if found is not None else 0)


def _find_inheritable() -> list[int]:
    """Return the open files but the standard ones that a program inherits, such as those that a shell or `make` opened.

    The program may outlive this process, and would keep the locks and pipes of its starter.
    """
    descriptors = [int(entry.name) for entry in (_PROC / "self/fd").iterdir()]
    found = []
    for descriptor in descriptors:
        with suppress(OSError):  # that of the folder is closed again
            if descriptor > _STANDARD_ERROR and os.get_inheritable(descriptor):
                found.append(descriptor)
    return found


def find_process(folder: Path) -> LocalProcess | None:
    """Return the process that `start_process` recorded in the file beside `folder`, which may have ended since; None
    without a complete file.
    """
    try:
        line = (folder.parent / BIRTH_FILE).read_text()
    except FileNotFoundError:
        return None
    if not line.endswith("\n"):
        return None
    return LocalProcess(int(line.split(" ", 1)[0]), int(_fields_after_name(line)[_BIRTH_FIELD]))


def _read_state_and_birth(pid: int) -> tuple[str, int] | None:
    try:
        line = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = _fields_after_name(line)
    return fields[_STATE_FIELD], int(fields[_BIRTH_FIELD])


def _fields_after_name(line: str) -> Sequence[str]:
    # A program's name may contain spaces and brackets; the last bracket ends it.
    return line.rpartition(") ")[2].split()


async def _wait_readable(handle: int) -> None:
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(handle, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(handle)
