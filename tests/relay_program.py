"""Program in whose place a fork of a loaded process runs: the command `pilotflame`, or a process of the tests.

A server of `tests.relay_server` forks it, with the environment, folder and files of this process. This process passes
signals on to the fork, ends as it ends, and takes it along when it is killed. Its modules are those in C: Python's own
around them would double its time.
"""

import _signal  # type: ignore[import-not-found] # private to Python's own module
import os
import sys
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET, socket

STANDARD_FILES = range(3)
EXIT_CODE_BYTES = 20
FAILURE = 1

address, *arguments = sys.argv[1:]
connection = socket(AF_UNIX, SOCK_SEQPACKET)
connection.connect(f"\0{address}")
for passed_on in (_signal.SIGTERM, _signal.SIGINT):
    _signal.signal(passed_on, lambda number, _frame: connection.send(bytes([number])))
variables = [name + b"=" + value for name, value in os.environb.items()]
folder = os.getcwdb()  # noqa: PTH109 - `pathlib` is one of the modules around those in C
request = [folder, b"%d" % len(arguments), *map(os.fsencode, arguments), *variables]
descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in STANDARD_FILES)
connection.sendmsg([b"\0".join(request)], [(SOL_SOCKET, SCM_RIGHTS, descriptors)])
try:
    exit_code = int(connection.recv(EXIT_CODE_BYTES) or FAILURE)
except ConnectionResetError:  # the server was killed, and took the fork along
    exit_code = FAILURE
if exit_code < 0:
    _signal.signal(-exit_code, _signal.SIG_DFL)
    os.kill(os.getpid(), -exit_code)
os._exit(exit_code)
