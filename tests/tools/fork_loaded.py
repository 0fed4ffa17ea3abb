"""Command that runs a program of Python in a fork of the loaded process of the tests.

``python -I -S fork_loaded.py ADDRESS OPTIONS -c PROGRAM`` asks `tests.loaded_process`, which listens at a socket, for
the fork. The fork gets the standard streams of this process, which ends with it. If the loaded process has failed, this
one becomes an ordinary process of Python with the same options and program.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

STANDARD_STREAMS = (0, 1, 2)


def main() -> None:
    """Run the command."""
    address, *arguments = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [arguments[-1].encode()], STANDARD_STREAMS)
            is_forked = bool(connection.recv(1))
        except OSError:
            is_forked = False
        if is_forked:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the run, and that ends the fork
            connection.recv(1)  # nothing, at the end of the fork
        else:
            os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - no shell is needed


if __name__ == "__main__":
    main()
