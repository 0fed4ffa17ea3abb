"""Client of a Kubernetes API server: paging, watches, errors as exceptions, and a budget that all requests share.

No other module sends requests to the API server.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from json_text import decoding
from telemetry.process_activity import ACTIVITY, KUBERNETES, ServerAnswer
from workers.cluster.driver import (
    ClusterBusy,
    ClusterError,
    ClusterForbidden,
    ClusterRefused,
    ClusterUnavailable,
)
from workers.cluster.manifests import Manifest

REQUEST_SECONDS = 10.0
CONCURRENT_REQUESTS = 16
REQUESTS_PER_SECOND = 20.0
"""Default of client-go for controllers, which may send 30 at once."""
BURST_SECONDS = 2.0
"""Burst after a quiet time, in seconds of the rate."""
BUSY_SECONDS = 30.0
"""Seconds for which a request is repeated that the API server defers with 429."""
DEFAULT_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
PAGE_SIZE = 500
ATTEMPTS = 3
WATCH_GRACE_SECONDS = 15.0
"""Grace after which a stream without an end counts as broken."""
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON = "application/json"
_UNREACHED_WEBHOOK = "failed calling webhook"


class ObjectNotFound(Exception):
    """404: the object does not exist."""


class ObjectConflict(Exception):
    """409: the object was changed concurrently."""


class VersionExpired(Exception):
    """410: the API server has dropped the requested version; list again."""


async def connect_api(kubeconfig: Path | None, *, budget: RequestBudget | None = None) -> KubernetesApi:
    """Return an API client with the credentials of a kubeconfig, or (None) of the pod's own service account.

    Raises `ClusterRefused` for a missing or unreadable configuration. It sends no request.
    """
    configuration = kubernetes_client.Configuration()
    try:
        if kubeconfig is None:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        else:
            await kubernetes_config.load_kube_config(
                config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
            )
    except (kubernetes_config.ConfigException, OSError) as error:
        raise ClusterRefused(f"No Kubernetes API server is configured: {error}") from error
    return KubernetesApi(kubernetes_client.ApiClient(configuration), budget=budget)


class RequestBudget:
    """Token bucket for the requests of one client, with the pauses that the server asks for."""

    def __init__(
        self, per_second: float = REQUESTS_PER_SECOND, *, burst_seconds: float = BURST_SECONDS
    ) -> None:
        self._interval = 1 / per_second
        self._burst_seconds = max(burst_seconds - self._interval, 0.0)
        self._next_at = 0.0
        self._paused_until = 0.0

    async def acquire(self) -> None:
        """Wait until the next request may be sent to the API server; first come, first served.

        The default rate is 20 per second on average, with bursts of 40 after a quiet time. None is sent during a
        `pause`.
        """
        loop = asyncio.get_running_loop()
        at = max(self._next_at, loop.time() - self._burst_seconds)
        self._next_at = at + self._interval
        while (seconds := max(at, self._paused_until) - loop.time()) > 0:  # noqa: ASYNC110 - a pause may grow meanwhile
            await asyncio.sleep(seconds)

    def pause(self, seconds: float) -> None:
        """Let `acquire` hold back requests for `seconds`, and up to a quarter longer at random; return at once.

        A longer pause in progress stays. The random part spreads the return of several clients.
        """
        seconds *= random.uniform(1.0, 1.25)  # noqa: S311 - spreads retries, no secret
        self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + seconds)


class KubernetesApi:
    """API server, accessed with the Kubernetes client's credentials and TLS.

    The client's typed methods would read manifests and answers by models of one Kubernetes version, and
    reject those of another one.

    Every method raises `ClusterUnavailable`, `ClusterBusy`, `ClusterForbidden` or `ClusterRefused`; those for
    single objects also `ObjectNotFound`, `ObjectConflict` and `VersionExpired`.
    """

    def __init__(
        self,
        client: kubernetes_client.ApiClient,
        *,
        request_seconds: float = REQUEST_SECONDS,
        budget: RequestBudget | None = None,
    ) -> None:
        self.request_seconds = request_seconds
        self._client = client
        self._budget = budget or RequestBudget()
        self._request_slots = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def close(self) -> None:
        """Close the connections to the API server of the cluster."""
        await self._client.close()

    async def list(self, path: str, label: str) -> tuple[Sequence[Manifest], str]:
        """Return all items at a path that match a label selector, read in pages of 500, and the resource version of the
        list.

        A list whose version expires meanwhile is read again, three times at most. Raises `ClusterError`, and
        `ClusterUnavailable` for a path that is not served or changes too fast.
        """
        for _ in range(ATTEMPTS):
            items: list[Manifest] = []
            query = {"labelSelector": label, "limit": str(PAGE_SIZE)}
            try:
                while True:
                    page = await self.request("GET", path, query=query)
                    items.extend(page["items"])
                    metadata = page["metadata"]
                    if not metadata.get("continue"):
                        return items, metadata["resourceVersion"]
                    query["continue"] = metadata["continue"]
            except VersionExpired:
                continue  # the earlier pages are of a version that the API server has dropped
            except ObjectNotFound as error:  # an API server that has just started doesn't serve all paths yet
                raise ClusterUnavailable(f"The API server does not serve {path}: {error}") from error
        raise ClusterUnavailable(f"{path} changed faster than it could be listed")

    async def patch(
        self, path: str, body: Manifest, *, content_type: str, query: Mapping[str, str]
    ) -> Manifest:
        """Patch an object and return its new state; after a conflict it is tried again, three times in all.

        Raises `ObjectNotFound`, `ClusterError`, and `ClusterUnavailable` after three conflicts.
        """
        for _ in range(ATTEMPTS):
            with suppress(ObjectConflict):
                return await self.request("PATCH", path, query=query, body=body, content_type=content_type)
        raise ClusterUnavailable(f"{path} was changed concurrently again and again")

    async def watch(
        self, path: str, query: Mapping[str, str], *, seconds: float, on_event: Callable[[Manifest], None]
    ) -> None:
        """Pass each event of a watch to `on_event` until the stream ends, after about `seconds`.

        Raises `VersionExpired` for a resource version that is too old, and `ClusterError`.
        """
        query = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": f"{seconds:.0f}"}
        await self._budget.acquire()
        try:
            async with asyncio.timeout(seconds + WATCH_GRACE_SECONDS):
                response = await self.send("GET", path, query=query)
                async with response:
                    if response.status != HTTPStatus.OK:
                        failure = self._error_for_response(response, await response.content.read())
                        _note_failure(failure)
                        raise failure
                    _enable_keep_alive(response)
                    async for line in response.content:
                        event: Manifest = decoding.decode(line)
                        if event["type"] == "ERROR":
                            status = event["object"]
                            raise _error_for_status(status.get("code", 0), status.get("message", ""))
                        on_event(event)
        except (aiohttp.ClientError, OSError, ValueError, kubernetes_config.ConfigException) as error:
            ACTIVITY.note_failure(KUBERNETES, error)
            raise ClusterUnavailable(f"The watch was cut off: {_describe_error(error)}") from error

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = JSON,
    ) -> Manifest:
        """Send a request to the API server and return the JSON object of its answer; it waits and repeats as
        `read` does.

        `body` None sends none. Raises `ObjectNotFound`, `ObjectConflict`, `VersionExpired` and
        `ClusterError`.
        """
        answer = await self.read(method, path, query=query, body=body, content_type=content_type)
        try:
            decoded: Manifest = decoding.decode(answer)
        except ValueError as error:
            raise ClusterUnavailable(f"{method} {path} got an answer that is not JSON") from error
        return decoded

    async def read(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = JSON,
    ) -> bytes:
        """Send a request within the budget, and return the body of its answer; repeat it for up to 30 s while it is
        deferred (429).

        Raises `ObjectNotFound`, `ObjectConflict`, `VersionExpired` and `ClusterError`, such as `ClusterBusy` after that
        time.
        """
        loop = asyncio.get_running_loop()
        gives_up_at = loop.time() + BUSY_SECONDS
        while True:
            await self._budget.acquire()
            response, answer = await self._send_and_read(
                method, path, query=query, body=body, content_type=content_type
            )
            if response.status < HTTPStatus.BAD_REQUEST:
                return answer
            failure = self._error_for_response(response, answer)
            if not isinstance(failure, ClusterBusy) or loop.time() + failure.retry_seconds > gives_up_at:
                _note_failure(failure)
                raise failure

    async def _send_and_read(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None,
        body: Manifest | None,
        content_type: str,
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """Send a request, and return the response, of any status, with its body.

        A time limit and a limit of concurrent requests apply. Raises `ClusterUnavailable`.
        """
        try:
            async with asyncio.timeout(self.request_seconds), self._request_slots:
                begun_at = time.monotonic()
                response = await self.send(method, path, query=query, body=body, content_type=content_type)
                answer: bytes = await response.content.read()
                now = time.monotonic()
                ACTIVITY.connections[KUBERNETES].answer = ServerAnswer(now, now - begun_at)
        except (
            aiohttp.ClientError,
            OSError,
            kubernetes_config.ConfigException,
        ) as error:  # TimeoutError is an OSError
            ACTIVITY.note_failure(KUBERNETES, error)
            raise ClusterUnavailable(
                f"The API server did not answer {method} {path}: {_describe_error(error)}"
            ) from error
        return response, answer

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = JSON,
    ) -> aiohttp.ClientResponse:
        """Send one request without regard to the budget; return the response, of any status, before its body
        is read.

        Only the connecting has a time limit. Raises the errors of aiohttp and `OSError`.
        """
        request = await self._client.param_serialize(
            method=method,
            resource_path=path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json, */*", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.request_seconds)
        answer = await self._client.call_api(*request, _request_timeout=timeout)
        response: aiohttp.ClientResponse = answer.response
        return response

    def _error_for_response(self, response: aiohttp.ClientResponse, answer: bytes) -> Exception:
        """Return the exception for an unsuccessful response; 429 pauses all requests of the client and gives
        `ClusterBusy`.
        """
        if response.status != HTTPStatus.TOO_MANY_REQUESTS:
            return _error_for_status(response.status, _error_message(answer))
        seconds = _parse_retry_after(response.headers.get("Retry-After", ""))
        self._budget.pause(seconds)
        return ClusterBusy(_error_message(answer), retry_seconds=seconds)


def _note_failure(failure: Exception) -> None:
    """Note an unsuccessful answer for the reports of this process; missing and changed objects are no failures."""
    if isinstance(failure, ClusterError):
        ACTIVITY.note_failure(KUBERNETES, failure)


def _enable_keep_alive(response: aiohttp.ClientResponse) -> None:
    """Enable TCP keepalive, so that a silently vanished server is noticed within 25 s.

    Does nothing if the connection is closed.
    """
    connection = response.connection
    transport = None if connection is None else connection.transport
    found = None if transport is None else transport.get_extra_info("socket")
    if found is None:
        return
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _parse_retry_after(header: str) -> float:
    """Return the seconds of a `Retry-After`, at most 60; 1 for a date or another text."""
    return min(float(header), MAX_RETRY_SECONDS) if header.isdecimal() else DEFAULT_RETRY_SECONDS


def _error_for_status(status: int, message: str) -> Exception:
    """Return the exception for the status of a failed request: missing, conflict, expired, unavailable,
    forbidden or refused.
    """
    match status:
        case HTTPStatus.NOT_FOUND:
            return ObjectNotFound(message)
        case HTTPStatus.CONFLICT:
            return ObjectConflict(message)
        case HTTPStatus.GONE:
            return VersionExpired(message)
        case HTTPStatus.REQUEST_TIMEOUT | HTTPStatus.TOO_MANY_REQUESTS:
            return ClusterUnavailable(message)
    is_failure = status >= HTTPStatus.INTERNAL_SERVER_ERROR or status < HTTPStatus.BAD_REQUEST
    if is_failure and _UNREACHED_WEBHOOK not in message:
        return ClusterUnavailable(f"The API server failed ({status}): {message}")
    text = f"The API server refused it ({status}): {message}"
    return ClusterForbidden(text) if _is_forbidden(status, message) else ClusterRefused(text)


def _is_forbidden(status: int, message: str) -> bool:
    """Return whether permissions or a webhook prevent a request, which says nothing about its object or the pods.

    A webhook chooses its own status, and an unreachable one causes a 500. A quota answers 403 as well, but it
    refuses the object itself, and is not counted here.
    """
    if ("admission webhook" in message and "denied the request" in message) or _UNREACHED_WEBHOOK in message:
        return True
    is_quota = "exceeded quota" in message
    return status == HTTPStatus.UNAUTHORIZED or (status == HTTPStatus.FORBIDDEN and not is_quota)


def _error_message(answer: bytes) -> str:
    try:
        return str(decoding.decode(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace") or "no reason given"


def _describe_error(error: BaseException) -> str:
    return str(error) or type(error).__name__
