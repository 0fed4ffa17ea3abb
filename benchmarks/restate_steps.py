"""Steps of own Python code in Restate, beside `sdk steps per second of runs with 3`.

Needs Python with `restate-sdk` and `hypercorn`, and the program of npm's `@restatedev/restate-server-linux-x64`,
in an environment of their own: `python benchmarks/restate_steps.py SERVER`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEPS: Final = 3
RUNS: Final = 1_000
STARTERS: Final = 16
PATIENCE_SECONDS: Final = 120.0
SERVICE_PORT: Final = 19_080
ADMIN_PORT: Final = 9_070
INGRESS_PORT: Final = 8_080


def send(port: int, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 - JSON
    """Send a request to a port of this machine, and return the JSON of the answer, None if it is empty.

    Raises `OSError` while no server listens, and `ValueError` for a refusal.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    sent = None if body is None else json.dumps(body)
    connection.request(method, path, sent, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    received = answer.read()
    connection.close()
    if answer.status >= 300:
        raise ValueError(f"{path}: {answer.status} {received[:500]!r}")
    return json.loads(received) if received else None


# ── the service ─────────────────────────────────────────────────────────────────────────────────────────────


def serve() -> None:
    """Serve runs of three steps with the SDK; `/ended` answers how many have ended, and when the last one did."""
    import restate  # type: ignore[import-not-found]  # noqa: PLC0415 - in the other environment alone
    from hypercorn.asyncio import serve as serve_asgi  # type: ignore[import-not-found]  # noqa: PLC0415
    from hypercorn.config import Config  # type: ignore[import-not-found]  # noqa: PLC0415

    steps = restate.Service("steps")
    ended = {"count": 0, "at": 0.0}

    async def add_one(n: int) -> dict[str, int]:
        return {"n": n + 1}

    async def run(ctx: Any, n: int) -> int:  # noqa: ANN401 - a class of the SDK
        for number in range(STEPS):
            n = (await ctx.run_typed(f"step{number}", add_one, n=n))["n"]
        ended["count"] += 1
        ended["at"] = time.time()
        return n

    run.__annotations__["ctx"] = restate.Context
    steps.handler("run")(run)
    served = restate.app([steps])

    async def application(scope: Any, receive: Any, reply: Any) -> None:  # noqa: ANN401 - as ASGI has it
        if scope["type"] != "http" or scope["path"] != "/ended":
            await served(scope, receive, reply)
            return
        headers = [(b"content-type", b"application/json")]
        await reply({"type": "http.response.start", "status": 200, "headers": headers})
        await reply({"type": "http.response.body", "body": json.dumps(ended).encode()})

    config = Config()
    config.bind = [f"127.0.0.1:{SERVICE_PORT}"]
    asyncio.run(serve_asgi(application, config))


# ── the measurement ─────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def run_program(*command: str) -> Iterator[None]:
    """Run a program during the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def wait_until(condition: Callable[[], object]) -> None:
    """Poll a condition until it holds, or raise `TimeoutError`; `OSError` and `ValueError` count as not yet."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at:
        try:
            if condition():
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    raise TimeoutError


def measure_runs() -> float:
    """Return steps per second, from the first start of a run to the last end."""
    before = send(SERVICE_PORT, "GET", "/ended")["count"]
    left = iter(range(RUNS))
    lock = threading.Lock()

    def start() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", INGRESS_PORT)
        while True:
            with lock:
                if next(left, None) is None:
                    return
            connection.request("POST", "/steps/run/send", b"1", {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if answer.status >= 300:
                raise ValueError(f"a run was refused: {answer.status}")

    began = time.time()
    starters = [threading.Thread(target=start) for _ in range(STARTERS)]
    for one in starters:
        one.start()
    for one in starters:
        one.join()
    wait_until(lambda: send(SERVICE_PORT, "GET", "/ended")["count"] >= before + RUNS)
    return STEPS * RUNS / (float(send(SERVICE_PORT, "GET", "/ended")["at"]) - began)


def main(server: str) -> None:
    """Start Restate and the service, and print the steps per second of five repetitions, the first one cold."""
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
        run_program(sys.executable, __file__),
        run_program(server, "--base-dir", folder, "--node-name", "benchmark"),
    ):
        wait_until(lambda: send(SERVICE_PORT, "GET", "/ended") is not None)
        wait_until(lambda: send(ADMIN_PORT, "GET", "/health") is None)
        deployment = {"uri": f"http://127.0.0.1:{SERVICE_PORT}"}
        wait_until(lambda: send(ADMIN_PORT, "POST", "/deployments", deployment) is not None)
        for _ in range(5):
            print(f"{measure_runs():.0f} steps a second")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        serve()
