"""Commands `pilotflame` that other programs start, forked as those are that tests start themselves: by relays."""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from tests import forks, relay_server
from tests.relay_server import RelayServer


@functools.cache
def find_command() -> Path:
    """Return an executable file `pilotflame`, alone in its folder, whose commands are forked; made once."""
    folder = Path(mkdtemp(prefix="relay-"))
    atexit.register(_delete_folder, folder, os.getpid())
    command = folder / "pilotflame"
    listener, relay = relay_server.listen("commands")
    with listener:
        forks.ForkedProcess(_serve_relays, listener, command)
    command.write_text(f'#!/bin/sh\nexec {shlex.join(relay)} "$@"\n')
    command.chmod(0o755)
    return command


def find_pod_command() -> Sequence[str]:
    """Return the command of a local pod whose runner is forked."""
    return (str(find_command()), "runner")


def _delete_folder(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)


def _serve_relays(listener: socket.socket, command: Path) -> None:
    """Serve relays in this process; run the command of one in each of its forks."""
    request = RelayServer(listener).await_request()
    relay_server.lead_session()
    request.take_files()
    forks.run_here(["pilotflame", *request.arguments], request.environment, request.folder, command)
