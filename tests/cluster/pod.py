"""Program for pods that reports its start, and ends in every way that a pod can end."""

import http.server
import json
import os
import pathlib
import signal
import sys
import threading
import time
from urllib.parse import parse_qsl, urlsplit

START_SECONDS = float(os.environ.get("POD_START_SECONDS", "0"))
DRAIN_SECONDS = float(os.environ.get("POD_DRAIN_SECONDS", "0"))
EXIT_CODE = os.environ.get("POD_EXIT_CODE")
STARTED_AT = time.monotonic()
is_draining = threading.Event()


class PodRequestHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, dict(parse_qsl(urlsplit(self.path).query))
        match path:
            case "/healthz":
                self.answer(200, {})
            case "/readyz":
                is_up = time.monotonic() - STARTED_AT >= START_SECONDS and not is_draining.is_set()
                self.answer(200 if is_up else 503, {})
            case "/state":
                state = {
                    "pid": os.getpid(),
                    "started_at": STARTED_AT,
                    "environment": dict(os.environ),
                    "arguments": sys.argv[1:],
                }
                self.answer(200, {**state, "folder": str(pathlib.Path.cwd()), "session": os.getsid(0)})
            case "/say":
                sys.stdout.write((query["text"] + "\n") * int(query.get("times", "1")))
                sys.stdout.flush()
                self.answer(200, {})
            case "/exit":
                self.answer(200, {})
                os._exit(int(query["code"]))
            case _:
                self.answer(404, {})

    def answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def drain(*_: object) -> None:
    is_draining.set()
    if os.environ.get("POD_IGNORES_TERM"):
        return
    threading.Timer(DRAIN_SECONDS, os._exit, [0]).start()


if EXIT_CODE is not None:
    sys.exit(f"the program cannot start: {EXIT_CODE}" if EXIT_CODE == "1" else int(EXIT_CODE))
signal.signal(signal.SIGTERM, drain)
address = (os.environ["PILOTFLAME_RUNNER_HOST"], int(os.environ["PILOTFLAME_RUNNER_PORT"]))
sys.stdout.write("started\n")
sys.stdout.flush()
http.server.ThreadingHTTPServer(address, PodRequestHandler).serve_forever()
