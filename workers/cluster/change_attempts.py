"""Changes that take several requests: after a failure, the failed request is repeated alone before all are sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from workers.cluster.driver import ClusterError, NotDeployed

T = TypeVar("T")
Send = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class _FailedRequest:
    goal: object
    send: Send


class ChangeAttempt:
    """Attempt at a change; it counts its requests and remembers the last one."""

    def __init__(self) -> None:
        self.requests = 0
        self.last: Send | None = None

    async def send(self, request: Callable[[], Awaitable[T]]) -> T:
        """Send one request of the change."""
        self.requests += 1
        self.last = request
        return await request()


class ChangeAttempts:
    """Failed request of each workflow with a failed last change."""

    def __init__(self) -> None:
        self._failed: dict[str, _FailedRequest] = {}

    @asynccontextmanager
    async def begin(self, workflow_id: str, goal: object) -> AsyncIterator[ChangeAttempt]:
        """Begin an attempt at a change; the caller sends all of its requests, each by `send`.

        If the last attempt at an equal goal has failed, its failed request is repeated first, so that another
        failure costs one request. Each `ClusterError` that leaves the context says how many requests were
        sent.
        """
        attempt = ChangeAttempt()
        failed = self._failed.get(workflow_id)
        try:
            if failed is not None and failed.goal == goal:
                with suppress(NotDeployed):  # all requests together create the deployment again
                    await attempt.send(failed.send)
            yield attempt
        except ClusterError as error:
            error.requests = attempt.requests
            if attempt.last is not None:
                self._failed[workflow_id] = _FailedRequest(goal, attempt.last)
            raise
        self._failed.pop(workflow_id, None)
