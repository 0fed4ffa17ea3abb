"""Worker of the Python SDK whose steps write to the ledger: `python -m benchmarks.faults.task_worker`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import httpx2
from pilotflame_sdk import Task, Worker

TYPE: Final = "faults/write"
ANSWER_SECONDS: Final = 120.0
"""Longest time for which the ledger holds a call back."""
worker = Worker("faults", slots=2, grace=1)


@dataclass
class Write:
    """Config of a step."""

    url: str


@worker.node(TYPE, "1.0.0", lease=10)
def write(config: Write, task: Task) -> dict[str, Any]:
    """Write to the ledger under the key of the task, and return its answer as an HTTP node does."""
    headers = {"Idempotency-Key": task.idempotency_key}
    answer = httpx2.post(
        config.url, json={"nodes": {}}, headers=headers, timeout=ANSWER_SECONDS, trust_env=False
    )
    return {"body": answer.raise_for_status().json()}


if __name__ == "__main__":
    worker.run()
