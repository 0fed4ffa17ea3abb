"""Worker of the Python SDK that performs the steps of a benchmark: `python -m benchmarks.sdk_worker WORKERS SLOTS`."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import dataclass
from typing import Any

from pilotflame_sdk import Worker


@dataclass
class Step:
    """Config of a step."""

    n: int = 1


def build_worker(slots: int) -> Worker:
    """Return a worker with one node type; the environment names its server and key."""
    worker = Worker("bench", slots=slots, grace=5)

    @worker.node("bench/step", "1.0.0")
    def step(config: Step) -> dict[str, Any]:
        return {"n": config.n + 1}

    return worker


async def serve(count: int, slots: int) -> None:
    """Serve until SIGTERM; the workers drain, since an open poll that is cut may hold tasks of the next measurement."""
    workers = [build_worker(slots) for _ in range(count)]

    def stop() -> None:
        for worker in workers:
            worker.stop()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await asyncio.gather(*(worker.serve() for worker in workers))


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
