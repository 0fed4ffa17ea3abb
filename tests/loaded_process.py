"""Process that loads all tests once, and of which the processes of a parallel run are forks.

Each would otherwise load the same modules for seconds, and compile them in a checkout in which no test has run yet.
pytest-xdist starts them by a command, which is a relay to this process.
"""

from __future__ import annotations

import importlib
import os
import shlex
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from tests import relay_server
from tests.relay_server import CommandRequest, RelayServer

if TYPE_CHECKING:
    from collections.abc import Sequence


def start_process(arguments: Sequence[str]) -> tuple[subprocess.Popen[bytes], str]:
    """Start the process for a run of pytest with these arguments, and return it with the command of its forks.

    The command takes the option `-c` of Python. Forks that are asked for while the process loads wait for it. It dies
    with the thread that calls this function.
    """
    listener, relay = relay_server.listen("tests")
    with listener:
        command = ["setpriv", "--pdeathsig=KILL", sys.executable, "-m", __name__, *arguments]
        # Ctrl-C ends the run, and that ends this process.
        process = subprocess.Popen(command, stdin=listener.fileno(), start_new_session=True)
    return process, shlex.join(relay)


def load_tests(arguments: Sequence[str]) -> bool:
    """Import all modules of a run of pytest; return whether none has failed."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        found = pytest.main([*arguments, "--collect-only", "--numprocesses=0"])
    importlib.import_module("tests.frozen_heap")  # which prepares the memory for forks
    return found is pytest.ExitCode.OK


def run_program(request: CommandRequest) -> None:
    """Run a program in this process as Python runs that of the option `-c`, the last argument of the request."""
    relay_server.lead_session()
    request.take_files()
    sys.argv = ["-c"]
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(request.arguments[-1], vars(main))  # noqa: S102 - as for `-c`


if __name__ == "__main__":
    if len(sys.argv) > 1 and not load_tests(sys.argv[1:]):
        # Python keeps a module whose import has failed, and forks would take it as it is: they import the tests
        # themselves then, and report the error.
        os.execv(sys.executable, [sys.executable, "-m", "tests.loaded_process"])  # noqa: S606 - no shell is needed
    listener = socket.socket(fileno=0)
    request = RelayServer(listener).await_request()
    listener.detach()  # the standard input of the fork takes its place
    run_program(request)
