"""Task worker of the faults: `python task_worker.py SLOTS`. Its tasks call the ledger."""

from __future__ import annotations

import json
import sys
from urllib.request import Request, urlopen

from pilotflame_sdk import Task, Worker

worker = Worker("faults", slots=int(sys.argv[1]) if __name__ == "__main__" else 1)


@worker.node("faults/effect", "1.0.0", lease=10)
def call_ledger(config: dict[str, str], task: Task) -> dict[str, object]:
    """Write to the ledger at once, as an `http-request` of the load does, and return its answer.

    A worker that is frozen between the begin and the write would write late, which no server can prevent.
    """
    request = Request(config["url"], b'{"nodes":{}}', {"Idempotency-Key": task.idempotency_key})  # noqa: S310 - loopback
    with urlopen(request) as answer:  # noqa: S310 - loopback
        return {"body": json.load(answer)}


if __name__ == "__main__":
    worker.run()
