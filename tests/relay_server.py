"""Server of relays: small programs in whose place a fork of a loaded process runs.

A program that is executed loads its code first. So a relay, which loads next to nothing, has the process that serves it
forked, and stays for the fork in the family of processes.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PROGRAM = Path(__file__).with_name("relay_program.py")
REQUEST_BYTES = 1 << 20
SET_PARENT_DEATH_SIGNAL = 1


def listen(name: str) -> tuple[socket.socket, list[str]]:
    """Listen for relays of a name that this process uses once; return the socket, and the command that starts a relay.

    Arguments of the command are for the server.
    """
    # The address is unknown to the file system, so that nothing is left of it.
    address = f"pilotflame-{name}-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{address}")
    listener.listen()
    return listener, [sys.executable, "-I", "-S", str(PROGRAM), address]


@dataclass(frozen=True)
class CommandRequest:
    """Command that a relay asks for, with its standard files."""

    folder: Path
    arguments: list[str]
    environment: dict[str, str]
    descriptors: list[int]

    @classmethod
    def receive(cls, connection: socket.socket) -> CommandRequest:
        """Receive the request of a relay that has just connected."""
        content, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
        folder, count, *texts = map(os.fsdecode, content.split(b"\0"))
        arguments, variables = texts[: int(count)], texts[int(count) :]
        environment = dict(variable.split("=", 1) for variable in variables)
        return cls(Path(folder), arguments, environment, descriptors)

    def take_files(self) -> None:
        """Put the standard files of the relay in the place of those of this process."""
        for standard, descriptor in enumerate(self.descriptors):
            os.dup2(descriptor, standard)
            os.close(descriptor)


class RelayServer:
    """Process that forks itself for each relay, and tells it of the command's end."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def await_request(self) -> CommandRequest:
        """Serve relays forever; return in each new process, with the request that it is for."""
        while True:
            # One event at a time, since it may end the watch for another.
            key, _ = self._selector.select()[0]
            if key.fileobj is not self._listener:
                serve: Callable[[], None] = key.data
                serve()
            elif (request := self._fork()) is not None:
                return request

    def _fork(self) -> CommandRequest | None:
        """Fork this process for the next relay; return its request in the new process, None in this one."""
        connection, _ = self._listener.accept()
        try:
            request = CommandRequest.receive(connection)
        except ValueError:  # the relay was killed before it sent one
            connection.close()
            return None
        pid = os.fork()
        if pid == 0:
            return request
        for descriptor in request.descriptors:
            os.close(descriptor)
        handle = os.pidfd_open(pid)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._pass_on, connection, pid))
        self._selector.register(handle, selectors.EVENT_READ, partial(self._end, connection, handle, pid))
        return None

    def _pass_on(self, connection: socket.socket, pid: int) -> None:
        """Pass a signal of a relay on to its command, which dies with the relay."""
        number = connection.recv(1)
        if number:
            os.kill(pid, number[0])
            return
        self._selector.unregister(connection)
        os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it leads no session yet
            os.killpg(pid, signal.SIGKILL)

    def _end(self, connection: socket.socket, handle: int, pid: int) -> None:
        """Tell the relay of a command that has ended how it did."""
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):  # the relay was killed
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        self._selector.unregister(handle)
        with suppress(KeyError):  # the relay was killed
            self._selector.unregister(connection)
        connection.close()
        os.close(handle)


def lead_session() -> None:
    """Let this new process lead a session of its own, and die with its parent."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    os.setsid()  # Ctrl-C ends the tests, and they end the processes
