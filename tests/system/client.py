"""The client that the tests serve."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import httpx2

from models.execution_status import TERMINAL_STATUSES
from tests.system.wait_conditions import PATIENCE_SECONDS, POLL_SECONDS

if TYPE_CHECKING:
    from engine.values import Json

API_KEY = "sk-system-tests-0123456789"


@dataclass(frozen=True, slots=True)
class ExecutionEnd:
    """End of an execution, as reported to its client."""

    status: str
    error_code: str | None
    outputs: Mapping[str, Any]


class RetryingClient:
    """Client that follows the documentation: it repeats unanswered requests and those with 503 under the same
    Idempotency-Key.
    """

    def __init__(
        self,
        url: str,
        patience_seconds: float = PATIENCE_SECONDS,
        key: str = API_KEY,
        *,
        other_urls: Sequence[str] = (),
    ) -> None:
        """Create a client of a gateway, or of several that take turns."""
        self.patience_seconds = patience_seconds
        self.retry_seconds = POLL_SECONDS
        """Pause before an unanswered request is repeated."""
        self.longest_retry_seconds = 2.0
        """Length up to which pauses double, each shortened at random.

        Hundreds of clients that all repeat at once would keep this process from the links of the gateway.
        """
        self.ended: dict[str, ExecutionEnd] = {}
        """First observed end of each execution."""
        self._gateways = [
            httpx2.AsyncClient(
                base_url=f"{one}/api/v1",
                headers={"X-API-Key": key},
                timeout=httpx2.Timeout(20.0, connect=2.0),
                limits=httpx2.Limits(max_connections=200),
                trust_env=False,
                # Gateways of tests speak plain HTTP, and to load certificates takes 5 ms.
                verify=False,
            )
            for one in (url, *other_urls)
        ]
        self._turns = cycle(self._gateways)

    async def close(self) -> None:
        for gateway in self._gateways:
            await gateway.aclose()

    async def send(
        self, method: str, path: str, body: Json = None, *, key: str | None = None
    ) -> httpx2.Response:
        """Send a request once. Raises `httpx2.TransportError` if there is no answer."""
        headers = {"Idempotency-Key": key} if key else {}
        return await next(self._turns).request(method, path, json=body, headers=headers)

    async def answer(
        self, method: str, path: str, body: Json = None, *, key: str | None = None
    ) -> httpx2.Response:
        """Send a request until it gets an answer other than 503, and return that;
        after the patience the last answer or error.
        """
        deadline = time.monotonic() + self.patience_seconds
        pause_seconds = self.retry_seconds
        while True:
            try:
                response = await self.send(method, path, body, key=key)
            except httpx2.TransportError:
                if time.monotonic() > deadline:
                    raise
            else:
                if response.status_code != httpx2.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                    return response
            await asyncio.sleep(pause_seconds)
            longest = min(2 * pause_seconds, max(self.longest_retry_seconds, self.retry_seconds))
            pause_seconds = random.uniform(longest / 2, longest)

    async def create(self, workflow: Mapping[str, Json]) -> str:
        """Create a workflow, once however often the request is repeated, and return its id."""
        response = await self.answer("POST", "/workflows", dict(workflow), key=str(uuid4()))
        assert response.status_code == httpx2.codes.CREATED, response.text
        return str(response.json()["workflowId"])

    async def execute_once(
        self, workflow_id: str, inputs: Mapping[str, Json] | None = None, *, key: str | None = None
    ) -> httpx2.Response:
        """Request a run once, and return an answer of any status. Raises `httpx2.TransportError` if there is none."""
        return await self.send(
            "POST", f"/workflows/{workflow_id}/execute", {"triggerInputs": dict(inputs or {})}, key=key
        )

    async def execute(
        self, workflow_id: str, inputs: Mapping[str, Json] | None = None, *, key: str | None = None
    ) -> str:
        """Start a run of a workflow, once under its idempotency key, and return the execution's id."""
        path = f"/workflows/{workflow_id}/execute"
        response = await self.answer(
            "POST", path, {"triggerInputs": dict(inputs or {})}, key=key or str(uuid4())
        )
        assert response.status_code == httpx2.codes.CREATED, response.text
        return str(response.json()["executionId"])

    async def progress(self, execution_id: str, *, wait_seconds: float = 0) -> dict[str, Any]:
        """Return the progress of an execution, at its end or after `wait_seconds` if that is earlier."""
        response = await self.answer("GET", f"/executions/{execution_id}/progress?wait={wait_seconds:g}")
        assert response.status_code == httpx2.codes.OK, response.text
        return cast("dict[str, Any]", response.json())

    async def end(self, execution_id: str, within: float = PATIENCE_SECONDS) -> ExecutionEnd:
        """Wait for the end of an execution, and return the first end that this client observed; raises TimeoutError."""
        async with asyncio.timeout(within):
            progress: dict[str, Any] = {"status": "pending"}
            while progress["status"] not in TERMINAL_STATUSES:
                progress = await self.progress(execution_id, wait_seconds=5)
        error = progress.get("error") or {}
        ended = ExecutionEnd(progress["status"], error.get("code"), progress["outputs"])
        return self.ended.setdefault(execution_id, ended)

    async def has_status(self, execution_id: str, status: str) -> bool:
        """Return whether an execution currently has a status."""
        return bool((await self.progress(execution_id))["status"] == status)

    async def ask(self, execution_id: str, request: str) -> httpx2.Response:
        """Request `stop`, `cancel` or `resume` of an execution; return the answer of any status."""
        return await self.answer("POST", f"/executions/{execution_id}/{request}")
