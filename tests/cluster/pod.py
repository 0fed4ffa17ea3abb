"""Program for pods that reports its start, and ends in every way that a pod can end.

Tests start more than a hundred of it. So it loads only modules in C at first: a server of the standard library would
take five times as long to load.
"""

import _signal  # type: ignore[import-not-found] # private to Python's own module
import os
import sys
import time
from _socket import AF_INET, SO_REUSEADDR, SOL_SOCKET, socket

START_SECONDS = float(os.environ.get("POD_START_SECONDS", "0"))
DRAIN_SECONDS = float(os.environ.get("POD_DRAIN_SECONDS", "0"))
EXIT_CODE = os.environ.get("POD_EXIT_CODE")
STARTED_AT = time.monotonic()
REQUEST_SECONDS = 2.0
"""Time for a request to arrive, since requests are answered one by one."""
REQUEST_BYTES = 65_536
is_draining = False


def serve(host: str, port: int) -> None:
    """Answer requests, each on a connection of its own, until the process ends."""
    listener = socket(AF_INET)
    listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen()
    while True:
        descriptor, _ = listener._accept()  # type: ignore[attr-defined] # noqa: SLF001 - the public one is Python's
        connection = socket(fileno=descriptor)
        connection.settimeout(REQUEST_SECONDS)
        try:
            answer(connection)
        except OSError:  # the client has gone away
            pass
        finally:
            connection.close()


def answer(connection: socket) -> None:
    """Answer the request on a connection; its head must arrive in one piece."""
    head = connection.recv(REQUEST_BYTES).decode()
    if not head:
        return
    path, _, query = head.split(" ", 2)[1].partition("?")
    match path:
        case "/healthz":
            send(connection, 200)
        case "/readyz":
            is_up = time.monotonic() - STARTED_AT >= START_SECONDS and not is_draining
            send(connection, 200 if is_up else 503)
        case "/state":
            send(connection, 200, describe_state())
        case "/say":
            said = parse_query(query)
            sys.stdout.write((said["text"] + "\n") * int(said.get("times", "1")))
            sys.stdout.flush()
            send(connection, 200)
        case "/exit":
            send(connection, 200)
            os._exit(int(parse_query(query)["code"]))
        case _:
            send(connection, 404)


def send(connection: socket, status: int, content: str = "{}") -> None:
    head = f"HTTP/1.1 {status} \r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    connection.sendall(f"{head}{content}".encode())


def describe_state() -> str:
    """Return facts about this process as JSON."""
    import json  # noqa: PLC0415 - few tests need it

    return json.dumps(
        {
            "pid": os.getpid(),
            "started_at": STARTED_AT,
            "environment": dict(os.environ),
            "arguments": sys.argv[1:],
            "folder": os.getcwd(),  # noqa: PTH109 - `pathlib` takes as long to load as all else
            "session": os.getsid(0),
        }
    )


def parse_query(query: str) -> dict[str, str]:
    from urllib.parse import parse_qsl  # noqa: PLC0415 - few tests need it

    return dict(parse_qsl(query))


def drain(*_: object) -> None:
    """Begin to drain; end after the drain time, unless the test forbids that."""
    global is_draining  # noqa: PLW0603 - a signal's handler has no other state
    is_draining = True
    if os.environ.get("POD_IGNORES_TERM"):
        return
    if DRAIN_SECONDS == 0:
        os._exit(0)
    _signal.signal(_signal.SIGALRM, lambda *_: os._exit(0))
    _signal.setitimer(_signal.ITIMER_REAL, DRAIN_SECONDS)


if EXIT_CODE is not None:
    sys.exit(f"the program cannot start: {EXIT_CODE}" if EXIT_CODE == "1" else int(EXIT_CODE))
_signal.signal(_signal.SIGTERM, drain)
sys.stdout.write("started\n")
sys.stdout.flush()
serve(os.environ["PILOTFLAME_RUNNER_HOST"], int(os.environ["PILOTFLAME_RUNNER_PORT"]))
