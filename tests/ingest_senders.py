"""One sender of each kind, and the workflows that they send to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx2

from tests import signed_requests
from tests.signed_requests import SECRET, SendGrid, SignedRequest

if TYPE_CHECKING:
    from engine.values import Json

Post: TypeAlias = Callable[[str, "dict[str, Json]"], Awaitable[httpx2.Response]]
"""Sends a body to a path below `/api/v1`, with the key of an admin."""

NAMES = ("a producer", "SendGrid", "Mailgun", "SES", "GitHub", "Stripe", "CloudEvents")
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.02
_numbers = count(1)


@dataclass(frozen=True, slots=True)
class SenderUnderTest:
    """Sender of requests that start runs, with the path that it posts to; `make` builds the request of a number."""

    name: str
    path: str
    make: Callable[[int], SignedRequest]
    key: str | None = None
    """API key, for senders that authenticate neither by a signature nor by a token in the path."""

    def delivery(self) -> SenderDelivery:
        """Return a delivery with a number that no other has."""
        return SenderDelivery(self, next(_numbers))

    async def post(self, http: httpx2.AsyncClient, made: SignedRequest) -> httpx2.Response:
        """Post a request, and return the answer of any status. Raises `httpx2.TransportError` if there is none."""
        headers = dict(made.headers)
        if self.key is not None:
            headers["X-API-Key"] = self.key
        return await http.post(self.path, content=made.body, headers=headers)


@dataclass(frozen=True, slots=True)
class SenderDelivery:
    """Delivery that is sent until it is accepted, and signed anew each time."""

    sender: SenderUnderTest
    number: int

    async def send(self, http: httpx2.AsyncClient) -> httpx2.Response:
        """Send the delivery once, signed anew; return the answer of any status.

        Raises `httpx2.TransportError` if there is none.
        """
        return await self.sender.post(http, self.sender.make(self.number))

    async def deliver(self, http: httpx2.AsyncClient) -> httpx2.Response:
        """Send the delivery until it gets an answer other than 503, as all of these senders do, and return that.

        Fails after a minute.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                response = await self.send(http)
                if response.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
                    return response
            except httpx2.TransportError:
                pass
            assert time.monotonic() < deadline, self.sender.name
            await asyncio.sleep(POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class AllSenders:
    """All senders, and the workflows that they start."""

    all: Sequence[SenderUnderTest]
    workflows: Sequence[str]

    def one(self, name: str) -> SenderUnderTest:
        """Return the sender of this name; raises StopIteration without one."""
        return next(sender for sender in self.all if sender.name == name)

    def deliveries(self) -> Sequence[SenderDelivery]:
        """Return a new delivery of each sender."""
        return [sender.delivery() for sender in self.all]


def read_execution_id(response: httpx2.Response) -> str:
    """Return the id of the only execution in the answer to a delivery; fails for an error."""
    assert response.is_success, response.text
    body: dict[str, Any] = response.json()
    if "results" in body:
        (body,) = body["results"]
    return str(body["executionId"])


@asynccontextmanager
async def open_client(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield an HTTP client for a server, without an API key, and close it after the block."""
    timeout = httpx2.Timeout(PATIENCE_SECONDS, connect=2.0)
    async with httpx2.AsyncClient(base_url=url, timeout=timeout, trust_env=False) as client:
        yield client


async def set_up(post: Post, key: str) -> AllSenders:
    """Create the workflows and the senders' credentials by `post`; return the senders.

    `key` is for those with an API key.
    """
    send_grid = SendGrid()
    source: dict[str, Json] = {
        "name": "signs",
        "type": "webhook-secret",
        "settings": {},
        "secrets": {"secret": SECRET},
    }
    secret = str((await _create(post, "/datasources", source))["dataSourceId"])
    queue = await _create_workflow(post, "queue-trigger", {})
    services: dict[str, Json] = {
        "sendgrid": {"publicKey": send_grid.public_key},
        "mailgun": {"signingKey": secret},
    }
    mail = await _create_workflow(post, "email-trigger", services)
    hook = await _create_workflow(
        post, "webhook", {"verification": {"provider": "github", "dataSource": secret}}
    )
    types: list[Json] = ["invoice.paid", signed_requests.EVENT_TYPE]
    event = await _create_workflow(post, "event-trigger", {"event_type": types})
    of_mail = (await _create(post, f"/workflows/{mail}/trigger-token", {}))["token"]
    of_hook = (await _create(post, f"/workflows/{hook}/trigger-token", {}))["token"]
    of_events = await _create(post, "/auth/event-tokens", {"name": "Stripe", "secrets": {"stripe": [SECRET]}})
    base = "/api/v1/workflows"
    emails = f"{base}/{mail}/email-trigger"
    everybody = [
        SenderUnderTest("a producer", f"{base}/{queue}/enqueue", signed_requests.build_message, key),
        SenderUnderTest("SendGrid", emails, send_grid.mail),
        SenderUnderTest("Mailgun", emails, signed_requests.sign_mailgun),
        SenderUnderTest("SES", f"{emails}?key={of_mail}", signed_requests.sign_ses),
        SenderUnderTest("GitHub", f"/hooks/{of_hook}", signed_requests.sign_github),
        SenderUnderTest("Stripe", f"{base}/events?key={of_events['token']}", signed_requests.sign_stripe),
        SenderUnderTest("CloudEvents", f"{base}/events", signed_requests.build_cloud_event, key),
    ]
    return AllSenders(everybody, [queue, mail, hook, event])


async def _create_workflow(post: Post, trigger: str, config: Mapping[str, Json]) -> str:
    nodes: list[Json] = [
        {"id": "start", "nodeId": trigger, "config": dict(config)},
        {"id": "done", "nodeId": "set", "config": {"values": {"is_done": True}}},
    ]
    connections: list[Json] = [{"source": "start", "target": "done"}]
    body: dict[str, Json] = {"name": trigger, "status": "active", "nodes": nodes, "connections": connections}
    return str((await _create(post, "/workflows", body))["workflowId"])


async def _create(post: Post, path: str, body: dict[str, Json]) -> dict[str, Any]:
    response = await post(path, body)
    assert response.status_code == httpx2.codes.CREATED, response.text
    made: dict[str, Any] = response.json()
    return made
