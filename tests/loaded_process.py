"""Process that loads all tests once, and of which the processes of a parallel run are forks.

Each would otherwise load the same modules for seconds, and compile them in a checkout in which no test has run yet.
pytest-xdist starts its processes by a command. That is `tests/tools/fork_loaded.py` here: it hands its standard streams
to this process, and a fork of this process goes on in its place.
"""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from tests.tools import fork_loaded

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PROGRAM_BYTES = 4096


def start_process(folder: Path, arguments: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    """Start the process, and return it with the command of its forks, which takes the option `-c` of Python.

    `arguments` are those of pytest; the process listens at a socket in `folder`. Forks that are asked for while it
    loads wait for it. It dies with the thread that calls this function.
    """
    address = folder / "loaded-process"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        command = ["setpriv", "--pdeathsig=KILL", sys.executable, "-m", __name__, *arguments]
        process = subprocess.Popen(command, stdin=listener.fileno())
    return process, shlex.join([sys.executable, "-I", "-S", fork_loaded.__file__, str(address)])


def load_tests(arguments: Sequence[str]) -> None:
    """Import all modules of a run of pytest; ends the process if one can't be imported.

    Python would keep it, half loaded, and the forks would take it as it is. Ordinary processes report the error.
    """
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        if pytest.main([*arguments, "--collect-only", "--numprocesses=0"]) is not pytest.ExitCode.OK:
            sys.exit()
    importlib.import_module("tests.frozen_heap")  # which prepares the memory for forks


def serve_forks(listener: socket.socket) -> None:
    """Fork a process for each connection, in which the sent program runs; returns in the forks alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the run, and that ends this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    listener.detach()  # standard input takes its place
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _run_program(connection)


def _run_program(connection: socket.socket) -> None:
    """Receive a program with its standard streams, and run it as Python runs that of the option `-c`."""
    count = len(fork_loaded.STANDARD_STREAMS)
    program, streams, *_ = socket.recv_fds(connection, MAX_PROGRAM_BYTES, count)
    for stream, standard in zip(streams, fork_loaded.STANDARD_STREAMS, strict=True):
        os.dup2(stream, standard)
        os.close(stream)
    connection.send(b"1")
    connection.detach()  # it stays open until this process ends
    sys.argv = ["-c"]
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(program, vars(main))  # noqa: S102 - as for `-c`


if __name__ == "__main__":
    load_tests(sys.argv[1:])
    serve_forks(socket.socket(fileno=0))
