"""The server's API, as the users of a fixture call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2

from models.execution_status import TERMINAL_STATUSES
from tests.system.wait_conditions import wait_until

if TYPE_CHECKING:
    from tests.signed_requests import SignedRequest

ADMIN = "admin"


@dataclass
class Api:
    """Client of the server's API, with a key for each user."""

    http: httpx2.AsyncClient
    keys: Mapping[str, str]

    async def get(self, path: str, *, user: str = ADMIN) -> dict[str, Any]:
        """Return the answer to a GET request, which must succeed."""
        return await self.send("GET", path, user=user)

    async def post(
        self, path: str, body: object = None, *, user: str = ADMIN, key: str | None = None
    ) -> dict[str, Any]:
        """Post a body and return the answer, which must succeed; `key` is the idempotency key."""
        return await self.send("POST", path, body, user=user, key=key)

    async def send(
        self, method: str, path: str, body: object = None, *, user: str = ADMIN, key: str | None = None
    ) -> dict[str, Any]:
        """Send a request, which must succeed, and return the body of the answer.

        With an idempotency key, it is repeated while the server answers 503.
        """
        headers = {"X-API-Key": self.keys[user]} | ({"Idempotency-Key": key} if key else {})

        async def answered() -> httpx2.Response | None:
            answer = await self.http.request(method, f"/api/v1{path}", json=body, headers=headers)
            is_busy = answer.status_code == httpx2.codes.SERVICE_UNAVAILABLE
            return None if key and is_busy else answer

        return checked(await wait_until(answered, what=f"{method} {path} is answered"))

    async def deliver(self, url: str, request: SignedRequest) -> dict[str, Any]:
        """Post a signed request of a sender and return the answer, which must succeed."""
        return checked(await self.http.post(url, content=request.body, headers=dict(request.headers)))

    async def become(self, execution_id: str, status: str, *, user: str = ADMIN) -> dict[str, Any]:
        """Wait until a run has a status, and return its progress; fails if it ends in another one."""

        async def arrived() -> dict[str, Any] | None:
            shown = await self.get(f"/executions/{execution_id}/progress", user=user)
            return shown if shown["status"] in {status, *TERMINAL_STATUSES} else None

        shown: dict[str, Any] = await wait_until(arrived, what=f"{execution_id} is {status}")
        assert shown["status"] == status, shown
        return shown

    async def wait_until_ready(self) -> None:
        """Wait until the server reports that it is ready."""

        async def is_ready() -> bool:
            try:
                return (await self.http.get("/readyz")).is_success
            except httpx2.ConnectError:
                return False

        await wait_until(is_ready, what="the server is ready")


def checked(answer: httpx2.Response) -> dict[str, Any]:
    """Return the body of an answer, which must be a success."""
    assert answer.is_success, answer.text
    decoded: dict[str, Any] = answer.json() if answer.content else {}
    return decoded
