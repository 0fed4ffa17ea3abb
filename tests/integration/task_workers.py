"""Task workers for tests: they speak the protocol over any client, and perform nothing by themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx2

TASKS = "/api/v1/tasks"


@dataclass
class TaskWorkerClient:
    """Worker of custom types, with the tasks that it holds by id."""

    api: httpx2.AsyncClient
    types: dict[str, str] = field(default_factory=lambda: {"acme/resize": "1.2.0"})
    pools: list[str] = field(default_factory=lambda: ["default"])
    id: str = field(default_factory=lambda: f"w_{uuid4().hex}")
    claimed: str | None = None
    held: dict[str, dict[str, Any]] = field(default_factory=dict)

    def poll(self, *, limit: int = 1, wait: float = 10, request_id: str | None = None) -> dict[str, Any]:
        """Return the body of a claim request for up to `limit` tasks."""
        return {
            "worker": {"id": self.id, "name": "a worker", "sdk": "test/1"},
            "requestId": request_id or uuid4().hex,
            "max": limit,
            "wait": wait,
            "types": [{"type": name, "version": version} for name, version in self.types.items()],
            "pools": self.pools,
        }

    async def claim(self, **options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - options of `poll`
        """Claim tasks, keep them as held, and return them."""
        body = self.poll(**options)
        answer = await self.api.post(f"{TASKS}/claim", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        self.claimed = body["requestId"]
        tasks: list[dict[str, Any]] = answer.json()["tasks"]
        self.held |= {task["id"]: task for task in tasks}
        return tasks

    async def report(self, *items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - fields of a report
        """Send a report with these items, which renews the held tasks; return the results."""
        body = {"worker": self.id, "claimed": self.claimed, "held": list(self.held), "items": list(items)}
        answer = await self.api.post(f"{TASKS}/report", json={**body, **fields}, timeout=30)
        assert answer.status_code == 200, answer.text
        results: list[dict[str, Any]] = answer.json()["results"]
        return results

    async def send(self, task: dict[str, Any], kind: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - fields of an item
        """Report one item of a kind about a task, and return its result; a final kind ends the holding of the task."""
        results = await self.report({"id": task["id"], "lease": task["lease"], "kind": kind, **fields})
        if kind in {"complete", "fail", "release"}:
            self.held.pop(task["id"], None)
        return results[0]

    async def complete(self, task: dict[str, Any], output: Any = None, **fields: Any) -> str:  # noqa: ANN401 - any JSON value
        """Report a task as completed with an output; return the status of the item."""
        result = await self.send(task, "complete", output=output or {"url": "http://x"}, **fields)
        status: str = result["status"]
        return status
