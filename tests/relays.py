"""Commands `pilotflame` that other programs start, forked as those are that tests start themselves.

A program that is executed is no fork of a process that has loaded the command. So in place of the command stands a
relay: a small program that has the command forked, and stays for it in the family of processes.
"""

from __future__ import annotations

import atexit
import functools
import os
import selectors
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

from tests import forks

PROGRAM = Path(__file__).with_name("relay_program.py")
REQUEST_BYTES = 1 << 20


@functools.cache
def find_command() -> Path:
    """Return an executable file `pilotflame`, alone in its folder, whose commands are forked; made once."""
    # The name is unknown to the file system, so that nothing is left of it.
    address = f"pilotflame-relays-{os.getpid()}"
    folder = Path(mkdtemp(prefix="relay-"))
    atexit.register(_delete_folder, folder, os.getpid())
    command = folder / "pilotflame"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        forks.ForkedProcess(_serve_relays, listener, command)
    program = shlex.join([sys.executable, "-I", "-S", str(PROGRAM), address])
    command.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    command.chmod(0o755)
    return command


def find_pod_command() -> Sequence[str]:
    """Return the command of a local pod whose runner is forked."""
    return (str(find_command()), "runner")


def _delete_folder(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)


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

    def run(self, relay: Path) -> None:
        """Run the command in this process; it starts others by the same relay."""
        for standard, descriptor in enumerate(self.descriptors):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        forks.run_here(["pilotflame", *self.arguments], self.environment, self.folder, relay)


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


def _serve_relays(listener: socket.socket, command: Path) -> None:
    """Serve relays in this process; run the command of one in each of its forks."""
    request = RelayServer(listener).await_request()
    forks.lead_session()
    request.run(command)
